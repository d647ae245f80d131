"""What one attention call is, for any framework."""

from __future__ import annotations

import typing

_FIRST_INPUTS = 5  # optional inputs that every custom call in a saved file counts
PAGE_ROWS = 16  # the size of a page of keys is a multiple of it (kPageRows in csrc/attention.h)
MAX_MASKS = 4  # boolean masks the kernels AND on the fly (kMaxMasks in csrc/attention.h)

_TENSORS = ("query", "key", "value", "bias", "query_lengths", "key_lengths", "seed", "query_offset", "blocks",
            "alibi_slopes", "relative_bias", "sinks", "block_table", "key_scales", "value_scales")  # fmt: skip
_TUPLES = ("masks", "intervals", "segments")  # of tensors
OPTIONAL_DIFFERENTIABLE = ("bias", "relative_bias", "sinks")  # in the order in which kernels and rules give gradients


def canonical(extents, layout):
    """(batch, heads, seqlen, dim) of the extents, or of the axes, of a query, key, value or output in ``layout``."""
    batch, second, third, dim = extents
    return (batch, third, second, dim) if layout == "BSHD" else (batch, second, third, dim)


def attributes(options) -> dict:
    """The options of a call as attributes of the kernels' operators and custom calls, in every framework.

    Those that came after the first files were saved are there only where a call has them: elsewhere the kernels' own
    defaults say the same.
    """
    named = {
        # Numbers travel as text: a float attribute would cut a float64 to float32.
        "scale": "" if options.scale is None else repr(options.scale),
        "dropout_rate": repr(options.dropout_rate),
        "window_left": options.window_left,
        "window_right": options.window_right,
        "bottom_right": options.bottom_right,
        "layout": options.layout,
        "allow_tf32": options.allow_tf32,
    }
    if options.logits_soft_cap is not None:
        named["soft_cap"] = repr(options.logits_soft_cap)
    if options.block_q:
        named["block_q"], named["block_k"] = options.block_q, options.block_k
    return named


def optional_inputs(arrays) -> dict:
    """The inputs that a call may lack, in the order of the kernels: lists by the attribute that counts them."""
    return {
        "num_bias": [] if arrays.bias is None else [arrays.bias],
        "num_masks": list(arrays.masks),
        "num_query_lengths": [] if arrays.query_lengths is None else [arrays.query_lengths],
        "num_key_lengths": [] if arrays.key_lengths is None else [arrays.key_lengths],
        "num_seed": [] if arrays.seed is None else [arrays.seed],
        "num_intervals": [] if arrays.intervals is None else list(arrays.intervals),
        "num_query_offset": [] if arrays.query_offset is None else [arrays.query_offset],
        "num_segments": [] if arrays.segments is None else list(arrays.segments),
        "num_blocks": [] if arrays.blocks is None else [arrays.blocks],
        "num_slopes": [] if arrays.alibi_slopes is None else [arrays.alibi_slopes],
        "num_relative_bias": [] if arrays.relative_bias is None else [arrays.relative_bias],
        "num_sinks": [] if arrays.sinks is None else [arrays.sinks],
    }


def cache_inputs(arrays) -> dict:
    """The same of those that only attention to caches has, behind the others: of AttnOps>Decode, without a gradient."""
    return {
        "num_block_table": [] if arrays.block_table is None else [arrays.block_table],
        "num_scales": [] if arrays.key_scales is None else [arrays.key_scales, arrays.value_scales],
    }


def reads_cache(arrays) -> bool:
    """Whether the call is one of AttnOps>Decode, of which the kernels have no gradient."""
    return arrays.block_table is not None or arrays.key.dtype != arrays.query.dtype


def given_inputs(arrays) -> dict:
    """Those of both that the kernels have always had, and those of the later ones that the call has."""
    lists = {**optional_inputs(arrays), **cache_inputs(arrays)}
    return {count: x for at, (count, x) in enumerate(lists.items()) if x or at < _FIRST_INPUTS}


def beyond_cuda(arrays) -> str | None:
    """What of a call the CUDA kernels do not have, as the reason why they cannot run it; None when they have all."""
    kept, dtype = arrays.key.dtype.name, arrays.query.dtype.name
    if kept != dtype and not (dtype == "float32" and kept in ("float16", "bfloat16")):
        return f"its kernels do not have keys of {kept} beside queries of {dtype}"
    return None


def cuda_sizes(options, arrays):
    """The extents that the library for CUDA is asked about (`kernels.cuda_unsupported_reason`); None for what is not known."""
    batch, num_heads, seqlen_q, head_dim = canonical(arrays.query.shape, options.layout)
    _, num_kv_heads, seqlen_k, value_dim = canonical(arrays.value.shape, options.layout)
    if arrays.block_table is not None:
        pages = arrays.block_table.shape[1]
        seqlen_k = None if pages is None or seqlen_k is None else pages * seqlen_k
    return batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim


NO_GRADIENT = (
    "attn_ops: attention to a cache is for generation, and has no gradient: train with scaled_dot_product_attention, or with "
    "the layers without cache="
)


class AttentionCall(typing.NamedTuple):
    """One attention call in the form that every implementation takes.

    ``query``, ``key`` and ``value`` have rank 4 in ``layout`` and one floating dtype; ``bias`` has that dtype or is
    float32, beside inputs of 16 bits; ``bias`` and ``masks`` (bool, at most four) have rank 4 with extents that are 1
    or full. ``scale`` None is 1/sqrt(head_dim). A window of -1 is unbounded; causal is ``window_right`` 0. Lengths are int32 [batch], ``seed`` is
    int64 [2] in TensorFlow and uint32 [4] in JAX (words of seed and offset, low ones first), present only with dropout.
    ``intervals`` is (key_begin, key_end), int32 [batch or 1, seqlen_q]: row i sees no other keys than key_begin <= j <
    key_end, which never move back along the rows; ``segments`` is (ids of the rows, ids of the keys), int32 [batch or 1,
    seqlen], and a row sees the keys of its own id; ``blocks`` is bool [batch or 1, num_heads or 1, blocks of ``block_q``
    rows, blocks of ``block_k`` keys], True where a row may see a key. ``query_offset`` is int32 [batch or 1], never with
    ``bottom_right``. ``alibi_slopes`` [batch or 1, num_heads], ``relative_bias`` [num_heads, 2 R + 1] and ``sinks``
    [num_heads] have ``lse_dtype``. With ``block_table``, int32 [batch, pages], key and value are pages [pages in all,
    page_size, num_kv_heads, dim] (in ``layout``) and not a batch: those of a sequence from n page_size on are the page
    block_table[b, n] (pages.py). Keys and values of a cache may have another dtype than the query, which is not float64
    then: float16, bfloat16 or float32, or int8 with ``key_scales`` and ``value_scales``, float32 like key and value without
    their last axis, by which they are multiplied.
    ``constant_bias`` tells a backward that nobody asks for the gradient of the bias. ``squeeze`` tells how many axes the
    caller's tensors lacked: 1 for rank 3, 2 for rank 2. A named tuple because it is made at every eager call, and a frozen
    dataclass costs several times as much.
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
    squeeze: int = 0
    return_lse: bool = False
    lse_dtype: typing.Any = None
    allow_tf32: bool = False
    intervals: tuple | None = None
    query_offset: typing.Any = None
    segments: tuple | None = None
    blocks: typing.Any = None
    block_q: int = 0
    block_k: int = 0
    logits_soft_cap: float | None = None
    alibi_slopes: typing.Any = None
    relative_bias: typing.Any = None
    sinks: typing.Any = None
    block_table: typing.Any = None
    key_scales: typing.Any = None
    value_scales: typing.Any = None
    constant_bias: bool = False

    def result_shapes(self):
        """The static shapes of out and lse in rank 4 and 3."""
        return [*self.query.shape[:3], self.value.shape[3]], list(canonical(self.query.shape, self.layout)[:3])

    def differentiable(self):
        """The inputs that have a gradient: query, key, value, and those of `OPTIONAL_DIFFERENTIABLE` that the call has."""
        found = [self.query, self.key, self.value]
        for x in (self.bias, self.relative_bias, self.sinks):
            if x is not None:
                found.append(x)
        return found

    def asked(self):
        """The positions among `differentiable` of those whose gradient somebody may ask for."""
        return [at for at in range(len(self.differentiable())) if at != 3 or self.bias is None or not self.constant_bias]

    def with_differentiable(self, inputs):
        """The call with these in their places."""
        query, key, value, *others = inputs
        others = iter(others)
        named = {name: next(others) for name in OPTIONAL_DIFFERENTIABLE if getattr(self, name) is not None}
        return self._replace(query=query, key=key, value=value, **named)

    def map_tensors(self, function):
        """The call with the ``function`` of each of its tensors."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors = {name: function(x) for name, x in tensors.items() if x is not None}
        tuples = {name: getattr(self, name) for name in _TUPLES}
        return self._replace(**tensors, **{name: tuple(map(function, x)) for name, x in tuples.items() if x is not None})

    def has_other_tensors(self):
        """Whether there are arrays beside query, key and value."""
        optional = (getattr(self, name) for name in _TENSORS[3:])
        return any(x is not None for x in optional) or any(getattr(self, name) for name in _TUPLES)

    def sees_the_first_key_alone(self):
        """Whether a single row stands at the first key and looks no further, which callers are warned of."""
        return self.window_right == 0 and not self.bottom_right and canonical(self.query.shape, self.layout)[2] == 1

    def set_result_shapes(self, out, lse, statistics=None):
        """Tells tensors of a TensorFlow graph what is known of their shapes; ``lse`` and ``statistics`` may be None."""
        out_shape, lse_shape = self.result_shapes()
        out.set_shape(out_shape)
        if statistics is not None:
            statistics.set_shape([*lse_shape, 2])
        if lse is not None:
            lse.set_shape(lse_shape)

    def added_axes(self, heads):
        """The axes that a result in the caller's rank lacks, where its heads are at ``heads``, in ascending order."""
        return (0, heads)[2 - self.squeeze :]

    def heads_axis(self):
        """Where query, key, value and out have their heads."""
        return 2 if self.layout == "BSHD" else 1


DEFAULT_ATTRIBUTES = attributes(AttentionCall(None, None, None))  # those of the operators too
