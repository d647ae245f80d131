"""An `AttentionCall` in the two parts that JAX keeps apart: arrays, and what is known when a function is traced."""

from __future__ import annotations

import typing

import jax

from attn_ops.call.attention_call import OPTIONAL_DIFFERENTIABLE, AttentionCall


class Arrays(typing.NamedTuple):
    """The arrays of an `AttentionCall`, under its names; a pytree."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    masks: tuple[jax.Array, ...]
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    seed: jax.Array | None
    intervals: tuple[jax.Array, jax.Array] | None = None
    query_offset: jax.Array | None = None
    segments: tuple[jax.Array, jax.Array] | None = None
    blocks: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    relative_bias: jax.Array | None = None
    sinks: jax.Array | None = None
    block_table: jax.Array | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    origin: jax.Array | None = None  # of dropout, where the call is a part of a larger one: see `philox.origin`

    def differentiable(self) -> tuple[str, ...]:
        """The names of those that have a gradient, in the order of the kernels."""
        return (
            "query",
            "key",
            "value",
            *(name for name in OPTIONAL_DIFFERENTIABLE if getattr(self, name) is not None),
        )


class Options(typing.NamedTuple):
    """The other fields that the mathematics needs; hashable, a static argument of jitted functions."""

    scale: float | None
    window_left: int
    window_right: int
    bottom_right: bool
    dropout_rate: float
    layout: str
    return_lse: bool
    allow_tf32: bool
    block_q: int = 0
    block_k: int = 0
    logits_soft_cap: float | None = None


def split(call: AttentionCall) -> tuple[Options, Arrays]:
    return tuple(part(**{name: getattr(call, name) for name in part._fields if name != "origin"}) for part in (Options, Arrays))


def accumulator(dtype):
    """The dtype of scores, sums and lse for inputs of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"
