"""merge_attention for TensorFlow."""

from __future__ import annotations

from attn_ops.call import merge
from attn_ops.tensorflow import xp


def merge_attention(outs, lses, *, layout="BSHD"):
    """What attention to parts of the keys makes together: the same rows, each part with other keys.

    Any number of parts, in any order; the gradient reaches outs and lses.

    Args:
        outs: a list of what `scaled_dot_product_attention` returned for each part: [batch, seqlen_q, num_heads,
            value_dim] (in ``layout``), or rank 3 or 2, without heads and batch. One floating dtype.
        lses: a list of what it returned beside them with return_lse: [batch, num_heads, seqlen_q], or rank 2 or 1.
        layout: "BSHD" or "BHSD", of outs of rank 4.

    Returns:
        (out, lse), of the same shapes and dtypes. A row that no part showed a key has out 0 and lse -inf. Sums are of
        lse's dtype. Of a sink, one part is to know.

    Raises:
        TypeError, ValueError: lists of different lengths or of none, dtypes or shapes that do not fit.
    """
    return merge.merge(xp, "merge_attention", outs, lses, layout)
