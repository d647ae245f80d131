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
    products=np.matmul,
):
    """`out`, `lse` and `maximum`, and with d_out also `dq`, `dk`, `dv` and `ds`, by name.

    As `plain_attention`, and rows may see no key. `factors` multiply the weights (dropout). `products` computes those
    over a head's dimensions. A finite score that would
    be beyond the range of the dtype is its largest finite number. `lse`, `maximum` (`[batch, num_heads, seqlen_q]`) and `ds`,
    the gradient of the scores, are of the dtype that sums have.
    """
    dtype = np.dtype(dtype)
    wide = np.result_type(dtype, np.float32) if dtype.kind == "f" else np.float32
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
        if bias is not None:
            s = rounded(s + np.asarray(bias).astype(wide))
            s = np.clip(s, -largest, largest)
        if visible is not None:
            s = np.where(visible, s, -np.inf)
        maximum = s.max(axis=-1, keepdims=True, initial=-np.inf)
        base = np.where(maximum == -np.inf, 0, maximum)
        e = rounded(np.exp(s - base))
        total = rounded(e.sum(axis=-1, keepdims=True))
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
        dq = rounded(matmul(ds, k) * scale)
        dk = rounded(matmul(ds.swapaxes(-1, -2), q) * scale)
        dv = matmul(rounded(p * z).swapaxes(-1, -2), d_out)

    def sum_groups(x):
        return rounded(x.reshape(x.shape[0], x.shape[1] // group_size, group_size, *x.shape[2:]).sum(axis=2))

    gradients = {"dq": dq, "dk": sum_groups(dk), "dv": sum_groups(dv)}
    results |= {name: x.swapaxes(1, 2).astype(dtype) for name, x in gradients.items()}
    return results | {"ds": ds}
