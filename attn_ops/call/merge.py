"""What attention to parts of the keys, each by itself, makes together; written once for all frameworks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

from attn_ops.call import shapes


def merge(xp, name, outs, lses, layout):
    """(out, lse) of all keys; see `attn_ops.merge_attention`. Differentiable, also where parts saw no key."""
    outs, lses = checked(xp, name, outs, lses, layout)
    dtype = outs[0].dtype
    seen = [lse != -math.inf for lse in lses]  # NaN is not hidden, here and below
    shift = xp.stop_gradient(functools.reduce(xp.maximum, lses))  # its derivative cancels
    none = xp.zeros_like(shift)
    shift = xp.where(shift != -math.inf, shift, none)
    # Selected before and after: the derivative of exp(-inf) meets infinite differences.
    weights = [xp.where(s, xp.exp(xp.where(s, lse - shift, none)), none) for s, lse in zip(seen, lses)]
    total = functools.reduce(operator.add, weights)
    nonzero = xp.where(total != 0, total, xp.ones_like(total))
    terms = []
    for weight, out in zip(weights, outs):
        weight = _along_rows(xp, weight / nonzero, layout)
        out = xp.cast(out, weight.dtype)
        terms.append(xp.where(weight != 0, weight * out, xp.zeros_like(out)))
    lse = xp.where(total != 0, shift + xp.log(nonzero), none - math.inf)
    return xp.cast(functools.reduce(operator.add, terms), dtype), lse


def checked(xp, name, outs, lses, layout):
    """Both as lists of tensors that fit each other."""
    shapes.check_layout(name, layout)
    for what, xs in (("outs", outs), ("lses", lses)):
        if not isinstance(xs, Iterable):
            raise TypeError(f"{name}: {what} must be a list of tensors, got {type(xs).__name__}")
    outs, lses = (
        [xp.as_tensor(name, f"{what}[{n}]", x) for n, x in enumerate(xs)]
        for what, xs in (("outs", outs), ("lses", lses))
    )
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{name}: needs as many outs as lses, and at least one, got {len(outs)} and {len(lses)}")
    for n, (out, lse) in enumerate(zip(outs, lses)):
        if not xp.is_floating(out.dtype) or not xp.is_floating(lse.dtype):
            raise TypeError(f"{name}: outs and lses must be floating, got {out.dtype.name} and {lse.dtype.name} at {n}")
        if (out.dtype, lse.dtype) != (outs[0].dtype, lses[0].dtype):
            raise TypeError(
                f"{name}: all outs must have one dtype, and all lses, got {out.dtype.name} and {lse.dtype.name} at {n}"
            )
        of_out, of_lse, first = xp.extents(out), xp.extents(lse), xp.extents(outs[0])
        if of_out is None or of_lse is None:
            continue
        rows = [of_out[i] for i in ((0, 2, 1) if layout == "BSHD" else (0, 1, 2))] if len(of_out) == 4 else of_out[:-1]
        if len(of_out) not in (2, 3, 4) or not shapes.compatible(of_lse, rows) or not shapes.compatible(of_out, first):
            raise ValueError(
                f"{name}: outs must be of one shape, what the attention returned in layout {layout}, and lses what it returned "
                f"beside them, got {shapes.shape_text(of_out)} and {shapes.shape_text(of_lse)} at {n}, and first "
                f"{shapes.shape_text(first)}"
            )
    return outs, lses


def _along_rows(xp, weight, layout):
    """A weight of each row, in the shape of lse, to be multiplied with out."""
    if len(weight.shape) == 3 and layout == "BSHD":
        weight = xp.transpose(weight, (0, 2, 1))
    return xp.expand_dims(weight, -1)
