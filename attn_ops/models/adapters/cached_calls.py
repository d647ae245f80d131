"""The methods of KerasHub's layers that are called with a cache and the position of the new tokens."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from keras import ops

from attn_ops.models.adapters import cache as caches
from attn_ops.models.adapters import structure


def in_vllm() -> bool:
    """Whether vLLM serves this call of KerasHub's, with a cache of its own."""
    context = getattr(sys.modules.get("keras_hub.src.vllm.context"), "get_vllm_context", None)
    return context is not None and context() is not None


@dataclasses.dataclass(frozen=True)
class CachedCall:
    """The adapter of the `call` of a language model's attention, for calls with a cache and the position of the new
    tokens.

    The stock methods slice the cache into keys and values, copy both to change them, stack them again, and repeat them
    for each query head. This one writes the new rows, and reads the others where they are.

    Attributes:
        attention: the adapter of the `_compute_attention` of the same class (projected.Projected).
        query, key, value, output: the attributes with the projections.
        norms: those with the normalizations of queries and keys, if the class has them.
        normed: the attribute that says whether they are used, or None for always.
        rotary: that with the rotary embedding, or a function of the layer that returns it: called with
            (x, start_index=…).
        dropout: that with the dropout of the output, if the class has one.
    """

    attention: object
    query: str = "_query_dense"
    key: str = "_key_dense"
    value: str = "_value_dense"
    output: str = "_output_dense"
    norms: tuple[str, str] | None = None
    normed: str | None = None
    rotary: str | Callable = "rotary_embedding_layer"
    dropout: str | None = "_dropout_layer"

    def __call__(
        self,
        layer,
        stock,
        hidden_states,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        training=None,
        cache_update_mask=None,
    ):
        given = {
            "attention_mask": attention_mask,
            "cache": cache,
            "cache_update_index": cache_update_index,
            "cache_update_mask": cache_update_mask,
            "training": training,
        }
        dropped = training and self.attention.dropout is not None
        if cache is None or cache_update_index is None or structure.of(attention_mask) is None or dropped or in_vllm():
            return stock(hidden_states, **{name: x for name, x in given.items() if x is not None})
        query, key, value = (getattr(layer, name)(hidden_states) for name in (self.query, self.key, self.value))
        if self.norms is not None and (self.normed is None or getattr(layer, self.normed)):
            query, key = (getattr(layer, name)(x) for name, x in zip(self.norms, (query, key)))
        turned = self.rotary(layer) if callable(self.rotary) else getattr(layer, self.rotary)
        query, key = (turned(x, start_index=cache_update_index) for x in (query, key))
        if cache_update_mask is not None:
            key, value = _kept_where_not(cache_update_mask, cache, cache_update_index, key, value)
        options = {**self.attention.masks(layer, attention_mask, None), **self.attention.score_options(layer)}
        out, cache = caches.attended(query, cache, cache_update_index, key, value, **options)
        if self.dropout is not None:
            out = getattr(layer, self.dropout)(out, training=training)
        return getattr(layer, self.output)(out), cache


def _kept_where_not(updated, cache, index, *rows):
    """The new ``rows``, and where ``updated``, bool `[batch, rows]`, is false those that the cache has there."""
    halves = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
    updated = ops.reshape(updated, (*ops.shape(updated), 1, 1))
    return [ops.where(updated, new, ops.slice(old, (0, index, 0, 0), ops.shape(new))) for old, new in zip(halves, rows)]


def multi_head_call(
    layer,
    stock,
    query,
    value,
    key=None,
    attention_mask=None,
    cache=None,
    cache_update_index=None,
    return_attention_scores=False,
    training=None,
):
    """`CachedMultiHeadAttention.call`, for calls with a cache and the position of the new tokens."""
    known = structure.of(attention_mask)
    cached = cache is not None and cache_update_index is not None
    # Dropout, and rows without keys but for those of a causal mask, are the affair of the method in the middle.
    plain = not return_attention_scores and not (training and layer._dropout)
    if not (cached and plain) or known is None or known.padding is not None or in_vllm():
        scores = {"return_attention_scores": True} if return_attention_scores else {}
        more = {"cache": cache, "cache_update_index": cache_update_index, "training": training, **scores}
        return stock(query, value, key=key, attention_mask=attention_mask, **more)
    rows = (dense(x) for dense, x in ((layer._key_dense, value if key is None else key), (layer._value_dense, value)))
    options = {"scale": layer._inverse_sqrt_key_dim, **known.options()}
    out, cache = caches.attended(layer._query_dense(query), cache, cache_update_index, *rows, **options)
    return layer._output_dense(out), cache


def partly_rotary(layer):
    """The rotary embedding of GPT-OSS, of the first elements of a head."""
    size = layer._rotary_dim

    def turned(x, start_index):
        if size >= layer._head_dim:
            return layer.rotary_embedding_layer(x, start_index=start_index)
        first = layer.rotary_embedding_layer(x[..., :size], start_index=start_index)
        return ops.concatenate([first, x[..., size:]], axis=-1)

    return turned
