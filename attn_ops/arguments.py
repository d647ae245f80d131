"""The arguments of the attention functions: checked, promoted and brought to one form.

Everything that can be known about a call without running it is checked here, before any op runs, because TensorFlow
keeps the inputs of failing eager ops alive. Unknown dimensions and ranks pass; the ops check those again.

The rules are the same for TensorFlow and JAX: ``xp`` is the module with the few functions of either that they need,
`tensors` or `jax.tensors`.
"""

from __future__ import annotations

import typing

from . import arrays, options, precision
from .masks import Mask

MAX_MASKS = 4  # boolean masks the kernels AND on the fly (kMaxMasks in csrc/attention.h)


class AttentionCall(typing.NamedTuple):
    """One attention call in the form that every implementation takes.

    ``query``, ``key`` and ``value`` have rank 4 in ``layout`` and one floating dtype; ``bias`` has that dtype or is
    float32, beside inputs of 16 bits; ``bias`` and ``masks`` (bool, at most four) have rank 4 with extents that are 1 or full. ``scale`` None is
    1/sqrt(head_dim). A window of -1 is unbounded; causal is ``window_right`` 0. Lengths are int32 [batch], ``seed`` is
    int64 [2] in TensorFlow and uint32 [4] in JAX (words of seed and offset, low ones first), present only with dropout.
    ``squeeze`` tells that the caller's tensors had rank 3. A named tuple because it is made at every eager call, and a
    frozen dataclass costs several times as much.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    bias: typing.Any = None
    masks: tuple = ()
    scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    query_lengths: typing.Any = None
    key_lengths: typing.Any = None
    dropout_rate: float = 0.0
    seed: typing.Any = None
    layout: str = "BSHD"
    squeeze: bool = False
    return_lse: bool = False
    lse_dtype: typing.Any = None
    allow_tf32: bool = False

    def result_shapes(self):
        """The static shapes of out and lse in rank 4 and 3."""
        batch, second, third, _ = self.query.shape
        lse = [batch, third, second] if self.layout == "BSHD" else [batch, second, third]
        return [batch, second, third, self.value.shape[3]], lse

    def set_result_shapes(self, out, lse, statistics):
        """Tells tensors of a TensorFlow graph what is known of their shapes; ``lse`` may be None."""
        out_shape, lse_shape = self.result_shapes()
        out.set_shape(out_shape)
        statistics.set_shape([*lse_shape, 2])
        if lse is not None:
            lse.set_shape(lse_shape)


def normalize(
    xp,
    name,
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    causal_alignment="top_left",
    window=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    dropout_rate=0.0,
    dropout_seed=None,
    layout="BSHD",
    return_lse=False,
):
    """The `AttentionCall` for the public arguments of `scaled_dot_product_attention`, where they are documented.

    ``xp`` is the framework, ``name`` the function that errors name. Raises TypeError for a wrong kind or dtype and
    ValueError for a wrong value or shape.
    """
    if layout not in ("BSHD", "BHSD"):
        raise ValueError(f"{name}: layout must be 'BSHD' or 'BHSD', got {layout!r}")
    query, key, value, squeeze, *extents = _inputs(xp, name, query, key, value, 2 if layout == "BSHD" else 1)
    dims = _score_dims(name, layout, *extents)
    dtype = query.dtype

    window = options.window(name, window)
    bottom_right = options.bottom_right(name, causal_alignment)
    masks = ()
    if mask is not None:
        structure, masks = split_masks(name, mask)
        if structure is not None:
            structure = _both(
                name,
                structure,
                Mask(
                    is_causal=is_causal,
                    causal_alignment=causal_alignment,
                    window=window,
                    query_lengths=arrays.lengths(xp, name, "query_seq_lengths", query_seq_lengths, *dims[0::2]),
                    key_lengths=arrays.lengths(xp, name, "key_value_seq_lengths", key_value_seq_lengths, *dims[0::3]),
                ),
            )
            masks += structure.tensors()
            window, is_causal = (structure.window_left, structure.window_right), structure.is_causal
            bottom_right = structure.bottom_right
            query_seq_lengths, key_value_seq_lengths = structure.query_lengths, structure.key_lengths
        masks = _at_most_four(xp, [arrays.boolean(xp, name, m, dims) for m in masks])
    window_left, window_right = window
    if is_causal:
        window_right = 0

    if bias is not None:
        bias = arrays.bias(xp, name, bias, dims, dtype)
    if scale is not None and not options.is_number(scale):
        query = arrays.times_tensor(xp, name, query, scale)
        scale = 1.0
    dropout_rate = options.dropout_rate(name, dropout_rate)
    return AttentionCall(
        query,
        key,
        value,
        bias,
        masks,
        options.scale(name, scale),
        window_left,
        window_right,
        bottom_right,
        arrays.lengths(xp, name, "query_seq_lengths", query_seq_lengths, *dims[0::2]),
        arrays.lengths(xp, name, "key_value_seq_lengths", key_value_seq_lengths, *dims[0::3]),
        dropout_rate,
        arrays.seed(xp, name, dropout_seed) if dropout_rate else None,
        layout,
        squeeze,
        bool(return_lse),
        xp.float64 if dtype is xp.float64 else xp.float32,
        precision.allow_tf32(),
    )


def _inputs(xp, name, query, key, value, heads_axis):
    """The three inputs with one dtype and rank 4, whether they had rank 3, and the extents of each."""
    query = xp.as_tensor(name, "query", query)
    key = xp.as_tensor(name, "key", key)
    value = xp.as_tensor(name, "value", value)
    dtypes = query.dtype, key.dtype, value.dtype
    if dtypes[0] is not dtypes[1] or dtypes[0] is not dtypes[2] or dtypes[0] not in xp.FLOATS:
        dtype = _promoted(xp, name, dtypes)
        query, key, value = (xp.cast(x, dtype) for x in (query, key, value))
    q, k, v = xp.extents(query), xp.extents(key), xp.extents(value)
    if q and k and v and len(q) == len(k) == len(v) == 4:
        return query, key, value, False, q, k, v
    known = {len(extents) for extents in (q, k, v) if extents is not None}
    if len(known) > 1 or not known <= {3, 4}:
        raise ValueError(
            f"{name}: query, key and value must all have rank 4, or all rank 3 for a single head, got shapes "
            + _shapes(q, k, v)
        )
    rank = known.pop() if known else 4

    def with_heads(x, extents):
        if extents is None:
            x = xp.ensure_rank(x, rank, f"{name}_needs_rank_{rank}")
        return x if rank == 4 else xp.expand_dims(x, heads_axis)

    query, key, value = (with_heads(x, extents) for x, extents in ((query, q), (key, k), (value, v)))
    return query, key, value, rank == 3, *map(xp.extents, (query, key, value))


def _promoted(xp, name, dtypes):
    """The common dtype of Keras's promotion: the wider one, and float32 for float16 with bfloat16."""
    for what, dtype in zip(("query", "key", "value"), dtypes):
        if dtype not in xp.FLOATS:
            raise TypeError(f"{name}: {what} must be float16, bfloat16, float32 or float64, got {dtype.name}")
    if xp.float64 in dtypes:
        return xp.float64
    return dtypes[0] if len(set(dtypes)) == 1 else xp.float32


def _score_dims(name, layout, q, k, v):
    """(batch, num_heads, seqlen_q, seqlen_k), None where unknown, after checking the extents against each other."""
    if layout == "BSHD":
        batch, seqlen_q, num_heads, head_dim = q
        batch_k, seqlen_k, num_kv_heads, head_dim_k = k
        batch_v, seqlen_v, num_kv_heads_v, value_dim = v
    else:
        batch, num_heads, seqlen_q, head_dim = q
        batch_k, num_kv_heads, seqlen_k, head_dim_k = k
        batch_v, num_kv_heads_v, seqlen_v, value_dim = v

    def agree(rule, *extents):
        known = [n for n in extents if n is not None]
        if known and known.count(known[0]) != len(known):
            got = ", ".join("?" if n is None else str(n) for n in extents)
            raise ValueError(f"{name}: {rule}, got {got} ({_shapes(q, k, v)}, layout {layout})")
        return known[0] if known else None

    if not (batch == batch_k == batch_v and seqlen_k == seqlen_v and num_kv_heads == num_kv_heads_v
            and head_dim == head_dim_k):  # fmt: skip
        batch = agree("query, key and value must have the same batch size", batch, batch_k, batch_v)
        seqlen_k = agree("key and value must have the same length", seqlen_k, seqlen_v)
        num_kv_heads = agree("key and value must have the same number of heads", num_kv_heads, num_kv_heads_v)
        head_dim = agree("query and key must have the same head_dim", head_dim, head_dim_k)
    if head_dim == 0:
        raise ValueError(f"{name}: head_dim must be at least 1, got 0 ({_shapes(q, k, v)}, layout {layout})")
    if num_heads != num_kv_heads and num_heads is not None and num_kv_heads is not None:
        if num_kv_heads == 0 or num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads}) "
                f"({_shapes(q, k, v)}, layout {layout})"
            )
    # A dimension of 0 does not save an array whose other dimensions overflow: partial products are taken in any order.
    rows = 8 * (batch or 1) * (num_heads or 1) * (seqlen_q or 1)
    if rows * (value_dim or 1) >= 2**63 or rows * (seqlen_k or 1) >= 2**63:
        raise ValueError(
            f"{name}: the sizes of output and scores must not overflow 64 bits ({_shapes(q, k, v)}, "
            f"layout {layout})"
        )
    return batch, num_heads, seqlen_q, seqlen_k


def _shapes(q, k, v):
    return f"query {arrays.shape_text(q)}, key {arrays.shape_text(k)}, value {arrays.shape_text(v)}"


def split_masks(name, mask):
    """The structured part of ``mask`` (a Mask or None) and the tuple of boolean arrays beside it."""
    structure, arrays = None, []
    for item in mask if isinstance(mask, (list, tuple)) else (mask,):
        if isinstance(item, Mask):
            structure = item if structure is None else _both(name, structure, item)
        elif item is not None:
            arrays.append(item)
    return structure, tuple(arrays)


def _both(name, mask, other):
    try:
        return mask & other
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _at_most_four(xp, masks):
    """The masks, with those past the fourth ANDed together into it."""
    first = masks[: MAX_MASKS - 1]
    rest = masks[MAX_MASKS - 1 :]
    while len(rest) > 1:
        rest = [xp.logical_and(rest[0], rest[1]), *rest[2:]]
    return (*first, *rest)
