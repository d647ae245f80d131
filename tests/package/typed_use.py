"""The public names as programs use them, for type checkers (test_typing.py): of the lines here they refuse those marked
`wrong`, and no others."""

from typing import Any

import keras
import numpy as np

import attn_ops
import attn_ops.jax
from attn_ops import integration, masks, reference, visualize
from attn_ops.jax import parallel
from attn_ops.layers import (
    Attention,
    AttentionLayer,
    AttentionLayerWithWeights,
    GroupedQueryAttention,
    GroupQueryAttention,
    HierarchicalAttention,
    MultiHeadAttention,
    RotaryEmbedding,
    SelfAttention,
)

Array = np.ndarray[Any, np.dtype[np.float32]]


def op(q: Array) -> None:
    out = attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True, bias=q, window=(3, None), dropout_rate=0.1)
    out, lse = attn_ops.scaled_dot_product_attention(q, q, q, mask=masks.causal(), return_lse=True, implementation="fused")
    print(out.shape, lse)
    attn_ops.attention_weights(q, q, lse=lse)
    attn_ops.varlen_attention(q, q, q, [0, 3], [0, 3])
    attn_ops.ragged_attention(q, q, q)
    attn_ops.merge_attention([out, out], [lse, lse])
    attn_ops.rotary_embedding(q, [0, 1])
    slopes: Array = attn_ops.alibi_slopes(8)
    attn_ops.scaled_dot_product_attention(q, q, q, alibi_slopes=slopes, relative_bias=attn_ops.T5RelativeBias(q))
    support: attn_ops.Support = attn_ops.can_use_fused(q, q, q)
    explanation: attn_ops.Explanation = attn_ops.explain(q, q, q)
    print(support.reasons, explanation.implementation)
    attn_ops.set_allow_tf32(True)
    allowed: bool = attn_ops.allow_tf32()
    print(allowed, attn_ops.__version__.split("."))
    attn_ops.load_library()
    reference.attention(q, q, q)


def op_wrong(q: Array) -> None:
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_p=0.1)  # wrong
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_rate="a")  # wrong
    attn_ops.flash(q, q, q)  # wrong
    masks.causl()  # wrong
    attn_ops.jax.scaled_dot_product_attention(q, q, q, dropout_p=0.1)  # wrong
    parallel.ring(q, q, q, method="ring")  # wrong
    visualize.plot_heds(q)  # wrong
    attn_ops.models.registr(q)  # wrong
    MultiHeadAttention(2, 4, sink=True, use_bias=True, num_buckets=3).call(q)  # wrong
    attn_ops.KVCache.create(1, 8, 2)  # wrong
    whom([1]).windo  # wrong


def whom(lengths: list[int]) -> masks.Mask:
    seen = masks.causal() & masks.window(left=3) & masks.padding(key_lengths=lengths) & masks.prefix(3)
    seen = seen & masks.from_function(lambda b, h, q, k: q >= k) & masks.chunked(2) & masks.packed([0, 3])
    seen = seen & masks.segments([[0, 0]]) & masks.block_sparse(np.ones((2, 2), bool), 2, 2) & masks.intervals([0], [1])
    seen = seen & masks.boolean(np.ones((2, 2), bool)) & masks.key_padding(np.ones((2, 2), bool))
    print(seen.show(8, 8), seen.materialize(8, 8))
    return seen


def caches(q: Array) -> None:
    cache = attn_ops.KVCache.create(1, 8, 2, 4)
    out, cache = attn_ops.decode_attention(q, cache, q, q, rotary=True)
    print(cache.lengths, out)
    pool = attn_ops.PagedKVCache.create(8, 16, 2, 4)
    table, lengths = pool.reserve([pool.allocate()], 1)
    keys, values = pool.pages[0]
    attn_ops.paged_attention(q, keys, values, table, lengths, q, q)
    print(pool.num_free_pages, cache.max_length)


def layers(x: keras.KerasTensor) -> keras.Model:
    y = MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.1)(x, x, use_causal_mask=True, attention_bias=None)
    y, scores = MultiHeadAttention(2, 4, name="m")(y, y, return_attention_scores=True)
    y = GroupedQueryAttention(4, 4, 2)(y, y)
    y = GroupQueryAttention(4, 4, 2)(y, y)
    y = Attention(use_scale=True)([y, y])
    y = AttentionLayer()([y, y, y])
    y, weights = AttentionLayerWithWeights()([y, y, y])
    y = SelfAttention(8)(y)
    y = RotaryEmbedding()(y)
    print(scores, weights, HierarchicalAttention(4))
    return keras.Model(x, y)


def models(model: keras.Model) -> None:
    attn_ops.convert(model).summary()
    print(attn_ops.explain(model).to_dict())
    attn_ops.revert(model)
    with attn_ops.patched(model):
        model.predict(np.zeros((1, 2, 8)))
    attn_ops.patch()
    attn_ops.unpatch()
    attn_ops.export(model, "directory")
    seen = visualize.attention(model, np.zeros((1, 2, 8)))
    visualize.viewer(seen)
    visualize.plot_heads(seen)
    attn_ops.models.register(keras.layers.Layer, print)
    print(integration)


def on_jax(q: Array) -> None:
    out, lse = attn_ops.jax.scaled_dot_product_attention(q, q, q, is_causal=True, return_lse=True)
    attn_ops.jax.merge_attention([out], [lse])
    out, cache = attn_ops.jax.decode_attention(q, attn_ops.jax.KVCache.create(1, 8, 2, 4, framework="jax"), q, q)
    parallel.context_parallel(q, q, q, axis="sequence", method="ring", order="zigzag")
    parallel.ring(parallel.zigzag(q, 2), q, q, axis="sequence")
    print(attn_ops.jax.explain(q, q, q), cache)
