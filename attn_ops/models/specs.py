"""What the rules for arguments (call/) need where tensors are only described: the dtype and the shape.

The twin of tensorflow/xp.py and jax/xp.py for KerasTensors, on any backend of Keras. Arrays among the arguments are checked
and converted by the twin of the ``backend``, for its exceptions.
"""

from __future__ import annotations

import functools
import types
import typing

import keras

from attn_ops.models import keras_tensors


class DType(typing.NamedTuple):
    name: str


@functools.cache
def _dtype(name):
    return DType(name)  # one of each name, since dtypes are compared by identity too


float32, float64, bool_ = map(_dtype, ("float32", "float64", "bool"))
FLOATS = frozenset([float32, float64, *map(_dtype, ("float16", "bfloat16"))])


class Spec(typing.NamedTuple):
    """A tensor's dtype and shape: a list with None where unknown, or None where not even the rank is known."""

    dtype: DType
    shape: list | None

    def __mul__(self, other):
        return self

    __add__ = __sub__ = __lt__ = __mul__  # of two with the shape of the first


def of_backend(backend):
    """The module for `arguments.normalize`, over the twin for arrays of ``backend``."""

    def as_tensor(name, what, x):
        if isinstance(x, Spec):
            return x
        if type(x).__name__ == "KerasTensor":
            if (kind := keras_tensors.storage(x)) != "dense":
                raise TypeError(f"{name}: {what} must be a dense tensor or an array, got a {kind} KerasTensor")
            return Spec(_dtype(keras.backend.standardize_dtype(x.dtype)), list(x.shape))
        x = backend.as_tensor(name, what, x)
        return Spec(_dtype(keras.backend.standardize_dtype(x.dtype)), backend.extents(x))

    def fresh_seed(name):
        if backend.has_random_state:
            return Spec(_dtype("int64"), [2])
        return backend.fresh_seed(name)

    return types.SimpleNamespace(
        kind=lambda x: None,  # checked_before.py is for tensors
        float32=float32,
        float64=float64,
        bool_=bool_,
        FLOATS=FLOATS,
        absolute=lambda x: x,
        as_tensor=as_tensor,
        as_seed_array=lambda name, seed: as_tensor(name, "dropout_seed", seed),
        cast=lambda x, dtype: Spec(dtype, x.shape),
        cast_text=backend.cast_text,
        ensure_rank=lambda x, rank, label: Spec(x.dtype, [None] * rank),
        extent=lambda x, axis: x.shape[axis],
        expand_dims=lambda x, axis: Spec(x.dtype, [*x.shape[:axis], 1, *x.shape[axis:]]),
        extents=lambda x: x.shape,
        fresh_seed=fresh_seed,
        is_floating=lambda dtype: "float" in dtype.name,
        is_integer=lambda dtype: "int" in dtype.name,
        as_int32=lambda x: Spec(_dtype("int32"), x.shape),
        logical_and=lambda x, y: x,  # their shape is not asked for any more
        seed_of_array=lambda seed: seed,
        seed_of_words=lambda words: Spec(_dtype("int64"), [2]),
        static_value=lambda x: None,
        stop_gradient=lambda x: x,
        take_columns=lambda x, indices: Spec(x.dtype, [x.shape[0], len(indices)]),
        transpose=lambda x: Spec(x.dtype, x.shape[::-1]),
        where=lambda condition, x, y: x,
        zeros_like=lambda x: x,
    )
