"""Calls inside of `tf.vectorized_map`, and in Jacobians, of which TensorFlow rewrites what was traced for all examples at once."""

from __future__ import annotations

from attn_ops.tensorflow import dynamic_sizes, place


def reason_against_kernels(call, *cotangents) -> str | None:
    """Why the composite is to run ``call``, or the backward of these ``cotangents``, which TensorFlow rewrites; else None."""
    watched = any(map(place.is_watched, [*call.differentiable(), *cotangents]))
    unknown = dynamic_sizes.any_unknown(call)
    if not (watched or unknown) or not place.in_vectorization():
        return None
    why = "loses the gradients of the kernels" if watched else "has no place for what the kernels do about unknown sizes"
    return f"the call is traced by tf.vectorized_map or for a Jacobian, which {why}"
