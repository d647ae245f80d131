"""What the layers do with their inputs first: masks to booleans, ragged tensors refused, Keras masks put aside."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.backend import backend
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask


def boolean(mask, name):
    """`mask` as a bool tensor, from booleans, or numbers that tell as much: floats 0 and 1, integers from 0.

    Keras would cast an additive mask of zeros and large negative numbers to bool, which inverts it. Raises TypeError
    instead, as the op does, where the values are known: eagerly, and those of constants in what TensorFlow or JAX
    trace. Graphs of TensorFlow check the others as they run (tf.errors.InvalidArgumentError). XLA cannot, in functions
    of JAX, and of TensorFlow with `jit_compile=True` (and so in `fit` and `predict`, for the most part): there what
    only the data decide is cast as Keras does.
    """
    if isinstance(mask, Mask):
        raise TypeError(
            f"attn_ops.layers: {name} must be a boolean tensor, got {mask!r}; of the layers MultiHeadAttention and "
            "GroupedQueryAttention take masks of attn_ops, as attention_mask"
        )
    mask = ops.convert_to_tensor(mask)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype == "bool":
        return mask
    if "int" not in dtype and "float" not in dtype:
        raise TypeError(f"attn_ops.layers: {name} must hold booleans, or numbers that tell as much, got {dtype}")
    if "float" in dtype or not dtype.startswith("u"):
        message = checks.not_boolean("attn_ops.layers", name, dtype, numbers=True)
        values = backend.known_values(mask)
        if values is None:
            mask = backend.asserted(mask, checks.tells_visible(mask, dtype), message)
        elif not checks.tells_visible(values, dtype).all():
            raise TypeError(message)
    return ops.cast(mask, "bool")


def padding(layer, mask, like, name):
    """The mask of the positions of `like` as a bool tensor, `[batch, seqlen]`; of ragged ones `[1, tokens]`."""
    return boolean(backend.mask_of_tokens(type(layer).__name__, mask, like) if backend.is_ragged(mask) else mask, name)


def are_ragged(layer, given, **inputs):
    """Whether the `inputs` are ragged, which the backend and the `layer` take then.

    `given` are the arguments of the call that go by `[batch, seqlen]`, by name; masks that are ragged or of `attn_ops.masks`
    do not.

    Raises:
        TypeError: ragged ones that the backend does not have.
        ValueError: one of those that are given, beside ragged inputs.
    """
    if not any(backend.is_ragged(x) for x in inputs.values()):
        refuse_ragged(layer, **inputs)
        return False
    refused = [
        what
        for what, x in given.items()
        if not (x is None or x is False or isinstance(x, Mask) or (what.endswith("mask") and backend.is_ragged(x)))
    ]
    if refused:
        raise ValueError(
            f"{type(layer).__name__}: a call with ragged tensors takes no {', '.join(refused)}: pass dense ones"
        )
    return True


def refuse_ragged(layer, **inputs):
    """Raises TypeError where one of the `inputs` is ragged, as which Keras hands them over."""
    for name, x in inputs.items():
        if type(x).__name__ == "RaggedTensor":
            raise TypeError(
                f"{type(layer).__name__}: {name} is a RaggedTensor, and this layer takes dense tensors (on TensorFlow "
                f"the attention layers take ragged ones): pass {name}.to_tensor(), and "
                f"tf.sequence_mask({name}.row_lengths()) as its mask"
            )


def without_keras_mask(x):
    """`x` without its Keras mask, for a sublayer that would warn about it; the caller's tensor keeps it."""
    return backend.without_keras_mask(x)
