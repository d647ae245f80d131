"""How the kernels are divided among devices: the batch and the heads, each where the arrays are already.

A compiler that partitions a program (`jax.jit` with sharded arrays, `keras.distribution`) knows nothing of a custom
call and would gather all its operands on each device. Here it is told: the axes of the batch and of the heads stay
where they are, rows, keys and depth are gathered. Query heads of a group go with their key head; if that is the only
one, it is on each device. What does not divide evenly is gathered.

Each operand has a role per axis: "b" for the batch, "h" for query heads, "k" for key heads, None for all others, among
them axes of extent 1 that broadcast.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn_ops.call.attention_call import canonical
from attn_ops.jax import philox, place
from attn_ops.jax.call import Arrays, Options


def forward(kernels, of_shares, options: Options, arrays: Arrays):
    """``kernels(options, arrays)``, which are `forms.forward`, divided. ``of_shares`` computes the same of a share of a call
    with dropout, whose ``arrays.origin`` tells where it stands in the whole."""
    query, lse = _of_query(options), ("b", "h", None)
    results = [query, *([lse] if options.return_lse else []), (*lse, None)]

    def by(function, arrays):
        out, lse, statistics = function(options, arrays)
        return out, *([lse] if options.return_lse else []), statistics

    kernels, of_shares = (functools.partial(by, function) for function in (kernels, of_shares))
    out, *lse, statistics = _divided(kernels, of_shares, options, (arrays,), _of_arrays(options, arrays), results)
    return out, lse[0] if lse else None, statistics


def backward(
    kernels, of_shares, options: Options, arrays: Arrays, out, statistics, d_out, d_lse, wanted: tuple[str, ...]
):
    """``kernels(options, *arguments, wanted)``, which are `forms.backward`, divided, as in `forward`. Gradients of what
    devices share are added up."""
    query, lse = _of_query(options), ("b", "h", None)
    rest = [query, (*lse, None), query, *([] if d_lse is None else [lse])]
    roles = dict(zip(Arrays._fields, _by_field(options, arrays)))

    def by(function, *arguments):
        return function(options, *arguments, wanted)

    kernels, of_shares = (functools.partial(by, function) for function in (kernels, of_shares))
    arguments = arrays, out, statistics, d_out, d_lse
    results = [roles[name][0] for name in wanted]
    return _divided(kernels, of_shares, options, arguments, [*_of_arrays(options, arrays), *rest], results, sums=True)


def along(function, batch, num_heads, roles, result_role):
    """``function`` of arrays of these roles, whose one result has ``result_role``, divided along what the letters "b" and "h"
    stand for."""
    if place.in_manual_axes():
        return function
    plan = _Plan({"b": batch, "h": num_heads, "k": num_heads}, roles, [result_role])
    divided = plan.partitioned(lambda *arrays: (function(*arrays),), lambda axes: lambda *arrays: (function(*arrays),))
    return lambda *arrays: divided(*arrays)[0]


def _of_query(options):
    return _in_layout(options, "h")


def _in_layout(options, heads):
    return ("b", None, heads, None) if options.layout == "BSHD" else ("b", heads, None, None)


def _by_field(options, arrays):
    """The roles of the axes of each field of ``arrays``: a list of those of its arrays."""
    keys = _in_layout(options, "k")
    if arrays.block_table is not None:
        keys = (None, *keys[1:])  # pages belong to no sequence
    scores = ("b", "h", None, None)
    roles = {
        "query": _of_query(options),
        "key": keys,
        "value": keys,
        "bias": scores,
        "masks": scores,
        "query_lengths": ("b",),
        "key_lengths": ("b",),
        "seed": (None,),
        "intervals": ("b", None),
        "query_offset": ("b",),
        "segments": ("b", None),
        "blocks": scores,
        "alibi_slopes": ("b", "h"),
        "relative_bias": ("h", None),
        "sinks": ("h",),
        "block_table": ("b", None),
        "key_scales": keys[:3],
        "value_scales": keys[:3],
        "origin": (None,),
    }
    return [[roles[name]] * len(jax.tree.leaves(x)) for name, x in zip(Arrays._fields, arrays)]


def _of_arrays(options, arrays):
    """The roles of the leaves of ``arrays``, in their order."""
    return [role for roles in _by_field(options, arrays) for role in roles]


def _divided(kernels, of_shares, options, arguments, roles, result_roles, sums=False):
    """``kernels(*arguments)``, a tuple of arrays, with a rule for the axes of these roles. With ``sums`` results that
    several devices have a share of are added up; without, they are the same on each.

    With dropout a share is told where it stands in the whole, and computed by ``of_shares``.
    """
    arrays = arguments[0]
    batch, num_heads = canonical(arrays.query.shape, options.layout)[:2]
    num_kv_heads = canonical(arrays.key.shape, options.layout)[1]
    leaves, tree = jax.tree.flatten(arguments)
    if place.in_manual_axes() or not all(isinstance(n, int) for x in leaves for n in x.shape):
        return kernels(*arguments)  # in `jax.shard_map` shares are the caller's; some extents jax.export leaves open
    extents = {"b": batch, "h": num_heads, "k": num_kv_heads}

    def flat(axes, *leaves):
        arguments = jax.tree.unflatten(tree, leaves)
        if not (options.dropout_rate and axes and any(axes.values())):
            return tuple(kernels(*arguments))
        arguments = _with_origin(arguments[0], options, axes, num_heads), *arguments[1:]
        return tuple(of_shares(*arguments))

    whole = functools.partial(flat, None)
    roles = [_present(role, x.shape, extents) for role, x in zip(roles, leaves, strict=True)]
    shapes = [x.shape for x in jax.eval_shape(whole, *leaves)]
    result_roles = [_present(role, shape, extents) for role, shape in zip(result_roles, shapes, strict=True)]
    plan = _Plan(extents, roles, result_roles)

    def lowered(axes):
        def run(*leaves):
            results = flat(axes, *leaves)
            if not sums:
                return results
            return tuple(_sum(x, plan.shared(role, axes)) for x, role in zip(results, result_roles))

        return run

    return plan.partitioned(whole, lowered)(*leaves)


def _with_origin(arrays, options, axes, num_heads):
    """The share ``arrays`` that knows which batch entries and heads it has of a call with so many heads."""
    batch, heads = canonical(arrays.query.shape, options.layout)[:2]
    entry, head = (jax.lax.axis_index(axes[letter]) if axes[letter] else 0 for letter in "bh")
    first = entry * batch * num_heads + head * heads
    return arrays._replace(origin=philox.origin(first, num_heads))


def _present(role, shape, extents):
    """``role`` without the letters of axes that are not whole, such as those that broadcast."""
    return tuple(letter if extents.get(letter) == n else None for letter, n in zip(role, shape, strict=True))


def _sum(x, axes):
    """The sum over devices, of 16 bits in 32."""
    if not axes:
        return x
    wide = x.astype("float32") if jnp.finfo(x.dtype).bits < 32 else x
    return jax.lax.psum(wide, axes).astype(x.dtype)


class _Plan:
    """Who holds what of a call, for the callbacks of the compiler.

    ``extents`` are those of the letters, ``operands`` and ``results`` are roles.
    """

    def __init__(self, extents, operands, results):
        self.extents, self.operands, self.results = extents, operands, results

    def partitioned(self, function, lowered):
        """``function`` with the rule; ``lowered(axes)`` is what a device runs on its share, where ``axes`` are those of
        the mesh by letter."""

        def partition(mesh, operands, results):
            mesh = _some_mesh(mesh, operands, results)
            axes = self._axes(mesh, zip((*self.operands, *self.results), (*operands, *results)))
            shardings = [[_sharding(mesh, role, axes) for role in roles] for roles in (self.results, self.operands)]
            return mesh, lowered(axes), tuple(shardings[0]), tuple(shardings[1])

        def infer(mesh, operands, results):
            mesh = _some_mesh(mesh, operands, results)
            axes = self._axes(mesh, zip(self.operands, operands))
            return tuple(_sharding(mesh, role, axes) for role in self.results)

        def propagate(mesh, users):
            mesh = _some_mesh(mesh, users)
            axes = self._axes(mesh, zip(self.results, users))
            return tuple(_sharding(mesh, role, axes) for role in self.results)

        return place.partitioned(function, partition, infer, propagate, self._rule())

    def shared(self, role, axes):
        """The axes of the mesh whose devices each have a share of a result of this role."""
        own = {axis for letter in role if letter for axis in axes[letter]}
        return tuple(axis for axis in (*axes["b"], *axes["h"]) if axis not in own)

    def _axes(self, mesh, described):
        """The axes of the mesh by letter, after those of the first array that is divided along batch or heads."""
        found = {"b": (), "h": ()}
        for role, x in described:
            spec = getattr(x.sharding, "spec", None)
            for letter, entry in zip(role, () if spec is None else spec):
                letter = "h" if letter == "k" else letter
                if letter and entry and not found[letter]:
                    found[letter] = (entry,) if isinstance(entry, str) else tuple(entry)
        grouped = self.extents["k"] > 1
        batch = _dividing(mesh, found["b"], self.extents["b"])
        heads = [axis for axis in found["h"] if axis not in batch]
        heads = _dividing(mesh, heads, self.extents["k" if grouped else "h"])
        return {"b": batch, "h": heads, "k": heads if grouped else ()}

    def _rule(self):
        """The same for Shardy: a factor for each axis, and which may not be divided."""
        replicated = []

        def alone():
            replicated.append(f"r{len(replicated)}")
            return replicated[-1]

        num_heads, num_kv_heads = self.extents["h"], self.extents["k"]
        group = num_heads // max(num_kv_heads, 1)
        sizes = {}

        def factor(letter):
            if letter is None:
                return alone()
            if letter == "b":
                return "b"
            if num_kv_heads == 1:
                return "n" if letter == "h" else alone()
            if letter == "k" or group == 1:
                return "n"
            if "g" not in replicated:
                replicated.append("g")
                sizes["g"] = group
            return place.CompoundFactor("n", "g")

        operands, results = (
            tuple(place.ArrayMapping(*map(factor, role)) for role in roles) for roles in (self.operands, self.results)
        )
        return operands, results, tuple(replicated), sizes


def _dividing(mesh, axes, extent):
    """The first of the axes that together divide an extent into equal shares."""
    count = len(axes)
    while count and extent % math.prod(mesh.shape[axis] for axis in axes[:count]):
        count -= 1
    return tuple(axes[:count])


def _sharding(mesh, role, axes):
    return NamedSharding(mesh, PartitionSpec(*((axes[letter] or None) if letter else None for letter in role)))


def _some_mesh(mesh, *described):
    """``mesh``, or where a program has none, all its devices in a row, of which nothing is divided."""
    if not mesh.empty:
        return mesh
    devices = {
        device for arrays in described for x in arrays if x.sharding is not None for device in x.sharding.device_set
    }
    return Mesh(sorted(devices, key=lambda device: device.id), ("devices",))
