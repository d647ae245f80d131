"""The caches of KerasHub: `[batch, 2, max_length, num_kv_heads, head_dim]`, keys and values."""

from __future__ import annotations

import dataclasses
import sys

from keras import ops

from attn_ops.layers.backend import backend
from attn_ops.layers.common import attend
from attn_ops.models.adapters import structure


def update(cache, index, key, value):
    """The keys and values to attend to, and the cache, with the new ones written from position ``index`` on.

    Without a cache these are ``key`` and ``value`` themselves, and without an index those of the cache alone. In loops the new
    rows are written into the memory of the cache.
    """
    if cache is None:
        return key, value, None
    if index is not None:
        cache = backend.append.append_to_cache(cache, key, value, index)
    if cache.shape[0] == 1:  # two slices of the first axis are no copies
        both = ops.reshape(cache, (2, *cache.shape[2:]) if None not in cache.shape[2:] else (2, -1, *cache.shape[3:]))
        return both[:1], both[1:], cache
    return cache[:, 0], cache[:, 1], cache


def in_vllm() -> bool:
    """Whether vLLM serves this call of KerasHub's, with a cache of its own."""
    context = getattr(sys.modules.get("keras_hub.src.vllm.context"), "get_vllm_context", None)
    return context is not None and context() is not None


@dataclasses.dataclass(frozen=True)
class CachedCall:
    """The adapter of the `call` of a language model's attention, for calls with a cache and the position of the new tokens.

    The stock methods slice the cache into keys and values, copy both to change them, stack them again, and repeat them for
    each query head. This one writes the new rows, and reads the others where they are.

    Attributes:
        attention: the adapter of the `_compute_attention` of the same class (projected.Projected).
        query, key, value, output: the attributes with the projections.
        norms: those with the normalizations of queries and keys, if the class has them.
        dropout: that with the dropout of the output.
    """

    attention: object
    query: str = "_query_dense"
    key: str = "_key_dense"
    value: str = "_value_dense"
    output: str = "_output_dense"
    norms: tuple[str, str] | None = None
    dropout: str = "_dropout_layer"

    def __call__(
        self, layer, stock, hidden_states, attention_mask=None, cache=None, cache_update_index=None, training=None
    ):
        def in_keras():
            given = {"cache": cache, "cache_update_index": cache_update_index, "training": training}
            return stock(hidden_states, attention_mask=attention_mask, **given)

        if cache is None or cache_update_index is None or in_vllm():
            return in_keras()
        options = self.attention.masks(layer, attention_mask, cache_update_index)
        if options is None:
            return in_keras()
        query, key, value = (getattr(layer, name)(hidden_states) for name in (self.query, self.key, self.value))
        if self.norms is not None:
            query, key = (getattr(layer, name)(x) for name, x in zip(self.norms, (query, key)))
        query, key = (layer.rotary_embedding_layer(x, start_index=cache_update_index) for x in (query, key))
        key, value, cache = update(cache, cache_update_index, key, value)
        out = self.attention.attend(layer, query, key, value, options)
        out = getattr(layer, self.output)(getattr(layer, self.dropout)(out, training=training))
        return out, cache


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
    given = {"training": training, **({"return_attention_scores": True} if return_attention_scores else {})}
    options = None
    if cache is not None and cache_update_index is not None and not in_vllm() and not return_attention_scores:
        options = structure.options(attention_mask)
    # Dropout, and rows without keys but for those of a causal mask, are the affair of the method in the middle.
    if not options or training and layer._dropout or not _every_row_sees(attention_mask):
        more = {"cache": cache, "cache_update_index": cache_update_index}
        return stock(query, value, key=key, attention_mask=attention_mask, **more, **given)
    key = value if key is None else key
    rows = layer._key_dense(key), layer._value_dense(value)
    keys, values, cache = update(cache, cache_update_index, *rows)
    out, _ = attend(
        layer._query_dense(query),
        keys,
        values,
        mask=options.pop("mask"),
        scale=layer._inverse_sqrt_key_dim,
        implementation=None,
        dropout_rate=None,
        dropout_seed=None,
        **options,
    )
    return layer._output_dense(out), cache


def _every_row_sees(mask):
    known = structure.of(mask)
    return known is not None and known.padding is None
