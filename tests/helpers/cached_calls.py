"""Calls with a cache and what they must give: the rows of one causal attention over the whole sequence, by the
specification."""

import functools

import numpy as np

from attn_ops import T5RelativeBias, masks, reference

BATCH, TOKENS, MAX_LENGTH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 23, 26, 4, 2, 8, 6
PARTS = (5, 1, 1, 4, 1, 11)  # of the tokens, one call each
_rng = np.random.default_rng(7)
QUERY, KEY, VALUE = (
    _rng.standard_normal((BATCH, TOKENS, heads, dim)) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
)
_BIAS = _rng.standard_normal((1, HEADS, 1, MAX_LENGTH))
_MASK = _rng.random((BATCH, 1, 1, MAX_LENGTH)) < 0.8
_TABLE = _rng.standard_normal((7, HEADS))
# What the calls take; where the whole sequence takes something else, that too.
OPTIONS = {
    "plain": ({},),
    "scale and cap": ({"scale": 0.5, "logits_soft_cap": 2.0},),
    "window": ({"window": (3, 0)},),
    "slopes": ({"alibi_slopes": np.linspace(0.1, 0.8, HEADS)},),
    "relative bias": ({"relative_bias": _TABLE},),
    "buckets": ({"relative_bias": T5RelativeBias(_TABLE[:4], False, 9)},),
    "sinks": ({"sinks": np.linspace(-1.0, 1.0, HEADS)},),
    "bias": ({"bias": _BIAS}, {"bias": _BIAS[..., :TOKENS]}),
    "mask": ({"mask": _MASK}, {"mask": _MASK[..., :TOKENS]}),
    "prefix": ({"mask": masks.window(4, 0)},),
}


def turned(x, base=10000.0):
    """Rotary embedding of [batch, seqlen, heads, dim] from position 0 on, as complex numbers."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


@functools.cache
def whole(name, rotary=False, window=None):
    """out [batch, tokens, heads, value_dim] of a case of `OPTIONS` in float64."""
    query, key = (turned(x) if rotary else x for x in (QUERY, KEY))
    options = dict(OPTIONS[name][-1])
    if window is not None:
        options["window"] = (window - 1, 0)
    return reference.attention(query, key, VALUE, is_causal=True, **options)[0]


def laid_out(x, layout):
    """[batch, seqlen, heads, dim] in this layout, and back."""
    return x if layout == "BSHD" else np.swapaxes(x, 1, 2)


def in_parts(step, cache, layout="BSHD", parts=PARTS, array=np.asarray):
    """out of all tokens, ``parts`` of them at a time, by ``step(q, cache, k, v) -> (out, cache)``; and the cache at
    last."""
    outs, at = [], 0
    for count in parts:
        rows = [array(np.ascontiguousarray(laid_out(x[:, at : at + count], layout))) for x in (QUERY, KEY, VALUE)]
        out, cache = step(rows[0], cache, *rows[1:])
        outs.append(laid_out(np.asarray(out), layout))
        at += count
    return np.concatenate(outs, 1), cache
