"""The attention functions on KerasTensors: the Keras operations of functional models, on any backend that has ours."""

from __future__ import annotations

import dataclasses
import importlib

import keras

from attn_ops.call import explanation, options, public
from attn_ops.call.shapes import compatible
from attn_ops.call.normalize import normalize, split_masks
from attn_ops.call.position_bias import T5RelativeBias
from attn_ops.masks.mask import Mask
from attn_ops.masks.structure import put_together, taken_apart
from attn_ops.models import specs

_PACKAGE = f"attn_ops.{'jax' if keras.config.backend() == 'jax' else 'tensorflow'}"
_xp, _attention, _choice = (importlib.import_module(f"{_PACKAGE}.{name}") for name in ("xp", "attention", "choice"))
_SPECS = specs.of_backend(_xp)
_TENSORS = (
    "bias",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "dropout_seed",
    "lse",
    "query_offset",
    "alibi_slopes",
    "relative_bias",
    "sinks",
)


def attention(query, key, value, given):
    """The symbolic result of `scaled_dot_product_attention` with these options; there are KerasTensors among them all."""
    own, tensors = options_and_tensors(_attention.scaled_dot_product_attention, query, key, given)
    return ScaledDotProductAttention(**own)(query, key, value, **tensors)


def attention_weights(query, key, given):
    """The symbolic result of `attention_weights` with these options; there are KerasTensors among them all."""
    own, tensors = options_and_tensors(_attention.attention_weights, query, key, given)
    return AttentionWeights(**own)(query, key, **tensors)


def options_and_tensors(function, query, key, given):
    """All options of a function as those of an operation, plain values, and those of its call, tensors."""
    arguments = public.completed(function, given)
    tensors = {what: arguments.pop(what) for what in _TENSORS if what in arguments}
    if not (arguments["scale"] is None or options.is_number(arguments["scale"])):
        tensors["scale_tensor"] = arguments.pop("scale")
    if isinstance(tensors["relative_bias"], T5RelativeBias):
        table = tensors["relative_bias"]
        tensors["relative_bias"] = table.table
        arguments["buckets"] = {"bidirectional": table.bidirectional, "max_distance": table.max_distance}
    structure, arrays = split_masks(function.__name__, arguments.pop("mask"))
    if structure is not None:
        # Take the mask apart; functions in it are evaluated for extents that must be known here.
        if structure.structured:
            axis = 1 if arguments["layout"] == "BSHD" or len(query.shape) < 4 else 2
            axis = 0 if len(query.shape) == 2 else axis
            offset = tensors["query_offset"]
            # Windows that are found may stand at the last key: not where something else counts distances.
            alone = all(tensors[name] is None for name in ("query_offset", "alibi_slopes", "relative_bias"))
            rank = len(query.shape)
            entries = query.shape[0] if rank > 2 else 1, query.shape[3 - axis] if rank == 4 else 1
            structure = structure.of_call(*entries, query.shape[axis], key.shape[axis], offset, windows=alone)
        arguments["mask_structure"] = {
            "is_causal": structure.is_causal,
            "causal_alignment": structure.causal_alignment,
            "window": structure.window,
        }
        if structure.structured:
            parts, tensors["mask_parts"] = taken_apart(structure.structured)
            arguments["mask_structure"]["structured"] = parts
        tensors["mask_lengths"] = [structure.query_lengths, structure.key_lengths]
        arrays += structure.tensors()
    tensors["mask"] = list(arrays) or None
    return arguments, tensors


class _Operation(keras.Operation):
    """What both operations share: their options, which are the functions' own, and the mask put together again."""

    def __init__(self, *, mask_structure=None, buckets=None, name=None, **options):
        super().__init__(name=name)
        self._options = options
        self._mask_structure = mask_structure
        self._buckets = buckets

    def get_config(self):
        config = {**self._options, "mask_structure": self._mask_structure, "name": self.name}
        return config if self._buckets is None else {**config, "buckets": self._buckets}

    def _arguments(self, *, mask=None, scale_tensor=None, mask_lengths=None, mask_parts=(), **tensors):
        arguments = {**self._options, **tensors, "mask": mask}
        if scale_tensor is not None:
            arguments["scale"] = scale_tensor
        if self._buckets is not None:
            arguments["relative_bias"] = T5RelativeBias(arguments["relative_bias"], **self._buckets)
        if self._mask_structure is not None:
            query_lengths, key_lengths = mask_lengths
            parts = put_together(self._mask_structure.get("structured", ()), mask_parts)
            own = {**self._mask_structure, "structured": parts}
            structure = Mask(**own, query_lengths=query_lengths, key_lengths=key_lengths)
            arguments["mask"] = [structure, *(mask or ())]
        return arguments

    def _described(self, name, query, key, value, arguments):
        """The normalised call of specifications, without an ``lse`` among the ``arguments``."""
        explanation.check_name(name, arguments["implementation"], _choice.IMPLEMENTATIONS)
        arguments = {what: x for what, x in arguments.items() if what not in ("implementation", "lse")}
        # Parts of a mask compute with their arrays, of which there are only descriptions; the shapes are checked when called.
        if isinstance(arguments["mask"], list):
            arguments["mask"] = [
                dataclasses.replace(m, structured=()) if isinstance(m, Mask) else m for m in arguments["mask"]
            ]
        return normalize(_SPECS, name, query, key, value, **arguments)


@keras.saving.register_keras_serializable(package="attn_ops")
class ScaledDotProductAttention(_Operation):
    """`scaled_dot_product_attention` as a node of a functional Keras model; made by calling that on KerasTensors."""

    def call(self, query, key, value, **tensors):
        return _attention.scaled_dot_product_attention(query, key, value, **self._arguments(**tensors))

    def compute_output_spec(self, query, key, value, **tensors):
        name = "scaled_dot_product_attention"
        call = self._described(name, query, key, value, self._arguments(**tensors))
        out, lse = call.result_shapes()
        out = keras.KerasTensor(_in_rank_of_caller(call, out, call.heads_axis()), call.query.dtype.name)
        if not call.return_lse:
            return out
        return out, keras.KerasTensor(_in_rank_of_caller(call, lse, 1), call.lse_dtype.name)


@keras.saving.register_keras_serializable(package="attn_ops")
class AttentionWeights(_Operation):
    """`attention_weights` as a node of a functional Keras model; made by calling that on KerasTensors."""

    def call(self, query, key, **tensors):
        return _attention.attention_weights(query, key, **self._arguments(**tensors))

    def compute_output_spec(self, query, key, **tensors):
        name = "attention_weights"
        arguments = self._arguments(**tensors)
        call = self._described(name, query, key, key, arguments)
        lse = call.result_shapes()[1]
        keys = call.key.shape[3 - call.heads_axis()]
        expected, given = _in_rank_of_caller(call, lse, 1), arguments.get("lse")
        if given is not None and not compatible(list(given.shape), expected):
            raise ValueError(f"{name}: lse must be what the attention returned, of shape {expected}, got {given.shape}")
        return keras.KerasTensor([*expected, keys], call.query.dtype.name)


def _in_rank_of_caller(call, extents, heads):
    """``extents``, whose heads are at ``heads``, without those that the caller's tensors lack."""
    added = call.added_axes(heads) if call.squeeze else ()
    return [extent for axis, extent in enumerate(extents) if axis not in added]
