"""What the multi-head layers can do to scores beside Keras's: caps, sinks, biases by distance, masks of attn_ops, rotation."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from attn_ops.call import options
from attn_ops.call.position_bias import T5RelativeBias, alibi_slopes
from attn_ops.call.rotary import from_option
from attn_ops.layers.backend import backend, set_keras_mask
from attn_ops.layers.base import DropIn, dense_reason
from attn_ops.layers.inputs import are_ragged, padding
from attn_ops.layers.kept import kept
from attn_ops.masks import constructors
from attn_ops.masks.config import config_of, from_config
from attn_ops.masks.mask import Mask, combined

_POSITION_BIASES = (None, "alibi", "t5")


class ScoreOptions(DropIn):
    """Mixin of the multi-head layers, between them and the stock one. Each option is saved in the config only where it is
    given, so that the configs of the stock layers stay theirs."""

    # The defaults of a stock layer whose class was changed to ours (`attn_ops.convert`).
    logits_soft_cap = None
    position_bias = None
    num_buckets = 32
    max_distance = 128
    bidirectional = None
    mask = None
    sinks = None  # the weight
    relative_attention_bias = None  # the weight
    _use_sinks = False
    _rotary = None
    _OWN = {
        **DropIn._OWN,
        "logits_soft_cap": None,
        "sinks": False,
        "position_bias": None,
        "num_buckets": 32,
        "max_distance": 128,
        "bidirectional": None,
        "mask": None,
        "rotary": None,
    }

    def __init__(
        self,
        *args,
        logits_soft_cap=None,
        sinks=False,
        position_bias=None,
        num_buckets=32,
        max_distance=128,
        bidirectional=None,
        mask=None,
        rotary=None,
        **kwargs,
    ):
        name = type(self).__name__
        logits_soft_cap = options.logits_soft_cap(name, logits_soft_cap, in_float64=True)
        sinks = options.flag(name, "sinks", sinks)
        if position_bias not in _POSITION_BIASES:
            raise ValueError(f"{name}: position_bias must be None, 'alibi' or 't5', not {position_bias!r}")
        if bidirectional not in (None, True, False):
            raise ValueError(f"{name}: bidirectional must be None, True or False, not {bidirectional!r}")
        mask = _checked_mask(name, mask)
        rotary = from_option(name, rotary)
        super().__init__(*args, **kwargs)
        self.logits_soft_cap = logits_soft_cap
        self._use_sinks = sinks
        self.position_bias = position_bias
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.mask = mask
        self._rotary = rotary
        if position_bias == "t5":
            if not options.is_integer(num_buckets):
                raise TypeError(f"{name}: num_buckets must be an integer, got {num_buckets!r}")
            self._t5(np.zeros((num_buckets, 1))).buckets(name, num_buckets)  # refuses what cannot be
        if self.as_in_keras:
            self._refuse_beyond_stock("as_in_keras=True")

    def build(self, query_shape, value_shape, key_shape=None):
        if not isinstance(self, ScoreOptions):  # not built when `revert` changed its class: Keras kept the first one's method
            return type(self).build(self, query_shape, value_shape, key_shape)
        super().build(query_shape, value_shape, key_shape)
        heads, key_dim, num_axes = self._attention_sizes()
        name = type(self).__name__
        needs_order = [what for what in self.beyond_stock() if what in ("position_bias", "mask", "rotary")]
        if needs_order and num_axes != 1:
            raise ValueError(f"{name}: {needs_order[0]} needs exactly one attention axis, and there are {num_axes}")
        if self._rotary is not None:
            self._rotary.width(name, key_dim)
        # The attention takes them in float32 beside inputs of 16 bits.
        if self._use_sinks:
            self.sinks = self.add_weight(
                name="sinks", shape=(heads,), initializer=keras.initializers.RandomNormal(stddev=0.02), autocast=False
            )
        if self.position_bias == "t5":
            self.relative_attention_bias = self.add_weight(
                name="relative_attention_bias",
                shape=(self.num_buckets, heads),
                initializer=keras.initializers.RandomNormal(stddev=query_shape[-1] ** -0.5),
                autocast=False,
            )

    def __call__(self, *args, **kwargs):
        if kwargs.get("cache") is not None:
            kwargs["cache"] = kept(kwargs["cache"])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mask) and any(isinstance(x, keras.KerasTensor) for x in (*args, *kwargs.values())):
            kwargs["attention_mask"] = MaskOfCall.of(mask)
        return super().__call__(*args, **kwargs)

    @property
    def rotary(self):
        """How queries and keys turn: None, True for the defaults, or a dict of those that are others."""
        return None if self._rotary is None else self._rotary.config() or True

    def beyond_stock(self, **given):
        own = {
            "logits_soft_cap": self.logits_soft_cap,
            "sinks": self._use_sinks or None,
            "position_bias": self.position_bias,
            "mask": self.mask,
            "rotary": self._rotary,
        }
        return [*present(**own, **given)]

    def _refuse_masks(self, reason, attention_mask):
        """ValueError where Keras's dense mask, which is made for this ``reason``, would have to hold one of attn_ops."""
        given = attention_mask if isinstance(attention_mask, Mask) else self.mask
        if given is not None:
            raise ValueError(
                f"{type(self).__name__}: Keras's own code has no masks of attn_ops, and runs here: {reason}"
            )

    def _refuse_in_keras(self, attention_mask, **given):
        """ValueError where a layer with `as_in_keras` is asked for what Keras does not have."""
        if self.as_in_keras:
            self._refuse_beyond_stock("as_in_keras=True", **given)
            self._refuse_masks("as_in_keras=True", attention_mask)

    def _refuse_symbolic_mask(self, attention_mask):
        """ValueError for a mask object that holds tensors of a Keras model, which does not see them as inputs."""
        if isinstance(attention_mask, Mask) and any(
            isinstance(x, keras.KerasTensor) for x in attention_mask.arrays()
        ):
            raise ValueError(
                f"{type(self).__name__}: attention_mask holds a tensor of a Keras model, which would not be an input of this "
                f"layer: pass boolean tensors, as attention_mask, value_mask or query_mask; got {attention_mask!r}"
            )

    def _attend_if_ragged(
        self,
        cls,
        query,
        key,
        value,
        training,
        *,
        query_mask,
        value_mask,
        key_mask,
        attention_mask,
        use_causal_mask,
        return_attention_scores,
        attention_bias,
        query_offset,
    ):
        """The layer, a ``cls``, on ragged `[batch, (seqlen), features]`: a ragged one of the query's row lengths. None where
        they are dense.

        The layer's `_own_settings` are its scale, the rate and the seed of its dropout, Keras's window, and whether it has a
        gate. Masks of positions are ragged too.
        """
        padded = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "attention_mask": attention_mask,
            "return_attention_scores": return_attention_scores,
            "attention_bias": attention_bias,
        }
        if not are_ragged(self, padded, query=query, value=value, key=key):
            return None
        name = type(self).__name__
        steps = "call", "_compute_attention", "_masked_softmax"
        reason = "as_in_keras=True" if self.as_in_keras else dense_reason(self, cls, *steps)
        self._refuse_ragged_in_keras(reason)
        own = self._own_settings(training)
        window = own["window"]
        window = None if window is None else (window - 1, window - 1)
        mask = [x for x in (self.mask, attention_mask) if x is not None]
        mask = combined(mask, is_causal=use_causal_mask, window=window)
        lengths = mask.query_lengths is not None or mask.key_lengths is not None
        if lengths or mask.dense or not all(part.stands for part in mask.structured):
            raise ValueError(
                f"{name}: of masks a call with ragged tensors has those that go by positions (causal, window, prefix, "
                f"chunked), got {mask!r}"
            )
        if query_mask is not None:
            mask &= constructors.query_padding(padding(self, query_mask, query, "query_mask"))
        for of_keys in {id(x): x for x in (value_mask, key_mask) if x is not None}.values():
            mask &= constructors.key_padding(padding(self, of_keys, key, "value_mask"))
        tokens = backend.tokens(name, query, key, value, query_offset)
        turned_query, turned_key = self._rotated(
            self._query_dense(tokens.query), self._key_dense(tokens.key), positions=tokens.positions
        )
        out = tokens.attend(
            turned_query,
            turned_key,
            self._value_dense(tokens.value),
            mask=mask,
            scale=own["scale"],
            implementation=self.implementation,
            **({} if own["seed"] is None else {"dropout_rate": own["rate"], "dropout_seed": own["seed"]}),
            **self._score_options(query_offset=query_offset),
        )
        if own["gate"]:
            out = out * self._gate_dense(tokens.query)
        out = tokens.ragged(self._output_dense(out))
        if query_mask is not None:
            set_keras_mask(out, query_mask)
        return out

    def _score_options(self, attention_bias=None, query_offset=None):
        """The options of the attention, those that are in effect."""
        given = {"bias": attention_bias, "query_offset": query_offset, "logits_soft_cap": self.logits_soft_cap}
        if self._use_sinks:
            given["sinks"] = keras.ops.convert_to_tensor(self.sinks)
        if self.position_bias == "alibi":
            given["alibi_slopes"] = alibi_slopes(self._attention_sizes()[0])
        if self.position_bias == "t5":
            given["relative_bias"] = self._t5(keras.ops.convert_to_tensor(self.relative_attention_bias))
        return present(**given)

    def _rotated(self, query, key, query_offset=None, positions=(None, None)):
        """Queries and keys `[batch, seqlen, num_heads, head_dim]` turned by their positions, where they are to be."""
        if self._rotary is None:
            return query, key
        name = type(self).__name__
        return (
            backend.rotary.rotate(name, query, self._rotary, 1, query_offset, positions[0]),
            backend.rotary.rotate(name, key, self._rotary, 1, None, positions[1]),
        )

    def _t5(self, table):
        bidirectional = self.bidirectional
        if bidirectional is None:
            bidirectional = not (self.mask is not None and self.mask.is_causal)
        return T5RelativeBias(table, bidirectional, self.max_distance)

    def get_config(self):
        config = super().get_config()
        name = type(self).__name__
        own = {
            "logits_soft_cap": self.logits_soft_cap,
            "sinks": self._use_sinks,
            "position_bias": self.position_bias,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "mask": None if self.mask is None else config_of(f"{name}.get_config", self.mask),
            "rotary": self.rotary,
        }
        return {**config, **{what: x for what, x in own.items() if x != ScoreOptions._OWN[what]}}


@keras.saving.register_keras_serializable(package="attn_ops")
class MaskOfCall(Mask):
    """A mask as an argument of a call, which Keras saves with a functional model."""

    @classmethod
    def of(cls, mask):
        return cls(**{field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)})

    def get_config(self):
        return config_of("attn_ops.masks", self)

    @classmethod
    def from_config(cls, config):
        return cls.of(from_config(config))


def present(**given):
    """Those that are not None."""
    return {what: x for what, x in given.items() if x is not None}


def _checked_mask(name, mask):
    """The constructor's mask, also from a config."""
    if isinstance(mask, dict):
        return from_config(mask)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"{name}: mask must be an object of attn_ops.masks, got {type(mask).__name__}")
    if mask is not None and any(isinstance(x, keras.KerasTensor) for x in mask.arrays()):
        raise TypeError(f"{name}: mask holds a tensor of a Keras model, and is fixed when the layer is made: {mask!r}")
    return mask
