"""The plain formula in one precision: what the accuracy rule measures implementations against.

Matmul, softmax and matmul on whole matrices, every result rounded to the dtype, as a straightforward program in that
dtype would have it: sums themselves are exact to float32 for 16-bit dtypes, as matrix units accumulate.
"""

import numpy as np


def plain_attention(query, key, value, dtype, d_out=None, *, bias=None, visible=None, scale=None):
    """out, or (out, dq, dk, dv) when d_out is given, all of `dtype`, in the layout `[batch, seqlen, heads, dim]`.

    `bias` and `visible` (bool) broadcast to `[batch, num_heads, seqlen_q, seqlen_k]`; every row must see a key.
    """
    dtype = np.dtype(dtype)
    wide = np.result_type(dtype, np.float32) if dtype.kind == "f" else np.float32

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

    s = rounded(matmul(q, k.swapaxes(-1, -2)) * scale)
    if bias is not None:
        s = rounded(s + np.asarray(bias).astype(wide))
    if visible is not None:
        s = np.where(visible, s, -np.inf)
    e = rounded(np.exp(s - s.max(axis=-1, keepdims=True)))
    p = rounded(e / rounded(e.sum(axis=-1, keepdims=True)))
    out = matmul(p, v)
    if d_out is None:
        return out.swapaxes(1, 2).astype(dtype)

    d_out = heads_first(d_out)
    dp = matmul(d_out, v.swapaxes(-1, -2))
    ds = rounded(p * rounded(dp - rounded((p * dp).sum(axis=-1, keepdims=True))))
    dq = rounded(matmul(ds, k) * scale)
    dk = rounded(matmul(ds.swapaxes(-1, -2), q) * scale)
    dv = matmul(p.swapaxes(-1, -2), d_out)

    def sum_groups(x):
        return rounded(x.reshape(x.shape[0], -1, group_size, *x.shape[2:]).sum(axis=2))

    return tuple(x.swapaxes(1, 2).astype(dtype) for x in (out, dq, sum_groups(dk), sum_groups(dv)))
