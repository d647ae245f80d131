"""What is usually added to scores by the distance between a query and a key: ALiBi's slopes and T5's buckets.

Distances are key minus query, ``j - own``: negative for the past.
"""

from __future__ import annotations

import operator

import numpy as np


def alibi_slopes(num_heads):
    """The slopes of ALiBi for so many heads, float32 ``[num_heads]``: the option ``alibi_slopes`` of the attention.

    2^(-8/n), 2^(-16/n), … for a number n of heads that is a power of two. Otherwise those of the largest power of two
    below, and then every second one of the next power, as many as are missing (Press, Smith and Lewis, "Train Short, Test
    Long", 2021, arXiv:2108.12409, and the code that came with it).

    Raises:
        TypeError: ``num_heads`` is no integer.
        ValueError: it is below 1.
    """
    count = _integer("alibi_slopes", "num_heads", num_heads)
    if count < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {count}")
    power = 1 << (count.bit_length() - 1)
    more = _geometric(2 * power)[0::2][: count - power]
    return np.concatenate([_geometric(power), more]).astype(np.float32)


def _geometric(n):
    return np.exp2(-8.0 / n * np.arange(1, n + 1))


class T5RelativeBias:
    """A table of T5's buckets as the option ``relative_bias`` of the attention.

        attn_ops.scaled_dot_product_attention(q, k, v, scale=1.0, relative_bias=attn_ops.T5RelativeBias(table))

    A key in bucket b of a row adds ``table[b]`` to its score, for each head. Near distances have a bucket each, the others
    share some that grow like the logarithm, up to ``max_distance``, from where on they are all in the last one; with
    ``bidirectional``, one half of the buckets is for the past and the present, and the other for the future, which
    otherwise is in bucket 0 (Raffel et al. 2020, arXiv:1910.10683; Mesh-TensorFlow's ``_relative_position_bucket``). The
    attention takes each bucket from the table by distance: no [seqlen_q, seqlen_k] array is made, and the gradient reaches
    the table. T5 itself has ``scale=1.0``.

    Args:
        table: floating ``[num_buckets, num_heads]``, an array or tensor of any framework.
        bidirectional: whether the future has buckets of its own: True in encoders, False in decoders.
        max_distance: from which on distances are in the last bucket.

    Raises:
        TypeError: ``bidirectional`` is no bool, or ``max_distance`` no integer.
        ValueError: ``max_distance`` is below 1; and in the attention: too few buckets, or as many as distances.
    """

    def __init__(self, table, bidirectional=True, max_distance=128):
        if not isinstance(bidirectional, (bool, np.bool_)):
            raise TypeError(f"T5RelativeBias: bidirectional must be True or False, got {type(bidirectional).__name__}")
        self.table = table
        self.bidirectional = bool(bidirectional)
        self.max_distance = _integer("T5RelativeBias", "max_distance", max_distance)
        if self.max_distance < 1:
            raise ValueError(f"T5RelativeBias: max_distance must be at least 1, got {self.max_distance}")

    def __repr__(self):
        shape = getattr(self.table, "shape", None)
        return f"T5RelativeBias({shape}, bidirectional={self.bidirectional}, max_distance={self.max_distance})"

    def buckets(self, name, num_buckets):
        """The bucket of each distance from -max_distance to max_distance, int32; ``name`` is the function of errors."""
        per_side = num_buckets // 2 if self.bidirectional else num_buckets
        exact = per_side // 2
        if exact < 1 or self.max_distance <= exact:
            least = 4 if self.bidirectional else 2
            raise ValueError(
                f"{name}: T5RelativeBias needs a table of at least {least} buckets, and a max_distance beyond the "
                f"{max(exact, 1)} that have buckets of their own, got {num_buckets} buckets "
                f"(bidirectional={self.bidirectional}) and max_distance={self.max_distance}"
            )
        distance = np.arange(-self.max_distance, self.max_distance + 1)
        first = np.where(distance > 0, per_side, 0) if self.bidirectional else 0
        back = np.abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        far = np.log(np.maximum(back, 1) / exact) / np.log(self.max_distance / exact) * (per_side - exact)
        far = np.minimum(exact + far.astype(np.int64), per_side - 1)
        return (first + np.where(back < exact, back, far)).astype(np.int32)

    def __tf_flatten__(self):
        return (self.bidirectional, self.max_distance), (self.table,)

    @classmethod
    def __tf_unflatten__(cls, metadata, components):
        return cls(*components, *metadata)


def _integer(name, what, x):
    try:
        if isinstance(x, (bool, np.bool_)):
            raise TypeError
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: {what} must be an integer, got {type(x).__name__}") from None
