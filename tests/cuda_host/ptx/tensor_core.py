"""What `mma.sync` computes: d = c + a b of one warp's fragments, exactly or with the rounding of cards.

Fragments are as in PTX ISA, "Matrix Fragments for mma.m16n8k16" (and k8 with .tf32), written here without a look at
ptx.cuh.

Cards align the products of a block to the largest exponent among them and the sum, cut off what is more than a few
bits below float32's 24, and add the blocks one after the other, cutting off again (Fasi et al., "Numerical behavior of
NVIDIA tensor cores", 2021; Khattak and Mikaitis, 2025). `Truncated` is that, simplified.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import numbers

_TF32_BITS = np.uint32(0xFFFFE000)


class Exact:
    """One rounding of the exact sum."""

    def multiply(self, a, b, c):
        return (c.astype(np.float64) + a @ b).astype(np.float32)


@dataclass(frozen=True)
class Truncated:
    """`block` products of 16 bits (half as many of TF32) at a time, with `guard` bits beyond float32's."""

    block: int
    guard: int

    def multiply(self, a, b, c):
        depth = a.shape[-1]
        block = self.block * depth // 16
        for first in range(0, depth, block):
            part = slice(first, first + block)
            products = a[..., :, part, None] * b[..., None, part, :]
            c = self.add(np.concatenate([c.astype(np.float64)[..., :, None, :], products], axis=-2))
        return c

    def add(self, terms):
        """Of axis -2."""
        finite = np.isfinite(terms)
        exponent = np.where(terms == 0, -200, np.frexp(np.where(finite, terms, 0))[1]).max(-2, keepdims=True)
        unit = np.ldexp(1.0, np.maximum(exponent, -200) - 24 - self.guard)
        total = (np.trunc(terms / unit) * unit).sum(-2)
        near = total.astype(np.float32)
        towards_zero = np.where(
            np.abs(near.astype(np.float64)) > np.abs(total), np.nextafter(near, np.float32(0)), near
        )
        return np.where(finite.all(-2), towards_zero, terms.sum(-2)).astype(np.float32)


MODELS = {"exact": Exact(), "sm_80": Truncated(block=8, guard=1), "sm_90": Truncated(block=16, guard=2)}


def mma(model, kind: str, a, b, c):
    """Registers d[4] of a[4], b[2] (bits) and c[4] (float32), each [warps, 32]. `kind`: f16, bf16 or tf32."""
    a, b = ([_quads(word) for word in words] for words in (a, b))
    if kind == "tf32":
        a, b = ([(word & _TF32_BITS).view(np.float32) for word in words] for words in (a, b))
    else:
        widen = _halves if kind == "f16" else _bfloats
        a, b = ([widen(word) for word in words] for words in (a, b))
    # a[0], a[1]: rows g and g + 8 of the left half of columns; a[2], a[3]: of the right one. b: of column g, and down.
    left = np.concatenate([np.concatenate(a[0::2], axis=2), np.concatenate(a[1::2], axis=2)], axis=1)
    right = np.concatenate(b, axis=2).swapaxes(1, 2)
    accumulators = np.empty((len(left), 16, 8), np.float32)
    for i, word in enumerate(c):
        accumulators[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2] = _quads(word)
    result = model.multiply(left.astype(np.float64), right.astype(np.float64), accumulators)
    numbers.make_nan_canonical(result.view(np.uint32), result)
    return [result[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2].reshape(-1, 32) for i in range(4)]


def _quads(word):
    """[warps, group, thread in group]"""
    return np.ascontiguousarray(word).reshape(-1, 8, 4)


def _halves(word):
    return word.view(np.float16).astype(np.float32)  # [warps, 8, 8]: two of each thread


def _bfloats(word):
    return numbers.from_bf16(word.view(np.uint16))


def transpose(matrices):
    """8 x 8 elements of 16 bits, as [..., 8, 4] words."""
    return np.ascontiguousarray(np.ascontiguousarray(matrices).view(np.uint16).swapaxes(-1, -2)).view(np.uint32)
