"""docs/guides/generation.md"""

# [cache]
import numpy as np
import tensorflow as tf

import attn_ops

cache = attn_ops.KVCache.create(batch=1, max_length=4096, num_kv_heads=2, head_dim=16)

prompt = tf.random.normal([1, 12, 8, 16]), tf.random.normal([1, 12, 2, 16]), tf.random.normal([1, 12, 2, 16])
out, cache = attn_ops.decode_attention(prompt[0], cache, *prompt[1:])  # a prompt, whole or in parts

token = tf.random.normal([1, 1, 8, 16]), tf.random.normal([1, 1, 2, 16]), tf.random.normal([1, 1, 2, 16])
out, cache = attn_ops.decode_attention(token[0], cache, *token[1:])  # a token, or several at once
# [/cache]

# [window]
rolling = attn_ops.KVCache.create(1, 4096, 2, 16, window=64)  # memory of the window, not of the text
# [/window]

# [layer]
layer = attn_ops.layers.GroupedQueryAttention(head_dim=16, num_query_heads=8, num_key_value_heads=2, rotary=True)
x = tf.random.normal([1, 12, 64])
layer_cache = attn_ops.KVCache.create(1, 128, num_kv_heads=2, head_dim=16)
read, layer_cache = layer(x, x, cache=layer_cache)
next_token = tf.random.normal([1, 1, 64])
written, layer_cache = layer(next_token, next_token, cache=layer_cache)
# [/layer]

# [rewind]
tried, longer = attn_ops.decode_attention(token[0], cache, *token[1:])
cache = longer.rewind([13])  # speculative decoding: without what was tried and not taken
# [/rewind]

# [int8]
small = attn_ops.KVCache.create(1, 4096, 2, 16, "int8")  # a quarter of float32's memory, and a scale per row and head
rounded, small = attn_ops.decode_attention(prompt[0], small, *prompt[1:])
# [/int8]

# [pages]
pool = attn_ops.PagedKVCache.create(num_pages=64, page_size=16, num_kv_heads=2, head_dim=16, dtype="float32")
first = pool.allocate()
pool.append(first, *prompt[1:])
second = pool.fork(first)  # shares the pages of the prompt
pool.append(second, *token[1:])  # and has the last one, half full, to itself from here on
of_second = attn_ops.paged_attention(token[0], *pool.pages[0], pool.block_table([second]), pool.lengths([second]))
pool.free(first)
# [/pages]

whole = attn_ops.scaled_dot_product_attention(*(tf.concat(pair, 1) for pair in zip(prompt, token)), is_causal=True)
np.testing.assert_allclose(out, whole[:, -1:], rtol=1e-4, atol=1e-5)
both = tf.concat([x, next_token], 1)
np.testing.assert_allclose(written, layer(both, both, use_causal_mask=True)[:, -1:], rtol=1e-3, atol=1e-5)
assert rolling.rows < 128 and cache.lengths.numpy().tolist() == [13] and longer.lengths.numpy().tolist() == [14]
assert read.shape == x.shape and tried.shape == (1, 1, 8, 16)
np.testing.assert_allclose(of_second, whole[:, -1:], rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(rounded, whole[:, :-1], rtol=0, atol=0.05)
