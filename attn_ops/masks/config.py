"""Masks as values that JSON holds, for files of Keras models; only those made of Python values and NumPy arrays."""

from __future__ import annotations

import numpy as np

from attn_ops.masks.mask import Mask
from attn_ops.masks.structure import Boolean, put_together, taken_apart


def config_of(name, mask):
    """A `Mask` as a dict for `from_config`.

    Raises:
      ValueError: it holds a Python function or tensors; ``name`` is whose it is in the message.
    """
    functions = [part for part in mask.structured if part.is_function]
    if functions:
        raise ValueError(
            f"{name}: {mask!r} holds a Python function, which cannot be saved; give the mask at call, or save what the "
            "function is for its extents: masks.boolean(mask.materialize(seqlen_q, seqlen_k))"
        )
    structured, arrays = taken_apart(mask.structured)
    lengths = [mask.query_lengths, mask.key_lengths]
    arrays += [*mask.tensors(), *(x for x in lengths if x is not None)]
    for x in arrays:
        if not isinstance(x, (np.ndarray, np.generic)):
            raise ValueError(
                f"{name}: {mask!r} holds a {type(x).__name__}, which cannot be saved; make it of NumPy arrays, or give it "
                "at call"
            )
    return {
        "is_causal": mask.is_causal,
        "causal_alignment": str(mask.causal_alignment),
        "window": None if mask.window is None else list(mask.window),
        "lengths": [x is not None for x in lengths],
        "structured": structured,
        "dense": [part.kind for part in mask.dense],
        "arrays": [{"dtype": x.dtype.name, "shape": list(x.shape), "values": x.ravel().tolist()} for x in arrays],
    }


def from_config(config):
    """The `Mask` of a `config_of`."""
    arrays = [np.array(x["values"], x["dtype"]).reshape(x["shape"]) for x in config["arrays"]]
    count = sum(len(part["arrays"]) for part in config["structured"])
    others = iter(arrays[count:])
    dense = tuple(Boolean(next(others), kind) for kind in config["dense"])
    query_lengths, key_lengths = (next(others) if given else None for given in config["lengths"])
    window = config["window"]
    return Mask(
        is_causal=config["is_causal"],
        causal_alignment=config["causal_alignment"],
        window=None if window is None else tuple(window),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        structured=put_together(config["structured"], arrays[:count]),
        dense=dense,
    )
