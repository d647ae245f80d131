"""scaled_dot_product_attention on KerasTensors: the Keras operation of functional models."""

from __future__ import annotations

import keras

from . import functional, options, support
from .arguments import split_masks
from .masks import Mask

_TENSORS = ("bias", "query_seq_lengths", "key_value_seq_lengths", "dropout_seed")


def attention(query, key, value, *, mask=None, **arguments):
    """The symbolic result of `scaled_dot_product_attention` for arguments among which are KerasTensors."""
    tensors = {name: arguments.pop(name) for name in _TENSORS}
    if not (arguments["scale"] is None or options.is_number(arguments["scale"])):
        tensors["scale_tensor"] = arguments.pop("scale")
    structure, arrays = split_masks("scaled_dot_product_attention", mask)
    if structure is not None:
        # The options of an operation must be plain values, and tensors its arguments: take the mask apart.
        arguments["mask_structure"] = {
            "is_causal": structure.is_causal,
            "causal_alignment": structure.causal_alignment,
            "window": structure.window,
        }
        tensors["mask_lengths"] = [structure.query_lengths, structure.key_lengths]
        arrays += structure.tensors()
    operation = ScaledDotProductAttention(**arguments)
    return operation(query, key, value, mask=list(arrays) or None, **tensors)


@keras.saving.register_keras_serializable(package="attn_ops")
class ScaledDotProductAttention(keras.Operation):
    """`scaled_dot_product_attention` as a node of a functional Keras model; made by calling that on KerasTensors."""

    def __init__(
        self,
        scale=None,
        is_causal=False,
        causal_alignment="top_left",
        window=None,
        dropout_rate=0.0,
        layout="BSHD",
        return_lse=False,
        implementation=None,
        mask_structure=None,
        name=None,
    ):
        super().__init__(name=name)
        self._options = {
            "scale": scale,
            "is_causal": is_causal,
            "causal_alignment": causal_alignment,
            "window": window,
            "dropout_rate": dropout_rate,
            "layout": layout,
            "return_lse": return_lse,
            "implementation": implementation,
        }
        self._mask_structure = mask_structure

    def get_config(self):
        return {**self._options, "mask_structure": self._mask_structure, "name": self.name}

    def _arguments(self, mask, scale_tensor, mask_lengths, tensors):
        arguments = {**self._options, **tensors, "mask": mask}
        if scale_tensor is not None:
            arguments["scale"] = scale_tensor
        if self._mask_structure is not None:
            query_lengths, key_lengths = mask_lengths
            structure = Mask(**self._mask_structure, query_lengths=query_lengths, key_lengths=key_lengths)
            arguments["mask"] = [structure, *(mask or ())]
        return arguments

    def call(self, query, key, value, mask=None, scale_tensor=None, mask_lengths=None, **tensors):
        arguments = self._arguments(mask, scale_tensor, mask_lengths, tensors)
        return functional.scaled_dot_product_attention(query, key, value, **arguments)

    def compute_output_spec(self, query, key, value, mask=None, scale_tensor=None, mask_lengths=None, **tensors):
        arguments = self._arguments(mask, scale_tensor, mask_lengths, tensors)
        implementation = arguments.pop("implementation")
        name = "scaled_dot_product_attention"
        call = support.described(name, query, key, value, arguments)
        support.check_name(name, implementation)
        out, lse = call.result_shapes()
        if call.squeeze:
            del out[2 if call.layout == "BSHD" else 1], lse[1]
        out = keras.KerasTensor(out, call.query.dtype.name)
        return (out, keras.KerasTensor(lse, call.lse_dtype.name)) if call.return_lse else out
