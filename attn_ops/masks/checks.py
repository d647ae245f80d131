"""What masks are made of must have: rank, dtype, and values where they are known."""

from __future__ import annotations

import operator

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options


def not_boolean(name, what, dtype, numbers=False):
    """The text of the TypeError for a mask of another dtype, here, in the op and in the layers.

    Args:
      name: of the function that refuses it.
      what: the argument.
      dtype: its name.
      numbers: whether the function would take 0 and 1, so that it refuses what looks added to the scores.
    """
    hint = ""
    if "float" in dtype or numbers:
        hint = (
            "; pass values that are added to the scores as bias= of the attention function, or where those are 0 and a "
            f"large negative number what is visible, {what} > -1"
        )
    elif "int" in dtype:
        hint = f"; cast it when its nonzero elements mean visible: {what} != 0"
    elif dtype.startswith("str"):
        hint = "; a causal mask is is_causal=True, or attn_ops.masks.causal()"
    also = ", or hold only 0 and 1 (an additive mask would be inverted)" if numbers else ""
    return f"{name}: {what} must be boolean (True = may be seen){also}, got {dtype}{hint}"


def tells_visible(mask, dtype):
    """Where a numeric mask of this dtype (its name) can mean "may be seen" and "hidden", elementwise.

    For the layers, which take numbers as Keras does: floats are 0 or 1, integers are hidden at 0 and never negative.
    What is added to scores is 0 where visible, and would be inverted.
    """
    return (mask == 0) | (mask == 1) if "float" in dtype else mask >= 0


def normalized_window(window):
    pair = options.window("Mask", window)
    return None if pair == (-1, -1) else pair


def checked(name, array, ranks, kind):
    """`array` with the rank and dtype a constructor takes; Python lists become NumPy arrays."""
    if type(array).__name__ in ("RaggedTensor", "SparseTensor"):
        kind = type(array).__name__.removesuffix("Tensor").lower()
        raise TypeError(f"{name}: {kind} tensors are not supported; make it dense, and pass lengths")
    array = namespaces.held(array)
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        array = _array(name, array)
    dtype = getattr(array.dtype, "name", str(array.dtype))
    if kind == "bool" and dtype != "bool":
        raise TypeError(not_boolean(name, "mask", dtype))
    if kind == "bits" and dtype not in ("bool", "uint8"):
        raise TypeError(f"{name}: dtype must be bool or uint8, got {dtype}")
    if kind == "int" and "int" not in dtype:
        raise TypeError(f"{name}: dtype must be int, got {dtype}")
    rank = array.shape.rank if hasattr(array.shape, "rank") else len(array.shape)
    ranks = ranks if isinstance(ranks, tuple) else (ranks,)
    if rank not in ranks:
        raise ValueError(f"{name}: rank must be {' or '.join(map(str, ranks))}, got shape {array.shape}")
    return array


def listed(name, mask):
    """The masks of an argument that is None, a mask, or a list of these: nested lists of Python's values make one array."""
    if not isinstance(mask, (list, tuple)):
        return () if mask is None else (mask,)
    if mask and all(isinstance(item, (list, tuple, bool, int, float, np.generic)) for item in mask):
        return (_array(f"{name}: mask", mask),)
    return tuple(_array(f"{name}: mask", item) if isinstance(item, (list, tuple)) else item for item in mask if item is not None)


def _array(name, sequence):
    try:
        return namespaces.listed(sequence)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"{name}: an array is needed, or lists that make one: {error}") from None


def extent(what, x):
    """TypeError or ValueError where ``x`` is no extent: an integer from 0, or a scalar or unknown of a framework."""
    if x is None or isinstance(x, (int, float, str, bytes, np.generic, np.ndarray, list, tuple)):
        try:
            value = operator.index(x)
        except TypeError:
            raise TypeError(f"{what} must be an integer, got {x!r}") from None
        if value < 0:
            raise ValueError(f"{what} must not be negative, got {value}")


def normalized_lengths(name, lengths):
    return None if lengths is None else checked(f"Mask: {name}", lengths, 1, "int")


def ascending(rule, x):
    """``x``, which never goes back along its last axis, or `namespaces.required`."""
    values = namespaces.known(x)
    if values is not None:
        never_back(rule, values)
        return x
    return namespaces.required(x, lambda x: x[..., 1:] >= x[..., :-1], rule)


def never_back(rule, values):
    """ValueError with the rule and the place where values go back along their last axis."""
    back = np.argwhere(values[..., 1:] < values[..., :-1])
    if back.size:
        *entry, at = (int(i) for i in back[0])
        where = f"at {at + 1}" + (f" of batch entry {entry[0]}" if entry and values.shape[0] > 1 else "")
        before, after = (values[(*entry, i)] for i in (at, at + 1))
        raise ValueError(f"{rule}, got {after} after {before} {where}")


def cumulative(name, given, totals=None):
    """Cumulative lengths by argument, checked: integers `[n + 1]` from 0 that never go back, the same n; None but for the first.

    ``totals`` are what each must end with, by argument, None where unknown; whoever gives them has checked what is traced.
    """
    result, counts = {}, {}
    first, lengths = next(iter(given.items()))
    if lengths is None:
        raise TypeError(f"{name}: {first} must hold integers, a 0 and the end of each sequence, got None")
    for what, x in given.items():
        result[what] = x = None if x is None else checked(f"{name}: {what}", x, 1, "int")
        if x is None:
            continue
        counts[what] = x.shape[0]
        if counts[what] == 0:
            raise ValueError(f"{name}: {what} must hold a 0 and the end of each sequence, got shape (0,)")
        values = namespaces.known(x)
        if values is None:
            if totals is None:
                x = namespaces.required(x, lambda x: x[:1] == 0, f"{name}: {what} must start at 0")
                result[what] = ascending(f"{name}: {what} must never go back", x)
            continue
        if values[0] != 0:
            raise ValueError(f"{name}: {what} must start at 0, got {values[0]}")
        never_back(f"{name}: {what} must never go back", values)
        total = (totals or {}).get(what)
        if isinstance(total, int) and values[-1] != total:
            raise ValueError(f"{name}: {what} must end with the number of tokens, {total}, got {values[-1]}")
    known = {count for count in counts.values() if count is not None}
    if len(known) > 1:
        told = " and ".join(f"{count - 1} ({what})" for what, count in counts.items())
        raise ValueError(f"{name}: the numbers of sequences must be the same, got {told}")
    return result
