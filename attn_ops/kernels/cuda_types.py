"""The structures of csrc/attention.h as ctypes has them, and arrays on a device as attn_ops sees them."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence

from attn_ops.call.attention_call import MAX_MASKS

DTYPES = ("float32", "float64", "float16", "bfloat16", "bool")  # in the order of the enumeration DType
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int32": 4, "uint64": 8, "uint8": 1}


class StridedView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("stride", ctypes.c_int64 * 4)]


class Mask(ctypes.Structure):
    _fields_ = [
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("bottom_right", ctypes.c_bool),
        ("query_offset", ctypes.c_void_p),
        ("key_begin", ctypes.c_void_p),
        ("key_end", ctypes.c_void_p),
        ("offset_stride", ctypes.c_int64),
        ("interval_stride", ctypes.c_int64),
    ]


class Ids(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class DropoutOrigin(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("first_head", "heads_of_entry", "first_row", "first_key")]


class AttentionParams(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("seqlen_q", ctypes.c_int64),
        ("seqlen_k", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("q", StridedView),
        ("k", StridedView),
        ("v", StridedView),
        ("k_scales", StridedView),
        ("v_scales", StridedView),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("out", StridedView),
        ("statistics", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mask", Mask),
        ("query_lengths", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("masks", StridedView * MAX_MASKS),
        ("num_masks", ctypes.c_int32),
        ("mask_bits", StridedView),
        ("query_ids", Ids),
        ("key_ids", Ids),
        ("blocks", StridedView),
        ("block_q", ctypes.c_int64),
        ("block_k", ctypes.c_int64),
        ("bias", StridedView),
        ("soft_cap", ctypes.c_double),
        ("slopes", ctypes.c_void_p),
        ("slopes_stride", ctypes.c_int64),
        ("relative_bias", ctypes.c_void_p),
        ("relative_reach", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("dropout_rate", ctypes.c_double),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("dropout_origin", DropoutOrigin),
        ("dropout_words", ctypes.c_void_p),
        ("allow_tf32", ctypes.c_bool),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("forward", AttentionParams),
        ("d_out", StridedView),
        ("d_lse", ctypes.c_void_p),
        ("dq", StridedView),
        ("dk", StridedView),
        ("dv", StridedView),
        ("d_bias", ctypes.c_void_p),
        ("d_bias_shape", ctypes.c_int64 * 4),
        ("d_relative_bias", ctypes.c_void_p),
        ("d_sinks", ctypes.c_void_p),
    ]


class Workspace(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


# What attn_ops_cuda_abi must return.
ABI = ctypes.sizeof(AttentionParams) << 32 | ctypes.sizeof(BackwardParams)


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """An array in device memory, which whoever made it keeps alive. Strides are in elements."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        return math.prod(self.shape) == 0 or all(
            extent == 1 or stride == dense
            for extent, stride, dense in zip(self.shape, self.strides, contiguous_strides(self.shape), strict=True)
        )

    @property
    def bytes(self) -> int:
        """Of the elements, however far apart they are."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def describe(name: str, array) -> DeviceArray:
    """`array` as a DeviceArray: one already, a PyTorch tensor, or anything with `__cuda_array_interface__`.

    Raises:
        TypeError: it is none of these, or not in device memory.
    """
    if isinstance(array, DeviceArray):
        return array
    if hasattr(array, "data_ptr") and hasattr(array, "stride"):  # its interface knows no bfloat16
        if not array.is_cuda:
            raise TypeError(f"{name} must be on a CUDA device, not on {array.device}")
        dtype = str(array.dtype).removeprefix("torch.")
        return DeviceArray(array.data_ptr(), dtype, tuple(array.shape), tuple(array.stride()))
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise TypeError(f"{name} must be an array in device memory, with __cuda_array_interface__, not a {kind}")
    return _from_interface(name, interface)


def _from_interface(name: str, interface: dict) -> DeviceArray:
    names = {"f4": "float32", "f8": "float64", "f2": "float16", "b1": "bool", "i4": "int32", "u8": "uint64"}
    names["u1"] = "uint8"
    order, code = interface["typestr"][0], interface["typestr"][1:]
    if order == ">" or code not in names:
        raise TypeError(f"{name}: arrays of type {interface['typestr']!r} are not taken")
    dtype, shape = names[code], tuple(interface["shape"])
    strides = contiguous_strides(shape)
    if interface.get("strides") is not None:
        size = ITEM_BYTES[dtype]
        if any(stride % size for stride in interface["strides"]):
            raise TypeError(f"{name}: strides {interface['strides']} must be multiples of the {size} bytes of {dtype}")
        strides = tuple(stride // size for stride in interface["strides"])
    return DeviceArray(interface["data"][0] or 0, dtype, shape, strides)
