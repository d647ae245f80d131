"""What a dense mask was made of, kept beside it.

Decoders of KerasHub combine the causal mask, the padding and the position in the cache into a dense `[batch, seqlen_q,
seqlen_k]` tensor, and hand that to their attention. The tensor stays what it is, for whoever reads it; what it was made of
is an attribute of it. An attention that knows the attribute does not read the tensor, and graphs then do not compute it.
Where the attribute gets lost (a cast, an array that takes none) the tensor counts.
"""

from __future__ import annotations

import typing
from typing import Any

import keras
from keras import ops

from attn_ops.masks.mask import Mask, boolean

_NAME = "_attn_ops_structure"


class Structure(typing.NamedTuple):
    """Row i stands at key `offset + i`, and sees no key after it, and of the others those that ``padding`` shows.

    Attributes:
        padding: None or bool `[batch, seqlen_k or 1]`, true for real keys.
        causal: whether there is anything but padding.
        offset: an integer or an integer scalar: the position of the first row in the cache; None for 0.
        size: None or the number of keys that a row sees: itself and the ones before.
    """

    padding: Any = None
    causal: bool = True
    offset: Any = None
    size: int | None = None

    def mask(self) -> Mask:
        """The mask, beside which `query_offset` has to be given."""
        mask = Mask()
        if self.causal:
            mask = Mask(is_causal=True) if self.size is None else Mask(window=(self.size - 1, 0))
        return mask if self.padding is None else mask & boolean(self.padding[:, None, None, :])

    def options(self, window=None) -> dict:
        """The options `mask` and `query_offset`, with a ``window`` (keys before, keys after) that rows have besides."""
        mask = self.mask() if window is None else self.mask() & Mask(window=window)
        return {"mask": mask, **query_offset(self.offset)}


def keep(dense, known):
    """``dense``, with what is known of it: the `Structure` of a mask."""
    try:
        setattr(dense, _NAME, known)
    except AttributeError:  # an array of JAX
        pass
    return dense


def of(dense):
    """What is known of a tensor, by :func:`keep`, or None."""
    return getattr(dense, _NAME, None)


def query_offset(index) -> dict:
    """The option `query_offset` for an index into a cache, an integer or a scalar; none for the first position."""
    if index is None or (isinstance(index, int) and index == 0):
        return {}
    return {"query_offset": index if isinstance(index, int) else ops.reshape(ops.cast(index, "int32"), [])}


def causal_decoder(parameters, sequence, padding, index, *, unknown=(), causal=None, size=None, keras_masks=True):
    """An adapter of the method of a decoder that makes its causal mask, which keeps what that is made of.

    Args:
        parameters: the names of the arguments of the method, of which these have a meaning:
        sequence, padding, index: the inputs, the padding mask `[batch, seqlen_k]` (or with an axis of 1 for the rows), and
            the position in the cache.
        unknown: names of arguments that may be other masks: with one of them nothing is known.
        causal: a function of the layer and of all arguments that tells whether the mask is causal at all.
        size: a function of the layer: how many keys a row sees, or None for all up to its own.
        keras_masks: whether the Keras mask of the inputs counts where no padding mask is given.
    """

    def adapter(layer, stock, *args, **kwargs):
        dense = stock(*args, **kwargs)
        given = dict(zip(parameters, args)) | kwargs
        if causal is not None and not causal(layer, given) or any(given.get(name) is not None for name in unknown):
            return dense
        keys = given.get(padding)
        if keys is None and keras_masks:
            keys = getattr(given[sequence], "_keras_mask", None)
        if keys is not None:
            keys = real_keys(keys)
            if keys is None:
                return dense
        return keep(dense, Structure(keys, True, given.get(index), None if size is None else size(layer)))

    return adapter


def padding(parameters, name):
    """An adapter of a method that makes a mask of nothing but the padding, the argument with this name."""

    def adapter(layer, stock, *args, **kwargs):
        dense = stock(*args, **kwargs)
        keys = (dict(zip(parameters, args)) | kwargs).get(name)
        keys = None if dense is None or keys is None else real_keys(keys)
        return dense if keys is None else keep(dense, Structure(keys, causal=False))

    return adapter


def real_keys(padding):
    """A padding mask of KerasHub, `[batch, seqlen_k]` or `[batch, 1, seqlen_k]`, as bool `[batch, seqlen_k]`, or None for
    another one. Numbers below 1 hide."""
    keys = ops.cast(ops.cast(padding, "int32"), "bool")
    if len(keys.shape) == 3 and keys.shape[1] == 1:
        keys = keys[:, 0]
    return keys if len(keys.shape) == 2 else None


def options(mask, window=None, index=None):
    """The options `mask` and `query_offset` for a mask of KerasHub, boolean or integer `[batch, seqlen_q, seqlen_k]`.

    Args:
        mask: the mask or None.
        window: None, or (keys before, keys after) that a row sees besides.
        index: the position in the cache that a window counts from, where the mask does not know it.

    Returns:
        The options, or None for a mask of another kind.
    """
    if mask is None:
        return {} if window is None else None  # the stock methods apply their window to a mask
    known = of(mask)
    if known is not None:
        return known.options(window)
    if "float" in keras.backend.standardize_dtype(mask.dtype) or len(mask.shape) != 3:
        return None
    parts = boolean(ops.cast(ops.expand_dims(mask, 1), "bool"))
    return {"mask": parts} if window is None else {"mask": parts & Mask(window=window), **query_offset(index)}
