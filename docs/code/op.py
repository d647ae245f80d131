"""docs/guides/op.md and docs/guides/fallback.md"""

# [inputs]
import numpy as np
import tensorflow as tf

import attn_ops

query = tf.random.normal([2, 16, 4, 8], seed=1)
key = value = tf.random.normal([2, 16, 2, 8], seed=2)  # a key head for two of the query
# [/inputs]

# [signature]
out = attn_ops.scaled_dot_product_attention(
    query,  # [batch, seqlen_q, num_heads, head_dim], or without the heads, or without the batch too
    key,  # [batch, seqlen_k, num_kv_heads, head_dim]; num_kv_heads divides num_heads
    value,  # [batch, seqlen_k, num_kv_heads, value_dim]
    bias=None,  # added to the scores, broadcastable to [batch, num_heads, seqlen_q, seqlen_k]; -inf hides
    mask=None,  # True where a query may see a key: bool tensor, attn_ops.masks.Mask, or a list of them
    scale=None,  # 1 / sqrt(head_dim)
    is_causal=False,
    causal_alignment="top_left",  # or "bottom_right": the last query at the last key
    window=None,  # (left, right): keys seen before and after the query's own
    query_seq_lengths=None,  # [batch]: what lies beyond is padding, and never read
    key_value_seq_lengths=None,
    dropout_rate=0.0,
    dropout_seed=None,
    layout="BSHD",  # or "BHSD", without a copy
    return_lse=False,  # also the log-sum-exp of every row, differentiable
    query_offset=None,  # where the first query stands among the keys: decoding, chunks of a prompt
    logits_soft_cap=None,  # cap tanh(score / cap)
    alibi_slopes=None,  # [num_heads], or [batch, num_heads]; the usual ones: attn_ops.alibi_slopes(num_heads)
    relative_bias=None,  # [2 R + 1, num_heads] by clipped distance, or attn_ops.T5RelativeBias(table)
    sinks=None,  # [num_heads], logits that join every row's denominator
    implementation=None,  # "fused", "composite" or "reference" to force one
)
# [/signature]

# [gradients]
with tf.GradientTape() as tape:
    tape.watch([query, key])
    out, lse = attn_ops.scaled_dot_product_attention(query, key, key, is_causal=True, return_lse=True)
    loss = tf.reduce_mean(out**2) + 1e-4 * tf.reduce_mean(lse**2)
d_query, d_key = tape.gradient(loss, [query, key])
# [/gradients]

# [scores]
slopes = attn_ops.alibi_slopes(4)
capped = attn_ops.scaled_dot_product_attention(
    query, key, value, is_causal=True, logits_soft_cap=50.0, alibi_slopes=slopes
)

table = tf.Variable(tf.zeros([32, 4]))  # T5's buckets, learned: the gradient reaches them
t5 = attn_ops.scaled_dot_product_attention(query, key, value, relative_bias=attn_ops.T5RelativeBias(table))

sinks = tf.Variable(tf.zeros([4]))  # gpt-oss: a row may attend to nothing
sunk = attn_ops.scaled_dot_product_attention(query, key, value, window=(7, 0), sinks=sinks)
# [/scores]

# [dropout]
dropped = attn_ops.scaled_dot_product_attention(query, key, value, dropout_rate=0.2, dropout_seed=7)
again = attn_ops.scaled_dot_product_attention(query, key, value, dropout_rate=0.2, dropout_seed=7)
# [/dropout]

# [packed]
tokens = tf.random.normal([12, 4, 8])  # three sequences of 3, 5 and 4 tokens, without padding
cu_seqlens = [0, 3, 8, 12]
packed = attn_ops.varlen_attention(tokens, tokens, tokens, cu_seqlens, causal=True)

ragged = tf.RaggedTensor.from_row_splits(tokens, cu_seqlens)
the_same = attn_ops.ragged_attention(ragged, ragged, ragged, is_causal=True)

rows = tf.gather(tokens, [2, 6, 7, 11])  # a chunk of each sequence: its rows from 2, 3 and 3 on
chunk = attn_ops.varlen_attention(rows, tokens, tokens, [0, 1, 3, 4], cu_seqlens, query_offset=[2, 3, 3], causal=True)
# [/packed]

# [explain]
print(attn_ops.explain(query, key, value, is_causal=True))
# [/explain]

np.testing.assert_allclose(packed, the_same.values, rtol=1e-5)
np.testing.assert_allclose(chunk, tf.gather(packed, [2, 6, 7, 11]), atol=1e-5)
np.testing.assert_array_equal(dropped, again)
assert d_query.shape == query.shape and d_key.shape == key.shape
assert all(np.isfinite(x.numpy()).all() for x in (capped, t5, sunk, d_query, d_key))
assert attn_ops.explain(query, key, value, is_causal=True).implementation == "fused"
