"""What a dense mask was made of, kept beside it.

Decoders of KerasHub combine the causal mask, the padding and the position in the cache into a dense `[batch, seqlen_q,
seqlen_k]` tensor, and hand that to their attention. The tensor stays what it is, for whoever reads it; what it was made of
is an attribute of it. An attention that knows the attribute does not read the tensor, and graphs then do not compute it.
Where the attribute gets lost (a cast, an array that takes none) the tensor counts.
"""

from __future__ import annotations

import typing
from typing import Any

from keras import ops

from attn_ops.masks import constructors
from attn_ops.masks.mask import Mask

_NAME = "_attn_ops_structure"


class Structure(typing.NamedTuple):
    """Row i stands at key `offset + i`, and sees no key after it, and of the others those that ``padding`` shows.

    Attributes:
        padding: None or bool `[batch, seqlen_k or 1]`, true for real keys.
        offset: an integer or an integer scalar: the position of the first row in the cache; None for 0.
        size: None or the number of keys that a row sees: itself and the ones before.
    """

    padding: Any = None
    offset: Any = None
    size: int | None = None

    def mask(self) -> Mask:
        """The mask, beside which `query_offset` has to be given."""
        mask = constructors.causal() if self.size is None else constructors.window(self.size - 1, 0)
        return mask if self.padding is None else mask & constructors.boolean(self.padding[:, None, None, :])


def keep(dense, structure: Structure):
    """``dense``, with the ``structure`` that it has."""
    try:
        setattr(dense, _NAME, structure)
    except AttributeError:  # an array of JAX
        pass
    return dense


def of(dense) -> Structure | None:
    """The structure of a mask, where it is known."""
    return getattr(dense, _NAME, None)


def query_offset(index):
    """The option `query_offset` for an index into a cache: None, a number or `[1]`."""
    if index is None or (isinstance(index, int) and index == 0):
        return None
    return index if isinstance(index, int) else ops.reshape(ops.cast(index, "int32"), [1])


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
            keys = ops.cast(ops.cast(keys, "int32"), "bool")  # as in KerasHub: what is below 1 hides
            if len(keys.shape) == 3 and keys.shape[1] == 1:
                keys = keys[:, 0]
            if len(keys.shape) != 2:
                return dense
        return keep(dense, Structure(keys, given.get(index), None if size is None else size(layer)))

    return adapter
