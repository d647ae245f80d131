"""The tensor arguments of an attention call, each brought to the dtype and rank that the implementations take."""

from __future__ import annotations

import tensorflow as tf

from . import options

_SCORE_AXES = ("batch", "num_heads", "seqlen_q", "seqlen_k")


def as_tensor(name, what, x):
    """``x`` as a dense tf.Tensor; TypeError naming ``what`` when it is something else."""
    if isinstance(x, tf.Tensor):
        return x
    if isinstance(x, tf.RaggedTensor):
        raise TypeError(
            f"{name}: {what} is a RaggedTensor; pass the dense {what}.to_tensor() and tell the lengths by "
            "query_seq_lengths and key_value_seq_lengths"
        )
    if x is None or isinstance(x, (tf.SparseTensor, tf.IndexedSlices)):
        raise TypeError(f"{name}: {what} must be a dense tensor or an array, got {type(x).__name__}")
    try:
        return tf.convert_to_tensor(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {what} must be a dense tensor or an array, got {type(x).__name__}: {error}") from None


def score_shaped(name, what, x, dims):
    """``x`` with rank 4: [seqlen_q, seqlen_k] and [batch, seqlen_q, seqlen_k] get the missing axes."""
    shape = x.shape
    rank = shape.rank
    if rank is None:
        return tf.ensure_shape(x, [None] * 4, name=f"{name}_{what}_needs_rank_4")
    if rank == 3:
        x = tf.expand_dims(x, 1)
    elif rank == 2:
        x = tf.expand_dims(tf.expand_dims(x, 0), 0)
    elif rank != 4:
        raise ValueError(
            f"{name}: {what} must have rank 4, 3 ([batch, seqlen_q, seqlen_k]) or 2 ([seqlen_q, seqlen_k]), "
            f"got shape {shape}"
        )
    for extent, full, axis in zip(x.shape.as_list(), dims, _SCORE_AXES):
        if extent != 1 and extent != full and extent is not None and full is not None:
            expected = ", ".join(f"{a}={'?' if n is None else n}" for a, n in zip(_SCORE_AXES, dims))
            raise ValueError(
                f"{name}: {what} of shape {shape} does not broadcast to [{expected}]: its {axis} is {extent}"
            )
    return x


def boolean(name, mask, dims):
    mask = as_tensor(name, "mask", mask)
    if mask.dtype != tf.bool:
        hint = (
            "; pass values that are added to the scores as bias="
            if mask.dtype.is_floating
            else "; cast it when its nonzero elements mean visible"
        )
        raise TypeError(f"{name}: mask must be boolean (True = may be seen), got {mask.dtype.name}{hint}")
    return score_shaped(name, "mask", mask, dims)


def bias(name, bias, dims, dtype):
    bias = as_tensor(name, "bias", bias)
    if not bias.dtype.is_floating:
        hint = "; a boolean mask goes to mask=" if bias.dtype == tf.bool else ""
        raise TypeError(f"{name}: bias must be floating, got {bias.dtype.name}{hint}")
    bias = score_shaped(name, "bias", bias, dims)
    return bias if bias.dtype == dtype else tf.cast(bias, dtype)


def lengths(name, what, lengths, batch, limit):
    """``lengths`` as int32 [batch], its values checked when they are known now."""
    if lengths is None:
        return None
    lengths = as_tensor(name, what, lengths)
    if not lengths.dtype.is_integer:
        raise TypeError(f"{name}: {what} must hold integers, got {lengths.dtype.name}")
    if not lengths.shape.is_compatible_with([batch]):
        raise ValueError(f"{name}: {what} must have shape [batch={batch}], got {lengths.shape}")
    values = tf.get_static_value(lengths)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or (limit is not None and high > limit):
            bad = low if low < 0 else high
            raise ValueError(f"{name}: {what} must be between 0 and {limit}, got {bad}")
    if lengths.dtype == tf.int32:
        return lengths
    if lengths.dtype.size >= 4:
        # A cast would wrap values around into the valid range; clipped ones stay too long for the ops to accept.
        bound = tf.cast(tf.int32.max, lengths.dtype)
        lengths = tf.minimum(lengths, bound)
        if not lengths.dtype.is_unsigned:
            lengths = tf.maximum(lengths, tf.cast(-1, lengths.dtype))
    return tf.cast(lengths, tf.int32)


def times_tensor(name, query, scale):
    """The query times a scale that is a tensor, so that the gradient reaches the scale."""
    scale = as_tensor(name, "scale", scale)
    if not scale.dtype.is_floating:
        raise TypeError(f"{name}: scale must be floating, got {scale.dtype.name}")
    if scale.shape.rank not in (None, 0):
        raise ValueError(f"{name}: scale must be a scalar, got shape {scale.shape}")
    value = tf.get_static_value(scale)
    if value is not None:
        options.scale(name, float(value))
    return query * tf.cast(scale, query.dtype)


def seed(name, seed):
    """``seed`` as an int64 [2] tensor (seed, offset)."""
    if seed is None:
        return tf.random.uniform([2], tf.int64.min, tf.int64.max, tf.int64)
    if options.is_integer(seed):
        return tf.constant(options.seed_words(name, seed), tf.int64)
    seed = as_tensor(name, "dropout_seed", seed)
    if not seed.dtype.is_integer:
        raise TypeError(f"{name}: dropout_seed must hold integers, got {seed.dtype.name}")
    if not seed.shape.is_compatible_with([2]):
        raise ValueError(f"{name}: dropout_seed must be an integer or have shape [2] (seed, offset), got {seed.shape}")
    return seed if seed.dtype == tf.int64 else tf.cast(seed, tf.int64)
