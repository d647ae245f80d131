"""Rotary position embedding as a layer."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.call.options import is_integer
from attn_ops.call.rotary import Rotary
from attn_ops.layers.backend import backend
from attn_ops.layers.base import checked_number
from attn_ops.layers.inputs import refuse_ragged


@keras.saving.register_keras_serializable(package="attn_ops")
class RotaryEmbedding(keras.layers.Layer):
    """:func:`attn_ops.rotary_embedding` as a layer without weights, with the arguments of
    `keras_hub.layers.RotaryEmbedding`.

    Args:
        max_wavelength: The base of the wavelengths.
        scaling_factor: What positions are divided by.
        sequence_axis, feature_axis: Of the input.
        rotary_dim: How many features turn, the first ones; None for all.
        interleaved: Whether pairs are features 2 i and 2 i + 1; otherwise i and i + rotary_dim / 2, as in KerasHub.
        scaling: As in :func:`attn_ops.rotary_embedding`; not together with `scaling_factor`.

    Call arguments:
        inputs: Float, of any shape with the batch first: `[batch, seqlen, num_heads, head_dim]` for the default axes.
        start_index: The first position, an integer or integers `[batch]`: for decoding.
        positions: Integers `[seqlen]` or `[batch, seqlen]` instead; None counts from `start_index`.

    Returns:
        The shape and dtype of the input.

    Raises:
        TypeError, ValueError: As :func:`attn_ops.rotary_embedding`; axes that are the same or not there; both
            `positions` and `start_index`.
    """

    def __init__(
        self,
        max_wavelength=10000,
        scaling_factor=1.0,
        sequence_axis=1,
        feature_axis=-1,
        rotary_dim=None,
        interleaved=False,
        scaling=None,
        **kwargs,
    ):
        name = type(self).__name__
        factor = checked_number(name, "scaling_factor", scaling_factor)
        if factor <= 0.0:
            raise ValueError(f"{name}: scaling_factor must be positive, got {scaling_factor}")
        if factor != 1.0 and scaling is not None:
            raise ValueError(
                f"{name}: scaling_factor and scaling both change the wavelengths, got {scaling_factor} and {scaling!r}"
            )
        for what, axis in (("sequence_axis", sequence_axis), ("feature_axis", feature_axis)):
            if not is_integer(axis):
                raise TypeError(f"{name}: {what} must be an integer, got {axis!r}")
        rotary = Rotary.of(
            name, max_wavelength, rotary_dim, interleaved, ("linear", factor) if factor != 1.0 else scaling
        )
        super().__init__(**kwargs)
        self.supports_masking = True
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.sequence_axis = int(sequence_axis)
        self.feature_axis = int(feature_axis)
        self.rotary_dim = rotary.rotary_dim
        self.interleaved = rotary.interleaved
        self._rotary = rotary
        self._given_scaling = None if factor != 1.0 else rotary.config().get("scaling")
        self.built = True

    def call(self, inputs, start_index=0, positions=None):
        refuse_ragged(self, inputs=inputs)
        name = type(self).__name__
        sequence, features = self._axes(inputs.shape)
        if positions is not None and not (is_integer(start_index) and start_index == 0):
            raise ValueError(f"{name}: give positions or start_index, not both")
        last = len(inputs.shape) - 1
        if features != last:
            inputs = ops.moveaxis(inputs, features, last)
            sequence -= sequence > features
        out = backend.rotary.rotate(name, inputs, self._rotary, sequence, start_index, positions)
        return out if features == last else ops.moveaxis(out, last, features)

    def _axes(self, shape):
        rank = len(shape)
        axes = [axis + rank if axis < 0 else axis for axis in (self.sequence_axis, self.feature_axis)]
        if not all(0 <= axis < rank for axis in axes) or axes[0] == axes[1]:
            raise ValueError(
                f"{type(self).__name__}: sequence_axis={self.sequence_axis} and feature_axis={self.feature_axis} must be "
                f"two axes of the input, got shape {tuple(shape)}"
            )
        return axes

    def compute_output_spec(self, inputs, start_index=0, positions=None):
        _, features = self._axes(inputs.shape)
        self._rotary.width(type(self).__name__, inputs.shape[features])
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
            "sequence_axis": self.sequence_axis,
            "feature_axis": self.feature_axis,
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "scaling": self._given_scaling,
        }
