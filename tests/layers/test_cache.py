"""The multi-head layers with cache=: tokens in parts give what the whole sequence gives, causal."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import masks

layers = attn_ops.layers
BATCH, TOKENS, FEATURES, MAX_LENGTH = 2, 9, 12, 11
PARTS = (4, 1, 1, 3)
LAYERS = {
    "MultiHeadAttention": lambda **options: layers.MultiHeadAttention(4, 8, **options),
    "GroupedQueryAttention": lambda **options: layers.GroupedQueryAttention(8, 4, 2, **options),
}
OPTIONS = {
    "plain": {},
    "scores": {"logits_soft_cap": 3.0, "sinks": True, "position_bias": "alibi"},
    "buckets": {"position_bias": "t5", "num_buckets": 4, "max_distance": 5, "bidirectional": False},
    "rotary": {"rotary": {"base": 100.0}},
    "mask": {"mask": masks.window(2, 0)},
    "composite": {"flash_attention": False},
}
each_layer = pytest.mark.parametrize("name", LAYERS)
_rng = np.random.default_rng(3)
X = _rng.standard_normal((BATCH, TOKENS, FEATURES)).astype("float32")


def new_cache(layer, dtype="float32", length=MAX_LENGTH, **named):
    heads = getattr(layer, "num_key_value_heads", None) or layer._num_heads
    return attn_ops.KVCache.create(BATCH, length, heads, 8, dtype, **named)


def in_parts(step, cache, x=X, parts=PARTS):
    outs, at = [], 0
    for count in parts:
        out, cache = step(x[:, at : at + count], cache, at)
        outs.append(out)
        at += count
    return np.concatenate(outs, 1), cache


def whole(layer, **given):
    return layer(X, X, use_causal_mask=True, **given)


@pytest.mark.wide(4)
@pytest.mark.parametrize("kind", ["BSHD", "BHSD", "bfloat16", "tensor"])
@pytest.mark.parametrize("options", OPTIONS)
@each_layer
def test_parts_are_the_whole(name, options, kind):
    layer = LAYERS[name](**OPTIONS[options])
    right = whole(layer)
    if kind == "tensor":
        heads = new_cache(layer).key.shape[2]
        cache = tf.zeros([BATCH, 2, MAX_LENGTH, heads, 8])
        out, cache = in_parts(lambda x, cache, at: layer(x, x, cache=cache, cache_update_index=at), cache)
    else:
        named = {"dtype": kind} if kind == "bfloat16" else {"layout": kind}
        out, cache = in_parts(lambda x, cache, at: layer(x, x, cache=cache), new_cache(layer, **named))
        assert cache.lengths.numpy().tolist() == [TOKENS] * BATCH and (kind != "bfloat16" or cache.key.dtype == kind)
    np.testing.assert_allclose(out, right, rtol=0, atol=0.03 if kind == "bfloat16" else 2e-5)


def test_arguments_of_calls():
    """A mask and a bias along the axis of the cache."""
    layer = LAYERS["MultiHeadAttention"]()
    mask = _rng.random((BATCH, 1, MAX_LENGTH)) < 0.7
    mask[..., 0] = True
    bias = _rng.standard_normal((1, 4, 1, MAX_LENGTH)).astype("float32")
    right = whole(layer, attention_mask=mask[..., :TOKENS], attention_bias=bias[..., :TOKENS])
    step = lambda x, cache, at: layer(x, x, cache=cache, attention_mask=mask, attention_bias=bias)  # noqa: E731
    np.testing.assert_allclose(in_parts(step, new_cache(layer))[0], right, rtol=0, atol=2e-5)


_OLDER = "sliding_window" not in keras.layers.GroupQueryAttention.__init__.__code__.co_varnames


@pytest.mark.parametrize(
    "options",
    [pytest.param({"sliding_window": 3}, marks=pytest.mark.skipif(_OLDER, reason="older Keras")), OPTIONS["mask"]],
)
def test_windows_of_layers_and_of_the_cache(options):
    layer = LAYERS["GroupedQueryAttention"](**options)
    right = whole(layer)
    for window in (None, 3):
        cache = new_cache(layer, length=1000, window=window)
        np.testing.assert_allclose(in_parts(lambda x, c, at: layer(x, x, cache=c), cache)[0], right, rtol=0, atol=2e-5)


def test_padded_prompts():
    """Keras's mask of the input tells how many tokens each prompt has."""
    layer = LAYERS["MultiHeadAttention"](rotary=True)
    lengths = np.array([3, 5])
    right = np.asarray(whole(layer))
    out, cache = layer(X[:, :5], X[:, :5], cache=new_cache(layer), query_mask=np.arange(5) < lengths[:, None])
    assert cache.lengths.numpy().tolist() == [3, 5]
    np.testing.assert_allclose(out[0, :3], right[0, :3], rtol=0, atol=2e-5)
    next_x = X[np.arange(BATCH), lengths][:, None]
    out, cache = layer(next_x, next_x, cache=cache)
    np.testing.assert_allclose(out[:, 0], right[np.arange(BATCH), lengths], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="padding stands at the end of the new rows"):
        layer(X[:, :2], X[:, :2], cache=cache, query_mask=[[False, True]] * 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("other", ["value_mask", "key_mask"])
def test_masks_of_the_same_rows_are_the_same(compiled, other):
    """A row is appended or not: one of them alone says nothing of which keys an earlier one hides."""
    layer = LAYERS["MultiHeadAttention"]()
    right = whole(layer)
    step = lambda *masks: layer(X, X, key=X, cache=new_cache(layer), query_mask=masks[0], **{other: masks[1]})[0]  # noqa: E731
    step = tf.function(step, autograph=False) if compiled else step
    tokens = np.arange(TOKENS) < [[TOKENS], [TOKENS - 2]]
    np.testing.assert_allclose(step(tf.constant(tokens), tf.constant(tokens))[0], right[0], rtol=0, atol=2e-5)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"{other[:5]}.*hides others"):
        step(tf.constant(tokens), tf.constant(np.arange(TOKENS) < [[TOKENS - 1], [TOKENS - 2]]))


@pytest.mark.parametrize("kind", ["KVCache", "tensor"])
@pytest.mark.parametrize("flash_attention", [None, False])
def test_padding_before_tokens_where_nothing_is_asserted(flash_attention, kind):
    """Its sequence gets no numbers, and the others theirs."""
    layer = LAYERS["MultiHeadAttention"](flash_attention=flash_attention)
    right = whole(layer)
    cache = tf.zeros([BATCH, 2, MAX_LENGTH, 4, 8]) if kind == "tensor" else new_cache(layer)
    at = {"cache_update_index": 0} if kind == "tensor" else {}
    step = lambda mask: layer(X, X, cache=cache, query_mask=mask, **at)[0]  # noqa: E731
    step = tf.function(step, autograph=False, jit_compile=True)
    mask = np.arange(TOKENS) >= [[2], [0]]
    if flash_attention is None and attn_ops.can_use_fused(*[X[:, :, None]] * 3):
        with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.InternalError)):
            step(tf.constant(mask))
    else:
        out = step(tf.constant(mask)).numpy()
        assert np.isnan(out[0]).any()
        np.testing.assert_allclose(out[1], right[1], rtol=0, atol=2e-5)


@pytest.mark.wide(2)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_generation_in_a_loop(jit_compile):
    """Two layers, a token at a time, each the output of the one before."""
    stack = [LAYERS[name](rotary=True) for name in LAYERS]
    for layer in stack:
        whole(layer)  # a function that makes weights is traced twice

    def model(x, caches):
        grown = []
        for layer, cache in zip(stack, caches):
            out, cache = layer(x, x, cache=cache)
            x = x + out
            grown.append(cache)
        return x, tuple(grown)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def generate(x):
        caches = tuple(new_cache(layer) for layer in stack)
        out, caches = model(x, caches)
        body = lambda i, x, caches: (i + 1, *model(x, caches))  # noqa: E731
        return tf.while_loop(lambda i, *_: i < 4, body, (0, out[:, -1:], caches), maximum_iterations=4)[1]

    found = generate(X[:, :3])
    sequence = tf.constant(X[:, :3])
    for _ in range(5):
        x = sequence
        for layer in stack:
            x = x + layer(x, x, use_causal_mask=True)
        sequence = tf.concat([sequence, x[:, -1:]], 1)  # what the loop feeds itself
    np.testing.assert_allclose(found, sequence[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.wide(4)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["function", "xla"])
@pytest.mark.parametrize("kind", ["KVCache", "tensor"])
@each_layer
def test_parts_in_functions(name, kind, jit_compile):
    """The position is a tensor, and the parts have other shapes."""
    layer = LAYERS[name](rotary=True)
    right = whole(layer)
    cache = new_cache(layer)
    if kind == "tensor":
        cache = tf.zeros([BATCH, 2, MAX_LENGTH, cache.key.shape[2], 8])

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(x, cache, at):
        return layer(x, x, cache=cache, **({"cache_update_index": at} if kind == "tensor" else {}))

    out, _ = in_parts(lambda x, cache, at: step(x, cache, tf.constant(at)), cache, parts=(4, 1, 4))
    np.testing.assert_allclose(out, right, rtol=0, atol=2e-5)


def test_functional_models_take_a_tensor():
    layer = LAYERS["MultiHeadAttention"]()
    x, cache, at = keras.Input((None, FEATURES)), keras.Input((2, MAX_LENGTH, 4, 8)), keras.Input((), dtype="int32")
    model = keras.Model([x, cache, at], layer(x, x, cache=cache, cache_update_index=at))
    empty, first = np.zeros((BATCH, 2, MAX_LENGTH, 4, 8), "float32"), np.zeros(BATCH, "int32")
    out, cache = model.predict([X, empty, first], verbose=0)
    np.testing.assert_allclose(out, whole(layer), rtol=0, atol=2e-5)
    assert cache[:, :, :TOKENS].any() and not cache[:, :, TOKENS:].any()


class Decoder(keras.layers.Layer):
    """A layer of a user's, whose policy is not the cache's dtype."""

    def __init__(self, **options):
        super().__init__(dtype="mixed_bfloat16", **options)
        self.attention = LAYERS["MultiHeadAttention"](dtype=self.dtype_policy)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, cache):
        return self.attention(x, x, cache=cache)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_around_ours_leave_caches_alone_without_autocast(dtype):
    decoder = Decoder(autocast=False)
    cache = new_cache(decoder.attention, dtype)
    out, grown = decoder(X, cache)
    assert [x.dtype for x in grown] == [x.dtype for x in cache] and out.dtype == "bfloat16"
    np.testing.assert_allclose(tf.cast(out, "float32"), tf.cast(whole(decoder.attention), "float32"), rtol=0, atol=0.1)
    if dtype == "int8":
        with pytest.raises(TypeError, match="key_scale in bfloat16; a layer of Keras casts what it is given, .*autocast=False"):
            Decoder()(X, cache)


@each_layer
def test_what_goes_with_no_cache(name):
    layer = LAYERS[name](dropout=0.1)
    whole(layer)
    cache = new_cache(layer)
    for given, error, message in (
        ({"cache": tf.zeros([BATCH, 2, MAX_LENGTH, cache.key.shape[2], 8])}, ValueError, "needs cache_update_index"),
        ({"cache": tf.zeros([BATCH, 3, MAX_LENGTH, 2, 8]), "cache_update_index": 0}, ValueError, "cache must be an attn_ops.KVCache"),
        ({"cache": cache, "cache_update_index": 0}, ValueError, "a KVCache knows its lengths"),
        ({"cache": cache, "query_offset": 1}, ValueError, "takes no query_offset"),
        ({"cache": cache, "return_attention_scores": True}, ValueError, "takes no return_attention_scores"),
        ({"cache": cache, "training": True}, ValueError, "training=True asks for dropout"),
        ({"cache": new_cache(layer, length=3)}, ValueError, "the cache is full"),
    ):
        with pytest.raises(error, match=message):
            layer(X, X, **given)
    assert not cache.lengths.numpy().any()
    with pytest.raises(ValueError, match="Keras's own code has no cache, and runs here: as_in_keras=True"):
        LAYERS[name](as_in_keras=True)(X, X, cache=cache)
