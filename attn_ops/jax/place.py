"""Where a call stands in JAX: inside `jax.shard_map`, on a mesh whose axes are explicit, on several devices.

The one module with names that differ between the versions of JAX that are supported (0.5 and newer). Each is looked up,
and a JAX without it loses what the name is for, not the attention: `docs/guides/distribution.md` says what.
"""

from __future__ import annotations

import functools
import inspect

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from attn_ops.call import frames

try:
    from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
except ImportError:  # the rules are then those of GSPMD alone
    SdyShardingRule, ArrayMapping, CompoundFactor = None, lambda *x: x, lambda *x: x


def any_ranks(function):
    """``function`` where arrays of different ranks may meet, also under ``jax_numpy_rank_promotion="raise"``."""

    @functools.wraps(function)
    def run(*arguments, **given):
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments, **given)

    return run


def in_manual_axes():
    """Whether this is traced inside `jax.shard_map`, be it of some axes of a mesh only."""
    return any(kind == jax.sharding.AxisType.Manual for kind in _axis_types())


def exporting(x) -> bool:
    """Whether ``x`` is traced for an export of Keras's, or by `jax2tf` otherwise, which take no custom call of ours."""
    return isinstance(x, jax.core.Tracer) and frames.any_of(("jax.experimental.jax2tf",))


def serializing(x) -> bool:
    """Whether ``x`` is traced for `jax.export`, which takes custom calls only from those who ask for it."""
    return isinstance(x, jax.core.Tracer) and frames.any_of(("jax._src.export",))


def axis_size(axis):
    """How many devices a named axis has; inside `jax.shard_map`."""
    return jax.lax.axis_size(axis) if hasattr(jax.lax, "axis_size") else jax.lax.psum(1, axis)


def varying(x):
    """The axes of a mesh along which devices may hold different values of ``x``, as `jax.shard_map` checks them."""
    kind = type_of(x)
    return getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", frozenset()))


def varying_alike(tree):
    """The arrays of ``tree``, each marked as varying along all axes along which one of them varies.

    A custom call wants it so. What all devices held alike gets, by the derivative of this, the sum of their gradients.
    """
    leaves = jax.tree.leaves(tree)
    axes = frozenset().union(*map(varying, leaves))
    return jax.tree.map(lambda x: _cast_to_varying(x, tuple(sorted(axes - varying(x)))), tree) if axes else tree


def result(shape, dtype, like):
    """What a custom call returns, which varies as ``like``."""
    axes = varying(like)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    if hasattr(jax.sharding, "ManualAxisType"):
        alike = jax.sharding.ManualAxisType(varying=axes)
        whole = NamedSharding(type_of(like).sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole, manual_axis_type=alike)
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)


def spec(x):
    """The axes of an explicit mesh along which the type of ``x`` is divided, one entry per axis of ``x``; else all
    None."""
    entries = tuple(getattr(getattr(type_of(x), "sharding", None), "spec", ()))
    return entries + (None,) * (x.ndim - len(entries))


def without_explicit_axes(function, specs, *arguments):
    """``function(*arguments)`` where the axes of meshes are the compiler's to use, also the explicit ones of
    `jax.set_mesh`, for which the results, a tuple, are of these specs."""
    if not hasattr(jax.sharding, "auto_axes"):
        return function(*arguments)
    if not any(kind == jax.sharding.AxisType.Explicit for kind in _axis_types()):
        return function(*arguments)
    return jax.sharding.auto_axes(function, out_sharding=specs)(*arguments)


def partitioned(function, partition, infer, propagate, rule):
    """``function`` of arrays with these callbacks of `custom_partitioning`; ``rule`` gives the mappings of the operands
    and results and the factors that are to be replicated, for Shardy."""
    divided = custom_partitioning(function)
    shardy = {}
    if SdyShardingRule is not None:
        operands, results, replicated, sizes = rule
        # Older rules cannot say what is to be replicated. Then `partition` alone sees to it.
        known = inspect.signature(SdyShardingRule).parameters
        kinds = {"need_replication_factors": replicated} if "need_replication_factors" in known else {}
        shardy["sharding_rule"] = SdyShardingRule(operands, results, **kinds, **sizes)
    divided.def_partition(partition, infer_sharding_from_operands=infer, propagate_user_sharding=propagate, **shardy)
    return divided


def _axis_types():
    """Of the mesh that is the context, if one is."""
    if not hasattr(jax.sharding, "get_abstract_mesh"):
        return ()
    return tuple(getattr(jax.sharding.get_abstract_mesh(), "axis_types", None) or ())


def type_of(x):
    return jax.typeof(x) if hasattr(jax, "typeof") else jax.core.get_aval(x)


def _cast_to_varying(x, axes):
    if not axes:
        return x
    cast = functools.partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary
    return cast(x, axes)
