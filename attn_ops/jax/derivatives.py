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
from attn_ops.jax import batching, composite, forms, partition
from attn_ops.jax.call import Arrays, Options


@functools.partial(jax.jit, static_argnums=(0, 1))
def attention(forced: bool, options: Options, arrays: Arrays):
    """(out, lse, statistics) of the kernels; unless ``forced``, of the composite on platforms that have none.

    ``lse`` is None unless ``options.return_lse``; ``statistics`` are for the backward, and have no derivative.

    Reverse mode, to any order: first derivatives are the kernels', higher ones go through the composite.

    Compiled, though it is one call: JAX takes many times as long to find that nothing is differentiated, and inside
    `jax.shard_map` outside of `jax.jit` does not find it at all.
    """
    return _attention(forced, options, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(forced, options, arrays):
    return _forward(forced, options, arrays)


def _attention_forward(forced, options, primals):
    arrays = jax.custom_derivatives.custom_vjp_primal_tree_values(primals)
    # Itself, not `_forward`, here and below: for higher orders the rules are differentiated in turn.
    out, lse, statistics = attention(forced, options, arrays)
    # What is constant costs the backward pass nothing. Told by structure, since text is no residual.
    wanted = {name: None for name in arrays.differentiable() if getattr(primals, name).perturbed}
    return (out, lse, statistics), (arrays, *map(jax.lax.stop_gradient, (out, statistics)), wanted)


def _attention_backward(forced, options, residuals, cotangents):
    arrays, out, statistics, wanted = residuals
    if reads_cache(arrays):
        raise NotImplementedError(NO_GRADIENT)
    d_out, d_lse, _ = cotangents
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        d_out = jnp.zeros_like(out)
    if isinstance(d_lse, jax.custom_derivatives.SymbolicZero):
        d_lse = jnp.zeros_like(statistics[..., 0])
    names = tuple(name for name in arrays.differentiable() if name in wanted)
    return (_cotangents(arrays, names, gradients(forced, options, names, arrays, out, statistics, d_out, d_lse)),)


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(forced, options, wanted, arrays, out, statistics, d_out, d_lse):
    """The cotangents of the ``wanted`` of ``arrays.differentiable()``, in that order; compiled like `attention`."""
    return _gradients(forced, options, wanted, arrays, out, statistics, d_out, d_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradients(forced, options, wanted, arrays, out, statistics, d_out, d_lse):
    return _backward(forced, options, wanted, arrays, out, statistics, d_out, d_lse)


def _gradients_forward(forced, options, wanted, arrays, out, statistics, d_out, d_lse):
    return gradients(forced, options, wanted, arrays, out, statistics, d_out, d_lse), (arrays, d_out, d_lse)


def _gradients_backward(forced, options, wanted, residuals, cotangents):
    """Second order: the derivative of the composite's gradient.

    ``out`` and ``statistics`` are arguments of `gradients` but functions of the others; the composite computes them anew,
    so that the whole derivative goes to the others and these two get none. It goes to all others: what was constant
    for the first derivative need not be so for the second.
    """
    arrays, d_out, d_lse = residuals
    names = arrays.differentiable()

    def first(differentiable, d_out, d_lse):
        return composite.gradients(options, wanted, _with(arrays, names, differentiable), d_out, d_lse)

    _, pull = jax.vjp(first, _of(arrays, names), d_out, d_lse)
    d, d_d_out, d_d_lse = pull(cotangents)
    return _cotangents(arrays, names, d), None, None, d_d_out, d_d_lse


_gradients.defvjp(_gradients_forward, _gradients_backward)


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


def _cotangents(arrays, names, values):
    """Those of `Arrays` where these are the ones of the names; None is zero."""
    return _with(Arrays(*((None,) * len(x) if isinstance(x, tuple) else None for x in arrays)), names, values)
