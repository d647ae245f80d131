"""The fused attention with its derivatives, and the composite on platforms without kernels for the call.

Which of the two runs is decided by `jax.lax.platform_dependent`, when a function is lowered: only then is it known
where its arrays will be (`jax.jit` on a device of choice, `jax.default_device`, `jax.export`), which the default backend
does not tell.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attn_ops.call.attention_call import NO_GRADIENT, reads_cache
from attn_ops.jax import batching, composite, forms, partition, rules
from attn_ops.jax.call import Arrays, Options


@functools.partial(jax.jit, static_argnums=(0, 1))
def attention(forced: bool, options: Options, arrays: Arrays):
    """(out, lse, statistics) of the kernels; unless ``forced``, of the composite on platforms that have none.

    ``lse`` is None unless ``options.return_lse``; ``statistics`` are for the backward, and have no derivative.

    Reverse mode, to any order, and forward mode: first derivatives in reverse mode are the kernels', all others go through the
    composite.

    Compiled, though it is one call: JAX takes many times as long to find that nothing is differentiated, and inside
    `jax.shard_map` outside of `jax.jit` does not find it at all.
    """
    leaves, tree = jax.tree.flatten(arrays)
    results, derivative = _call(forced, options, tree)
    out, statistics, *lse = rules.call(results, derivative, leaves, linear=(Arrays._fields.index("value"),))
    return out, lse[0] if lse else None, statistics


@functools.cache
def _call(forced, options, tree):
    """The results for the leaves of arrays of this ``tree``, and their derivative, as `rules.call` wants both."""

    def results(*leaves):
        out, lse, statistics = _forward(forced, options, jax.tree.unflatten(tree, leaves))
        return _found(out, statistics, lse)

    def derivative(leaves, tangents):
        arrays = jax.tree.unflatten(tree, leaves)
        d_arrays = jax.tree.unflatten(tree, tangents)
        names = tuple(name for name in arrays.differentiable() if getattr(d_arrays, name) is not None)
        # Itself, not `_forward`, here and below: for higher orders the rules are differentiated in turn.
        out, lse, statistics = attention(forced, options, arrays)
        kept = *leaves, *map(jax.lax.stop_gradient, (out, statistics))
        of_first_order = _of_first_order(forced, options, names, tree)
        d_out, *d_lse = of_first_order(kept, _of(d_arrays, names), _found(out, lse))
        return _found(out, statistics, lse), (d_out, jnp.zeros_like(statistics), *d_lse)

    return results, derivative


@functools.cache
def _of_first_order(forced, options, names, tree):
    """The derivative by ``names`` of a call whose arrays have this ``tree``: of them, out and the statistics."""

    def parts(kept):
        *leaves, out, statistics = kept
        return jax.tree.unflatten(tree, leaves), out, statistics

    def forward(kept, along):
        arrays, _, _ = parts(kept)
        _check(arrays)

        def run(*differentiable):
            return _found(*composite.attention(options, _with(arrays, names, differentiable)))

        return jax.jvp(run, _of(arrays, names), along)[1]

    def backward(kept, cotangents):
        arrays, out, statistics = parts(kept)
        _check(arrays)
        d_out, d_lse = (*cotangents, None)[:2]
        return gradients(forced, options, names, arrays, out, statistics, d_out, d_lse)

    return rules.Linear(forward, backward)


def _check(arrays):
    if reads_cache(arrays):
        raise NotImplementedError(NO_GRADIENT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(forced, options, wanted, arrays, out, statistics, d_out, d_lse):
    """The cotangents of the ``wanted`` of ``arrays.differentiable()``, in that order; compiled like `attention`."""
    leaves, tree = jax.tree.flatten((arrays, out, statistics, d_out, d_lse))
    return rules.call(*_gradients(forced, options, wanted, tree), leaves)


@functools.cache
def _gradients(forced, options, wanted, tree):
    """The gradients for the leaves of the arguments, which have this ``tree``, and their derivative, which is of second order:
    that of the composite's gradients.

    ``out`` and ``statistics`` are arguments of `gradients` but functions of the others; the composite computes them anew,
    so that the whole derivative goes to the others and these two get none. It goes to all others: what was constant
    for the first derivative need not be so for the second.
    """

    def results(*leaves):
        return tuple(_backward(forced, options, wanted, *jax.tree.unflatten(tree, leaves)))

    def derivative(leaves, tangents):
        arrays, _, _, *cotangents = arguments = jax.tree.unflatten(tree, leaves)
        along = jax.tree.unflatten(tree, [jnp.zeros_like(x) if t is None else t for x, t in zip(leaves, tangents)])
        names = arrays.differentiable()

        def first(differentiable, d_out, d_lse):
            return tuple(composite.gradients(options, wanted, _with(arrays, names, differentiable), d_out, d_lse))

        values, along = ((_of(x, names), *cotangents) for x, _, _, *cotangents in (arguments, along))
        return gradients(forced, options, wanted, *arguments), jax.jvp(jax.checkpoint(first), values, along)[1]

    return results, derivative


def _forward(forced, options, arrays):
    kernels = functools.partial(batching.forward, _divided_forward)
    return kernels(options, arrays) if forced else _forward_by_platform(kernels, options, arrays)


def _backward(forced, options, wanted, *arguments):
    kernels = functools.partial(batching.backward, _divided_backward)
    run = kernels if forced else functools.partial(_backward_by_platform, kernels)
    return run(options, *arguments, wanted)


def _forward_by_platform(kernels, options, arrays):
    """The ``kernels`` on platforms that have them for this call, and the composite on others."""
    others = functools.partial(composite.with_statistics, options)
    run = dict.fromkeys(forms.platforms(options, arrays), functools.partial(kernels, options))
    return jax.lax.platform_dependent(arrays, default=others, **run)


def _backward_by_platform(kernels, options, arrays, out, statistics, d_out, d_lse, wanted):
    """The same for their gradients."""

    def others(arrays, out, statistics, d_out, d_lse):
        return composite.gradients(options, wanted, arrays, d_out, d_lse)

    run = dict.fromkeys(forms.platforms(options, arrays), lambda *x: kernels(options, *x, wanted))
    return jax.lax.platform_dependent(arrays, out, statistics, d_out, d_lse, default=others, **run)


# The kernels, divided among the devices of a mesh.
_divided_forward = functools.partial(
    partition.forward, forms.forward, functools.partial(_forward_by_platform, forms.forward)
)
_divided_backward = functools.partial(
    partition.backward, forms.backward, functools.partial(_backward_by_platform, forms.backward)
)


def _of(arrays, names):
    return tuple(getattr(arrays, name) for name in names)


def _with(arrays, names, values):
    """``arrays`` with these in place of those of the names."""
    return arrays._replace(**dict(zip(names, values)))


def _found(*results):
    return tuple(x for x in results if x is not None)
