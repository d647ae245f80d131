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
    widen = WIDEN[kind]
    left, right = left_operand(a, widen), np.concatenate([widen(_quads(word)) for word in b], axis=2).swapaxes(1, 2)
    sums = matrix_of_fragments(np.stack([word.reshape(-1) for word in c], axis=-1))
    result = model.multiply(left.astype(np.float64), right.astype(np.float64), sums)
    numbers.make_nan_canonical(result.view(np.uint32), result)
    return [words.reshape(-1, 32) for words in fragments_of_matrix(result).T]


def left_operand(a, widen):
    """[warps, 16 rows, columns] of a[4]: rows g and g + 8 of the left half of columns, then of the right one."""
    a = [widen(_quads(word)) for word in a]
    return np.concatenate([np.concatenate(a[0::2], axis=2), np.concatenate(a[1::2], axis=2)], axis=1)


def matrix_of_fragments(values):
    """[warps, 16, 8 n] of [lanes, 4 n]: of 8 columns after the other, two of row g and two of g + 8."""
    parts = values.reshape(-1, 8, 4, values.shape[1] // 4, 2, 2)  # warp, g, lane of the quad, n, half of rows, column
    return np.ascontiguousarray(parts.transpose(0, 4, 1, 3, 2, 5)).reshape(-1, 16, 2 * values.shape[1])


def fragments_of_matrix(matrix):
    """The inverse."""
    parts = matrix.reshape(-1, 2, 8, matrix.shape[2] // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return np.ascontiguousarray(parts).reshape(-1, matrix.shape[2] // 2)


def _quads(word):
    """[warps, group, thread in group]"""
    return np.ascontiguousarray(word).reshape(-1, 8, 4)


def _halves(word):
    return word.view(np.float16).astype(np.float32)  # two of each word


def _bfloats(word):
    return numbers.from_bf16(word.view(np.uint16))


def _tf32(word):
    return (word & _TF32_BITS).view(np.float32)


WIDEN = {"f16": _halves, "bf16": _bfloats, "tf32": _tf32}


def transpose(matrices):
    """8 x 8 elements of 16 bits, as [..., 8, 4] words."""
    return np.ascontiguousarray(np.ascontiguousarray(matrices).view(np.uint16).swapaxes(-1, -2)).view(np.uint32)
