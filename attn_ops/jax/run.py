"""A normalised call, run by the implementation that it gets."""

from __future__ import annotations

import jax

from attn_ops.jax import call as calls
from attn_ops.jax import choice, composite, derivatives

_composite = jax.jit(composite.attention, static_argnums=0)


def attention(name, call, chosen, forced):
    """(out, lse) of an `AttentionCall` by the implementation that was ``chosen``, because it was ``forced`` or not;
    lse is None unless asked for."""
    choice.calls[chosen] += 1
    options, arrays = calls.split(call)
    if chosen == "composite":
        return _composite(options, arrays)
    try:
        return derivatives.attention(forced and chosen == "fused", options, arrays)[:2]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"{name}: the kernels have no forward mode (jax.jvp, jax.jacfwd, jax.hessian): "
            'implementation="composite" has it'
        ) from error
