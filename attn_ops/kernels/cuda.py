"""libattn_ops_cuda.so from Python, without any framework: attention on arrays that are in device memory already.

    launch = cuda.Forward(q, k, v, out, statistics, window_right=0)
    launch(workspace, stream)                   # as often as wanted: nothing is looked at again
    cuda.forward(q, k, v, out, statistics, window_right=0, workspace=workspace)  # once

Arrays are PyTorch tensors, anything with `__cuda_array_interface__`, or `DeviceArray`. They must be on the device of
the current context. A launch does not wait: arrays and workspace must live until the stream is done with them.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from attn_ops.call.attention_call import MAX_MASKS, PAGE_ROWS
from attn_ops.kernels.cuda_types import (
    ABI,
    DTYPES,
    AttentionParams,
    BackwardParams,
    DeviceArray,
    StridedView,
    Workspace,
    describe,
)

__all__ = ["Backward", "CudaError", "DeviceArray", "Forward", "backward", "forward", "unavailable_reason"]

LIBRARY = Path(__file__).parents[1] / "libattn_ops_cuda.so"


class CudaError(RuntimeError):
    """A launch failed; `code` is the driver's CUresult, or negative where the library refused."""

    def __init__(self, text: str, code: int):
        super().__init__(f"attn_ops_cuda: {text} (code {code})")
        self.code = code


def unavailable_reason(device: int = -1) -> str | None:
    """Why nothing can be run on this device (below 0: that of the current context); None when it can."""
    library, reason = _library()
    return reason or library.attn_ops_cuda_unavailable_reason(device).decode() or None


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    if not LIBRARY.exists():
        return None, f"{LIBRARY} does not exist: the package was built without its CUDA kernels"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY} cannot be loaded: {error}"
    for name, result, arguments in (
        ("abi", ctypes.c_uint64, []),
        ("unavailable_reason", ctypes.c_char_p, [ctypes.c_int]),
        ("unsupported_reason", ctypes.c_char_p, [ctypes.c_void_p]),
        ("forward_workspace_bytes", ctypes.c_size_t, [ctypes.c_void_p]),
        ("backward_workspace_bytes", ctypes.c_size_t, [ctypes.c_void_p]),
        ("forward", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, Workspace]),
        ("backward", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, Workspace]),
        ("error_text", ctypes.c_char_p, []),
        ("set_most_decode_rows", None, [ctypes.c_int64]),
    ):
        function = getattr(library, f"attn_ops_cuda_{name}")
        function.restype, function.argtypes = result, arguments
    found = library.attn_ops_cuda_abi()
    if found != ABI:
        return None, f"{LIBRARY} was built from other headers (ABI {found:#x}, not {ABI:#x}): reinstall the package"
    return library, None


def set_most_decode_rows(rows: int) -> None:
    """Up to how many query rows of a key/value head the kernel for decoding takes (64 at first), in this process: the
    other forward kernels take any number. For measurements and tests."""
    _loaded().attn_ops_cuda_set_most_decode_rows(rows)


class _Launch:
    """A call whose arrays have been looked at and described once."""

    _name: str
    _params: ctypes.Structure
    _forward: AttentionParams

    def unsupported_reason(self) -> str | None:
        """Why the kernels do not take this call; None when they do."""
        return _loaded().attn_ops_cuda_unsupported_reason(ctypes.addressof(self._forward)).decode() or None

    def workspace_bytes(self) -> int:
        """What a launch must be lent: this many bytes in device memory, aligned to 16."""
        return getattr(_loaded(), f"attn_ops_cuda_{self._name}_workspace_bytes")(ctypes.addressof(self._params))

    def __call__(self, workspace=None, stream: int = 0) -> None:
        """Launches on `stream` (a CUstream as an integer; 0 is the default stream).

        Raises:
            CudaError: the library or the driver refused.
        """
        lent = Workspace()
        if workspace is not None:
            array = describe("workspace", workspace)
            if not array.is_contiguous:
                raise ValueError("workspace must be contiguous")
            lent = Workspace(array.pointer, array.bytes)
        library = _loaded()
        code = getattr(library, f"attn_ops_cuda_{self._name}")(ctypes.addressof(self._params), stream, lent)
        if code:
            raise CudaError(library.attn_ops_cuda_error_text().decode(), code)


class Forward(_Launch):
    """Attention of arrays that are there, into arrays that are there."""

    _name = "forward"

    def __init__(
        self,
        q,
        k,
        v,
        out,
        statistics,
        *,
        lse=None,
        layout: str = "BSHD",
        scale: float | None = None,
        window_left: int = -1,
        window_right: int = -1,
        bottom_right: bool = False,
        query_offset=None,
        intervals=None,
        masks: Sequence = (),
        segments=None,
        blocks=None,
        block_q: int = 1,
        block_k: int = 1,
        soft_cap: float | None = None,
        slopes=None,
        bias=None,
        relative_bias=None,
        sinks=None,
        query_lengths=None,
        key_lengths=None,
        dropout_rate: float = 0.0,
        dropout_words=None,
        allow_tf32: bool = False,
        block_table=None,
    ):
        """Describes the call.

        Args:
            q, k, v, out: `[batch, seqlen, heads, dim]`, or as `layout` says, of any strides. `out` is written. Beside float32
                queries k and v may be of 16 bits, as caches keep them; there is no backward then.
            statistics: contiguous float32 `[batch, num_heads, seqlen_q, 2]`; float64 for float64. Written: for each row
                the maximum of its scores and the sum of e^(score - maximum), both 0 where it sees no key.
            lse: like statistics but for the 2; written: maximum + log(sum). None where it is not wanted.
            layout: "BSHD" or "BHSD".
            scale: of the scores; by default 1/sqrt(head_dim).
            window_left, window_right: keys seen before and after a row's own; -1 is all, causal is (-1, 0).
            bottom_right: whether the last query is aligned with the last key, and not the first with the first.
            query_offset: where the first query stands among the keys, instead: contiguous int32 `[batch]` or `[1]`.
            intervals: the keys that a row sees, of those in its window: a pair (begin, end) of contiguous int32
                `[batch, seqlen_q]` or `[1, seqlen_q]`, which never move back along the rows.
            masks: up to 4 bool arrays that broadcast to `[batch, num_heads, seqlen_q, seqlen_k]`; true = may see.
            segments: a pair of contiguous int32, the ids of the rows `[batch, seqlen_q]` and of the keys `[batch, seqlen_k]`, or
                `[1, ...]`: a row sees the keys of its own id.
            blocks, block_q, block_k: bool `[batch, num_heads, blocks of block_q rows, blocks of block_k keys]`, of which the first
                two extents may be 1: true where a row may see a key.
            soft_cap: a number > 0: scaled scores s become soft_cap tanh(s / soft_cap). None is no cap.
            slopes: contiguous float32 `[batch, num_heads]` or `[1, num_heads]`, float64 for float64, of absolute value up
                to 2^64; times the distance from a row's own place to a key they are added to the scores.
            bias: added to the scores, of the dtype of q or float32, broadcast likewise.
            relative_bias: contiguous float32 `[num_heads, 2 R + 1]`, float64 for float64: column R + clip(j - own, -R, R) is added to
                the score of key j, for a row that stands at `own` among the keys.
            sinks: contiguous `[num_heads]` of the dtype of statistics: logits that join the sums of a head's rows, and no value.
            query_lengths, key_lengths: contiguous int32 `[batch]`.
            dropout_rate, dropout_words: probability of dropping a weight; contiguous uint64 `[2]`: seed and offset.
            allow_tf32: whether products of float32 may be made in TF32.
            block_table: contiguous int32 `[batch, pages]`; k and v are then pages `[pages in all, page_size, heads, dim]`,
                page_size a multiple of 16, of which a sequence has those that its row of the table names. Entries that a
                length reaches are read as they are.
        """
        arrays = {"q": q, "k": k, "v": v, "out": out}
        axes = _axes(layout)
        arrays = {name: _tensor(name, array, axes) for name, array in arrays.items()}
        p = self._params = self._forward = AttentionParams()
        p.batch, p.seqlen_q, p.num_heads, p.head_dim = arrays["q"].shape
        entries, p.seqlen_k, p.num_kv_heads, p.value_dim = arrays["v"].shape
        key_shape = p.batch, p.seqlen_k
        if block_table is not None:
            p.page_size = p.seqlen_k
            if p.page_size == 0 or p.page_size % PAGE_ROWS:
                raise ValueError(f"the size of a page ({p.page_size}) must be a multiple of {PAGE_ROWS}")
            p.block_table_stride = describe("block_table", block_table).shape[-1]
            p.block_table = _dense("block_table", block_table, "int32", (p.batch, p.block_table_stride))
            key_shape, p.seqlen_k = (entries, p.page_size), p.page_size * p.block_table_stride
        dtype = arrays["q"].dtype
        if dtype not in DTYPES or dtype == "bool":
            raise TypeError(f"q must be float32, float64, float16 or bfloat16, not {dtype}")
        if p.num_kv_heads == 0 or p.num_heads % p.num_kv_heads:
            raise ValueError(f"num_heads ({p.num_heads}) must be a multiple of num_kv_heads ({p.num_kv_heads})")
        kept = arrays["k"].dtype if dtype == "float32" and arrays["k"].dtype in ("float16", "bfloat16") else dtype
        _require(arrays["k"], "k", kept, (*key_shape, p.num_kv_heads, p.head_dim))
        _require(arrays["v"], "v", kept, (*key_shape, p.num_kv_heads, p.value_dim))
        _require(arrays["out"], "out", dtype, (p.batch, p.seqlen_q, p.num_heads, p.value_dim))
        p.dtype = DTYPES.index(dtype)
        for name, array in arrays.items():
            setattr(p, name, _view(array))
        exact, rows = _accumulator_of(dtype), (p.batch, p.num_heads, p.seqlen_q)
        p.statistics = _dense("statistics", statistics, exact, (*rows, 2))
        if lse is not None:
            p.lse = _dense("lse", lse, exact, rows)
        if p.head_dim == 0:
            raise ValueError("head_dim must be at least 1")
        p.scale = 1 / math.sqrt(p.head_dim) if scale is None else float(scale)
        if not math.isfinite(p.scale):
            raise ValueError(f"scale ({scale}) must be finite")
        if soft_cap is not None:
            p.soft_cap = float(soft_cap)
            if not 0 < p.soft_cap < math.inf:
                raise ValueError(f"soft_cap ({soft_cap}) must be more than 0 and finite")
        if slopes is not None:
            p.slopes, p.slopes_stride = self._by_batch("slopes", slopes, p.num_heads, dtype=exact)
        if min(window_left, window_right) < -1:
            raise ValueError(f"window_left ({window_left}) and window_right ({window_right}) must be -1 or more")
        p.mask.window_left, p.mask.window_right, p.mask.bottom_right = window_left, window_right, bottom_right
        if query_offset is not None:
            if bottom_right:
                raise ValueError("query_offset and bottom_right both say where the first query stands: give one")
            p.mask.query_offset, p.mask.offset_stride = self._by_batch("query_offset", query_offset)
        if intervals is not None:
            begin, end = intervals
            p.mask.key_begin, stride = self._by_batch("key_begin", begin, p.seqlen_q)
            p.mask.key_end, p.mask.interval_stride = self._by_batch("key_end", end, p.seqlen_q)
            if stride != p.mask.interval_stride:
                raise ValueError("key_begin and key_end must have one shape")
        if len(masks) > MAX_MASKS:
            raise ValueError(f"masks: there may be {MAX_MASKS}, got {len(masks)}")
        p.num_masks = len(masks)
        for index, mask in enumerate(masks):
            p.masks[index] = self._score_shaped(f"masks[{index}]", mask, "bool")
        if segments is not None:
            for ids, name, array, extent in zip(
                (p.query_ids, p.key_ids), ("query_ids", "key_ids"), segments, (p.seqlen_q, p.seqlen_k), strict=True
            ):
                ids.data, ids.stride = self._by_batch(name, array, extent)
        if blocks is not None:
            if min(block_q, block_k) < 1:
                raise ValueError(f"block_q ({block_q}) and block_k ({block_k}) must be at least 1")
            p.block_q, p.block_k = block_q, block_k
            counts = -(-p.seqlen_q // block_q), -(-p.seqlen_k // block_k)
            if describe("blocks", blocks).shape[2:] != counts:
                raise ValueError(f"blocks must have {counts} blocks, but has shape {describe('blocks', blocks).shape}")
            p.blocks = self._broadcast("blocks", blocks, (p.batch, p.num_heads, *counts), "bool")
        if bias is not None:
            p.bias = self._score_shaped("bias", bias, dtype, _accumulator_of(dtype))
        if relative_bias is not None:
            columns = describe("relative_bias", relative_bias).shape[-1]
            if columns % 2 == 0:
                raise ValueError(f"relative_bias must have an odd number of distances, not {columns}")
            p.relative_bias = _dense("relative_bias", relative_bias, exact, (p.num_heads, columns))
            p.relative_reach = columns // 2
        if sinks is not None:
            p.sinks = _dense("sinks", sinks, exact, (p.num_heads,))
        if query_lengths is not None:
            p.query_lengths = _dense("query_lengths", query_lengths, "int32", (p.batch,))
        if key_lengths is not None:
            p.key_lengths = _dense("key_lengths", key_lengths, "int32", (p.batch,))
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate ({dropout_rate}) must be at least 0 and less than 1")
        p.dropout_rate, p.allow_tf32 = dropout_rate, allow_tf32
        if dropout_words is not None:
            p.dropout_words = _dense("dropout_words", dropout_words, "uint64", (2,))
        elif dropout_rate > 0:
            raise ValueError("dropout_rate > 0 needs dropout_words")

    def _by_batch(self, name, array, *rest, dtype="int32") -> tuple[int, int]:
        """The address of contiguous [batch or 1, *rest], and from one entry of the batch to the next."""
        entries = describe(name, array).shape[:1]
        shape = entries if entries == (1,) else (self._forward.batch,)
        return _dense(name, array, dtype, (*shape, *rest)), 0 if shape == (1,) else math.prod(rest)

    def _score_shaped(self, name, array, *dtypes) -> StridedView:
        p = self._forward
        return self._broadcast(name, array, (p.batch, p.num_heads, p.seqlen_q, p.seqlen_k), *dtypes)

    @staticmethod
    def _broadcast(name, array, full, *dtypes) -> StridedView:
        array = describe(name, array)
        if array.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(dict.fromkeys(dtypes))}, not {array.dtype}")
        missing = 4 - len(array.shape)
        shape, strides = (1,) * missing + array.shape, (0,) * missing + array.strides
        if missing < 0 or any(extent not in (1, wanted) for extent, wanted in zip(shape, full, strict=True)):
            raise ValueError(f"{name} must broadcast to {full}, but has shape {array.shape}")
        strides = tuple(0 if extent == 1 else stride for extent, stride in zip(shape, strides, strict=True))
        return _view(DeviceArray(array.pointer, array.dtype, shape, strides))


class Backward(_Launch):
    """The gradients of a `Forward`, from its `out` and `statistics`, into arrays that are there."""

    _name = "backward"

    def __init__(
        self,
        q,
        k,
        v,
        out,
        statistics,
        d_out,
        dq,
        dk,
        dv,
        *,
        d_lse=None,
        d_bias=None,
        d_relative_bias=None,
        d_sinks=None,
        layout="BSHD",
        **options,
    ):
        """Describes the call.

        Args:
            q, k, v, out, statistics, layout, options: as of the forward call, whose `out` and `statistics` are read.
            d_out: the gradient of `out`, of its shape.
            dq, dk, dv: written; of the shapes of q, k and v.
            d_lse: the gradient of `lse`, like it; None for zero.
            d_bias: written; contiguous, of the shape and dtype of the bias. None where it is not wanted.
            d_relative_bias, d_sinks: the same of the table by distance and of the sinks.
        """
        forward = Forward(q, k, v, out, statistics, layout=layout, **options)
        b = self._params = BackwardParams(forward=forward._forward)
        p = self._forward = b.forward
        dtype = DTYPES[p.dtype]
        shapes = {
            "d_out": (d_out, (p.batch, p.seqlen_q, p.num_heads, p.value_dim)),
            "dq": (dq, (p.batch, p.seqlen_q, p.num_heads, p.head_dim)),
            "dk": (dk, (p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim)),
            "dv": (dv, (p.batch, p.seqlen_k, p.num_kv_heads, p.value_dim)),
        }
        for name, (array, shape) in shapes.items():
            array = _tensor(name, array, _axes(layout))
            _require(array, name, dtype, shape)
            setattr(b, name, _view(array))
        if d_lse is not None:
            b.d_lse = _dense("d_lse", d_lse, _accumulator_of(dtype), (p.batch, p.num_heads, p.seqlen_q))
        if d_bias is not None:
            if options.get("bias") is None:
                raise ValueError("d_bias without a bias")
            shape = describe("bias", options["bias"]).shape
            b.d_bias = _dense("d_bias", d_bias, DTYPES[p.bias.dtype], shape)
            b.d_bias_shape[:] = (1,) * (4 - len(shape)) + shape
        if d_relative_bias is not None:
            if options.get("relative_bias") is None:
                raise ValueError("d_relative_bias without relative_bias")
            shape = describe("relative_bias", options["relative_bias"]).shape
            b.d_relative_bias = _dense("d_relative_bias", d_relative_bias, _accumulator_of(dtype), shape)
        if d_sinks is not None:
            if options.get("sinks") is None:
                raise ValueError("d_sinks without sinks")
            b.d_sinks = _dense("d_sinks", d_sinks, _accumulator_of(dtype), (p.num_heads,))


def forward(q, k, v, out, statistics, *, workspace=None, stream: int = 0, **options) -> None:
    """One launch of `Forward`."""
    Forward(q, k, v, out, statistics, **options)(workspace, stream)


def backward(q, k, v, out, statistics, d_out, dq, dk, dv, *, workspace=None, stream: int = 0, **options) -> None:
    """One launch of `Backward`."""
    Backward(q, k, v, out, statistics, d_out, dq, dk, dv, **options)(workspace, stream)


def _loaded() -> ctypes.CDLL:
    library, reason = _library()
    if library is None:
        raise RuntimeError(reason)
    return library


def _accumulator_of(dtype: str) -> str:
    """See csrc/attention.h."""
    return "float64" if dtype == "float64" else "float32"


def _axes(layout: str) -> tuple[int, ...]:
    axes = {"BSHD": (0, 1, 2, 3), "BHSD": (0, 2, 1, 3)}.get(layout)
    if axes is None:
        raise ValueError(f"layout must be 'BSHD' or 'BHSD', got {layout!r}")
    return axes


def _tensor(name: str, array, axes: tuple[int, ...]) -> DeviceArray:
    """As `[batch, seqlen, heads, dim]`, which for BHSD memory is only other strides."""
    array = describe(name, array)
    if len(array.shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions, but has shape {array.shape}")
    shape, strides = (tuple(values[axis] for axis in axes) for values in (array.shape, array.strides))
    return DeviceArray(array.pointer, array.dtype, shape, strides)


def _require(array: DeviceArray, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {array.dtype}")
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have the extents {tuple(shape)}, but has {array.shape}")


def _dense(name: str, array, dtype: str, shape: tuple[int, ...]) -> int:
    """The pointer of a contiguous array."""
    array = describe(name, array)
    _require(array, name, dtype, shape)
    if not array.is_contiguous:
        raise ValueError(f"{name} must be contiguous, but has strides {array.strides}")
    return array.pointer


def _view(array: DeviceArray) -> StridedView:
    return StridedView(array.pointer, DTYPES.index(array.dtype), (ctypes.c_int64 * 4)(*array.strides))
