"""The plain formula in one precision: what the accuracy rule measures implementations against.

Matmul, softmax and matmul on whole matrices, every result rounded to the dtype, as a straightforward program in that
dtype would have it: sums themselves are exact to float32 for 16-bit dtypes, as matrix units accumulate.
"""

import numpy as np


def plain_attention(query, key, value, dtype, d_out=None, *, bias=None, visible=None, scale=None):
    """out, or (out, dq, dk, dv) when d_out is given, all of `dtype`, in the layout `[batch, seqlen, heads, dim]`.

    `bias` and `visible` (bool) broadcast to `[batch, num_heads, seqlen_q, seqlen_k]`; every row must see a key.
    """
    results = plain_results(query, key, value, dtype, d_out, bias=bias, visible=visible, scale=scale)
    return results["out"] if d_out is None else tuple(results[name] for name in ("out", "dq", "dk", "dv"))


def serial_products(a, b):
    """`a @ b`, one term after the other."""
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for i in range(a.shape[-1]):
        total += a[..., i, None] * b[..., i, None, :]
    return total


def serial_sums(x):
    """The sums over the last axis, kept: one term after the other in blocks of 128, whose sums are added."""
    blocks = [np.cumsum(x[..., at : at + 128], axis=-1)[..., -1] for at in range(0, x.shape[-1], 128)]
    return sum(blocks, np.zeros(x.shape[:-1], x.dtype))[..., None]


def pairwise_sums(x):
    """The same as NumPy takes them."""
    return x.sum(axis=-1, keepdims=True)


def plain_results(
    query,
    key,
    value,
    dtype,
    d_out=None,
    d_lse=None,
    *,
    bias=None,
    visible=None,
    factors=None,
    scale=None,
    cap=None,
    slopes=None,
    relative=None,
    sinks=None,
    products=np.matmul,
    sums=pairwise_sums,
    promotes=False,
    nudge=0.0,
):
    """`out`, `lse` and `maximum`, and with d_out also `dq`, `dk`, `dv`, `ds` and `d_sinks`, by name.

    As `plain_attention`, and rows may see no key. `factors` multiply the weights (dropout). `slopes` are a slope and a
    distance, whose product is added, and `relative` is a second bias; both, like `sinks` `[num_heads, 1]`, broadcast.
    `products` computes those over a head's dimensions, `sums` those of a row's weights. A finite score that would be beyond the range of the dtype is its
    largest finite number. `lse`, `maximum` (`[batch, num_heads, seqlen_q]`), `ds`, the gradient of the scores, and
    `d_sinks` `[num_heads]` are of the dtype that sums have. With ``promotes`` scores stay of that dtype once something is added
    to them, as what is added has it. Scores are off by ``nudge`` of themselves before something is added.
    """
    dtype = np.dtype(dtype)
    wide = np.dtype(np.result_type(dtype, np.float32) if dtype.kind == "f" else np.float32)
    largest = np.finfo(wide).max

    def rounded(x):
        return x.astype(dtype).astype(wide)

    def matmul(a, b):
        return rounded(np.matmul(a, b))

    def heads_first(x):
        return np.swapaxes(np.asarray(x).astype(wide), 1, 2)

    q, k, v = (heads_first(x) for x in (query, key, value))
    group_size = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group_size, axis=1) for x in (k, v))
    scale = rounded(np.asarray(1 / np.sqrt(q.shape[-1]) if scale is None else scale))

    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        s = rounded(rounded(products(q, k.swapaxes(-1, -2))) * scale)
        slope_of_cap = 1
        if cap is not None:
            capped = rounded(np.tanh(rounded(s / wide.type(cap))))
            s, slope_of_cap = rounded(capped * wide.type(cap)), rounded(1 - capped * capped)
        if slopes is not None:
            slopes = rounded(np.multiply(*(np.asarray(x).astype(wide) for x in slopes)))
        for term in (slopes, relative, bias):
            if term is not None:
                s = s * wide.type(1 + nudge) + np.asarray(term).astype(wide)
                s = np.clip(s if promotes else rounded(s), -largest, largest)
        if visible is not None:
            s = np.where(visible, s, -np.inf)
        maximum = s.max(axis=-1, keepdims=True, initial=-np.inf)
        sink = -np.inf if sinks is None else np.asarray(sinks).astype(wide)[..., None]
        maximum = np.maximum(maximum, sink)
        base = np.where(maximum == -np.inf, 0, maximum)
        e, e_sink = rounded(np.exp(s - base)), rounded(np.exp(sink - base))
        total = rounded(sums(e) + e_sink)
        p = rounded(e / np.where(total == 0, 1, total))
        z = 1 if factors is None else np.asarray(factors).astype(wide)
        out = matmul(rounded(p * z), v)
        lse = (base + np.log(total))[..., 0]
        results = {"out": out.swapaxes(1, 2).astype(dtype), "lse": lse, "maximum": base[..., 0]}
        if d_out is None:
            return results

        d_out = heads_first(d_out)
        dp = rounded(rounded(products(d_out, v.swapaxes(-1, -2))) * z)
        delta = rounded((p * dp).sum(axis=-1, keepdims=True))
        if d_lse is not None:
            delta = delta - np.asarray(d_lse).astype(wide)[..., None]
        ds = rounded(p * rounded(dp - delta))
        dt = rounded(ds * slope_of_cap)
        dq = rounded(matmul(dt, k) * scale)
        dk = rounded(matmul(dt.swapaxes(-1, -2), q) * scale)
        d_sinks = rounded(e_sink / np.where(total == 0, 1, total) * -delta).sum((0, 2, 3))
        dv = matmul(rounded(p * z).swapaxes(-1, -2), d_out)

    def sum_groups(x):
        return rounded(x.reshape(x.shape[0], x.shape[1] // group_size, group_size, *x.shape[2:]).sum(axis=2))

    gradients = {"dq": dq, "dk": sum_groups(dk), "dv": sum_groups(dv)}
    results |= {name: x.swapaxes(1, 2).astype(dtype) for name, x in gradients.items()}
    return results | {"ds": ds, "d_sinks": d_sinks}
