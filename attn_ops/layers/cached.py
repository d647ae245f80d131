"""The multi-head layers with a cache: new tokens attend to those before them, and become part of the cache."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.generation.cache import KVCache
from attn_ops.layers.backend import backend, set_keras_mask
from attn_ops.layers.base import dense_reason
from attn_ops.layers.inputs import boolean, refuse_ragged
from attn_ops.layers.kept import Kept
from attn_ops.masks import mask as masks
from attn_ops.masks.mask import Mask

_STEPS = "call", "_compute_attention", "_compute_attention_mask", "_masked_softmax"


def attend(layer, cls, query, value, key, cache, cache_update_index, *, training, query_mask, key_masks, **given):
    """The call of the ``layer``, a ``cls``, with a cache: (output, cache).

    Args:
        layer, cls: one of the multi-head layers and its class, whose own steps subclasses may replace.
        query, value, key: [batch, rows, features].
        cache: `attn_ops.KVCache` (or `Kept`), or [batch, 2, max_length, heads, dim] with ``cache_update_index``.
        training: whether dropout would run, which a cache has not.
        query_mask, key_masks: bool [batch, rows] or Nones: which rows are no padding, which stands at the end.
        given: the other arguments of the call, None where they are not given.
    """
    name = type(layer).__name__
    cache = cache.cache if isinstance(cache, Kept) else cache
    _check(layer, cls, name, query, training, given)
    refuse_ragged(layer, query=query, value=value, key=key)
    own = layer._own_settings(False)
    padding = [*(boolean(x, "query_mask") for x in (query_mask, *key_masks) if x is not None)]
    options = {
        "mask": _mask(layer, given.get("attention_mask")),
        "window": None if own["window"] is None else (own["window"] - 1, own["window"] - 1),
        "scale": own["scale"],
        "rotary": layer._rotary,
        "query_seq_lengths": _counts(name, *padding) if padding else None,
        "implementation": layer.implementation,
        **layer._score_options(given.get("attention_bias")),
    }
    rows = [layer._query_dense(query), layer._key_dense(key), layer._value_dense(value)]
    if isinstance(cache, KVCache):
        if cache_update_index is not None:
            raise ValueError(f"{name}: cache_update_index goes with a tensor; a KVCache knows its lengths")
        out, cache = _with_cache(rows, cache, options)
    else:
        out, cache = _with_tensor(name, rows, cache, cache_update_index, options)
    if own["gate"]:
        out = out * layer._gate_dense(query)
    out = layer._output_dense(out)
    if query_mask is not None:
        set_keras_mask(out, query_mask)
    return out, cache


def spec(out, cache):
    """What `attend` gives in a model that is being made, with ``out`` as its output."""
    cache = cache.cache if isinstance(cache, Kept) else cache
    described = lambda x: keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))  # noqa: E731
    return out, keras.tree.map_structure(described, cache)


def _with_cache(rows, cache, options):
    heads_first = cache.layout == "BHSD"
    query, key, value = (ops.transpose(x, (0, 2, 1, 3)) if heads_first else x for x in rows)
    out, cache = backend.decode_attention(query, cache, key, value, **options)
    return ops.transpose(out, (0, 2, 1, 3)) if heads_first else out, cache


def _with_tensor(name, rows, cache, index, options):
    """With KerasHub's cache, whose rows are counted by its caller."""
    if getattr(cache, "shape", None) is None or len(cache.shape) != 5 or cache.shape[1] != 2:
        raise ValueError(
            f"{name}: cache must be an attn_ops.KVCache, or a tensor [batch, 2, max_length, heads, dim], got "
            f"{getattr(cache, 'shape', type(cache).__name__)}"
        )
    if index is None:
        raise ValueError(f"{name}: a cache that is a tensor needs cache_update_index, the position of the first new row")
    query, key, value = rows
    index = ops.broadcast_to(ops.cast(index, "int32"), (ops.shape(query)[0],))
    rotary = options.pop("rotary")
    if rotary is not None:
        query, key = (backend.rotary.rotate(name, x, rotary, 1, index) for x in (query, key))
    return backend.attend_stacked(query, cache, key, value, index, **options)


def _check(layer, cls, name, query, training, given):
    """Raises ValueError for what a call with a cache does not have."""
    refused = [what for what in ("return_attention_scores", "query_offset") if given.get(what) not in (None, False)]
    if refused:
        raise ValueError(f"{name}: a call with cache= takes no {refused[0]}")
    if training and layer._own_settings(False)["rate"]:
        raise ValueError(f"{name}: a cache is for generation, and training=True asks for dropout")
    reason = "as_in_keras=True" if layer.as_in_keras else dense_reason(layer, cls, *_STEPS)
    if reason:
        raise ValueError(f"{name}: Keras's own code has no cache, and runs here: {reason}")
    if len(query.shape) != 3 or layer._attention_sizes()[2] != 1:
        raise ValueError(f"{name}: a call with cache= takes inputs [batch, rows, features], got shape {tuple(query.shape)}")


def _mask(layer, attention_mask):
    parts = [layer.mask]
    if isinstance(attention_mask, Mask):
        parts.append(attention_mask)
    elif attention_mask is not None:
        parts.append(masks.boolean(boolean(attention_mask, "attention_mask")))
    parts = [part for part in parts if part is not None]
    return parts or None


def _counts(name, mask, *others):
    """How many rows of each sequence are no padding, int32 [batch]; they must come first, and be the same in ``others``."""
    message = f"{name}: beside a cache, padding stands at the end of the new rows, and query_mask hides earlier ones"
    ordered = ops.logical_or(mask[:, :-1], ops.logical_not(mask[:, 1:]))
    if others:
        message += ", or value_mask or key_mask hides others"
        ordered = ops.concatenate([ordered, *(ops.equal(mask, other) for other in others)], axis=1)
    known = backend.known_values(ordered)
    if known is not None and not known.all():
        raise ValueError(message)
    if known is None:
        mask = backend.asserted(mask, ordered, message)
    counts = ops.sum(ops.cast(mask, "int32"), axis=-1)
    # Compiled, nothing is asserted; more than there are the attention refuses.
    return counts if known is not None else ops.where(ops.all(ordered, axis=-1), counts, ops.shape(mask)[1] + 1)
