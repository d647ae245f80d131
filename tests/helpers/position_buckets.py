"""T5's buckets as Mesh-TensorFlow computes them, one distance at a time (transformer_layers.py, Raffel et al. 2020)."""

import math


def mesh_tensorflow_bucket(relative_position, bidirectional, num_buckets, max_distance):
    """The bucket of a distance, key minus query."""
    ret = 0
    n = -relative_position
    if bidirectional:
        num_buckets //= 2
        ret += int(n < 0) * num_buckets
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = num_buckets // 2
    if n < max_exact:
        return ret + n
    val_if_large = max_exact + int(math.log(n / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact))
    return ret + min(val_if_large, num_buckets - 1)
