"""The caches of KerasHub: `[batch, 2, max_length, num_kv_heads, head_dim]`, keys and values."""

from __future__ import annotations

import dataclasses
import sys

from keras import ops

from attn_ops.layers.backend import backend
from attn_ops.models.adapters import structure


def update(cache, index, key, value):
    """The keys and values to attend to, and the cache, with the new ones written from position ``index`` on.

    Without a cache these are ``key`` and ``value`` themselves, and without an index those of the cache alone. In loops the new
    rows are written into the memory of the cache.
    """
    if cache is None:
        return key, value, None
    if index is not None:
        cache = backend.append_to_cache(cache, key, value, index)
    return cache[:, 0], cache[:, 1], cache


def attended(query, cache, index, key, value, mask, **options):
    """The attention to a cache, read where it lies, and the cache with the new rows. The ``mask`` knows its structure."""
    positions = ops.broadcast_to(ops.cast(index, "int32"), (ops.shape(query)[0],))
    mask = structure.of(mask).options(options.pop("window", None))["mask"]
    return backend.attend_stacked(query, cache, key, value, positions, is_causal=False, mask=mask, **options)


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

        if cache is None or cache_update_index is None or structure.of(attention_mask) is None or in_vllm():
            return in_keras()
        query, key, value = (getattr(layer, name)(hidden_states) for name in (self.query, self.key, self.value))
        if self.norms is not None:
            query, key = (getattr(layer, name)(x) for name, x in zip(self.norms, (query, key)))
        query, key = (layer.rotary_embedding_layer(x, start_index=cache_update_index) for x in (query, key))
        window = None if self.attention.window is None else self.attention.window(layer)
        options = self.attention.score_options(layer)
        out, cache = attended(query, cache, cache_update_index, key, value, attention_mask, window=window, **options)
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
    known = structure.of(attention_mask)
    cached = cache is not None and cache_update_index is not None
    # Dropout, and rows without keys but for those of a causal mask, are the affair of the method in the middle.
    plain = not return_attention_scores and not (training and layer._dropout)
    if not (cached and plain) or known is None or known.padding is not None or in_vllm():
        scores = {"return_attention_scores": True} if return_attention_scores else {}
        more = {"cache": cache, "cache_update_index": cache_update_index, "training": training, **scores}
        return stock(query, value, key=key, attention_mask=attention_mask, **more)
    rows = (dense(x) for dense, x in ((layer._key_dense, value if key is None else key), (layer._value_dense, value)))
    out, cache = attended(
        layer._query_dense(query), cache, cache_update_index, *rows, attention_mask, scale=layer._inverse_sqrt_key_dim
    )
    return layer._output_dense(out), cache
