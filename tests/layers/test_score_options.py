"""What the multi-head layers do beyond Keras's: biases, caps, sinks, positions, masks, rotation; against NumPy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import masks
from layer_twins import FLASH, STOCK, assert_same, ours, random, twins

CONFIGS = {
    "MultiHeadAttention": dict(num_heads=4, key_dim=4),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
}
T = 6
ROWS, KEYS = np.arange(T)[:, None], np.arange(T)
CAUSAL = KEYS <= ROWS
BIAS = np.random.default_rng(5).normal(size=(4, T, T))
SLOPES = 2.0 ** (-2.0 * np.arange(1, 5))  # of four heads
BLOCKS = np.array([[True, False, True], [True, True, False], [False, True, True]])
KEPT = np.random.default_rng(6).random((2, 1, 1, T)) > 0.3
each_layer = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def made(name, flash, **config):
    """The layer, built, with random weights; the new ones large enough to matter."""
    layer = ours(name)(**{**CONFIGS[name], "dtype": "float64", "flash_attention": flash, **config})
    layer.build((2, T, 8), (2, T, 8))
    rng = np.random.default_rng(7)
    layer.set_weights([rng.normal(size=w.shape) * (1.0 if w.ndim < 3 else 0.5) for w in layer.weights])
    return layer


def turned(x, start=0):
    """Pairs (i, i + dim / 2) of x [batch, seqlen, heads, dim] as complex numbers, turned by position * 10000^(-2 i / dim)."""
    half = x.shape[-1] // 2
    angles = (start + np.arange(x.shape[1]))[:, None] * 10000.0 ** (-np.arange(half) / half)
    y = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([y.real, y.imag], -1)


def expected(layer, x, visible=True, added=0.0, cap=None, sinks=False, rotary=False, context=None, offset=0):
    """The layer in NumPy, step by step."""
    context = x if context is None else context
    w = {"/".join(v.path.split("/")[-2:]): v.numpy() for v in layer.weights}
    q, k, v = (
        np.einsum("btd,dnh->btnh", y, w[f"{part}/kernel"]) + w[f"{part}/bias"]
        for y, part in ((x, "query"), (context, "key"), (context, "value"))
    )
    k, v = (np.repeat(y, q.shape[2] // y.shape[2], 2) for y in (k, v))
    if rotary:
        q, k = turned(q, offset), turned(k)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 2.0
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    scores = np.where(visible, scores + added, -np.inf)
    sink = np.full((1, 4, 1, 1), -np.inf)
    if sinks:
        sink = layer.sinks.numpy().reshape(sink.shape)
    top = np.maximum(scores.max(-1, keepdims=True), sink)
    p = np.exp(scores - top)
    p = p / (p.sum(-1, keepdims=True) + np.exp(sink - top))
    out = np.einsum("bnts,bsnh->btnh", p, v)
    return np.einsum("btnh,nhd->btd", out, w["attention_output/kernel"]) + w["attention_output/bias"], p


def t5_bias(layer, bidirectional):
    """T5's buckets, one pair at a time."""
    table = layer.relative_attention_bias.numpy()
    result = np.zeros((4, T, T))
    for i in range(T):
        for j in range(T):
            far = j - i
            bucket, count = 0, layer.num_buckets
            if bidirectional:
                count //= 2
                bucket = count if far > 0 else 0
                far = abs(far)
            else:
                far = max(-far, 0)
            exact = count // 2
            if far >= exact:
                more = np.log(far / exact) / np.log(layer.max_distance / exact) * (count - exact)
                far = min(exact + int(more), count - 1)
            result[:, i, j] = table[bucket + far]
    return result


OPTIONS = {
    "soft cap": (dict(logits_soft_cap=0.7), dict(cap=0.7)),
    "sinks": (dict(sinks=True), dict(sinks=True)),
    "alibi": (dict(position_bias="alibi", mask=masks.causal()), dict(visible=CAUSAL, added=SLOPES[:, None, None] * (KEYS - ROWS))),
    "rotary": (dict(rotary=True), dict(rotary=True)),
    "causal window": (dict(mask=masks.causal() & masks.window(2)), dict(visible=CAUSAL & (KEYS >= ROWS - 2))),
    "chunked": (dict(mask=masks.chunked(4)), dict(visible=KEYS // 4 == ROWS // 4)),
    "prefix": (dict(mask=masks.prefix(3)), dict(visible=CAUSAL | (KEYS < 3))),
    "blocks": (dict(mask=masks.block_sparse(BLOCKS, 2, 2)), dict(visible=BLOCKS.repeat(2, 0).repeat(2, 1))),
    "all": (
        dict(logits_soft_cap=2, sinks=True, position_bias="alibi", mask=masks.causal(), rotary={"base": 10000}),
        dict(cap=2.0, sinks=True, visible=CAUSAL, added=SLOPES[:, None, None] * (KEYS - ROWS), rotary=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("config, means", OPTIONS.values(), ids=OPTIONS)
@each_layer
def test_options(name, flash, config, means):
    layer, x = made(name, flash, **config), random(2, T, 8)
    out, weights = expected(layer, x.numpy(), **means)
    np.testing.assert_allclose(layer(x, x), out, rtol=1e-9, atol=1e-9)
    found, scores = layer(x, x, return_attention_scores=True)
    np.testing.assert_allclose(found, out, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scores, weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config, bidirectional",
    [({}, True), ({"mask": masks.causal()}, False), ({"mask": masks.causal(), "bidirectional": True}, True)],
)
@each_layer
def test_t5(name, flash, config, bidirectional):
    layer = made(name, flash, position_bias="t5", num_buckets=8, max_distance=5, **config)
    x, visible = random(2, T, 8), CAUSAL if config else True
    out, _ = expected(layer, x.numpy(), visible=visible, added=t5_bias(layer, bidirectional))
    np.testing.assert_allclose(layer(x, x), out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(T, T), (1, T), (2, T, T), (2, 1, 1, T), (1, 4, T, T)])
@each_layer
def test_attention_bias_and_its_gradient(name, flash, shape):
    """The gradient by a difference along a direction."""
    layer, x = made(name, flash), random(2, T, 8)
    bias, way = random(*shape, seed=1), random(*shape, seed=2)
    full = bias.numpy()[:, None] if len(shape) == 3 else bias.numpy()
    np.testing.assert_allclose(
        layer(x, x, attention_bias=bias), expected(layer, x.numpy(), added=full)[0], rtol=1e-9, atol=1e-9
    )
    with tf.GradientTape() as tape:
        tape.watch(bias)
        total = tf.reduce_sum(tf.sin(layer(x, x, attention_bias=bias)))
    slope = tf.reduce_sum(tape.gradient(total, bias) * way)
    after, before = (tf.reduce_sum(tf.sin(layer(x, x, attention_bias=bias + e * way))) for e in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (after - before) / 2e-5, rtol=1e-6, atol=1e-8)


@each_layer
def test_everything_is_anded(name, flash):
    """The layer's mask, the call's masks and a causal mask; and mask objects in calls."""
    layer, x = made(name, flash, mask=masks.window(3, 3)), random(2, T, 8)
    visible = (abs(KEYS - ROWS) <= 3) & CAUSAL & KEPT
    visible[..., 0, 0] = True  # in no row is everything hidden
    kept = KEPT.copy()
    kept[..., 0] = True
    visible = (abs(KEYS - ROWS) <= 3) & CAUSAL & kept
    seen = visible.any(-1, keepdims=True)
    out, _ = expected(layer, x.numpy(), visible=np.where(seen, visible, True))
    rows = np.broadcast_to(seen[:, 0, :, 0], (2, T))
    for given in (
        dict(attention_mask=kept, use_causal_mask=True),
        dict(value_mask=kept[:, 0, 0], use_causal_mask=True),
        dict(attention_mask=masks.causal() & masks.key_padding(kept[:, 0, 0])),
        dict(attention_mask=masks.causal(), value_mask=kept[:, 0, 0]),
    ):
        np.testing.assert_allclose(layer(x, x, **given).numpy()[rows], out[rows], rtol=1e-9, atol=1e-9)


@each_layer
def test_query_offset_decodes(name, flash):
    """One token at a time, and a chunk of each batch entry at a place of its own, as the whole gives it."""
    config = dict(sinks=True, position_bias="alibi", mask=masks.causal(), rotary=True)
    layer, x = made(name, flash, **config), random(2, T, 8)
    whole = layer(x, x).numpy()
    for i in (0, 3, T - 1):
        np.testing.assert_allclose(layer(x[:, i : i + 1], x, query_offset=i)[:, 0], whole[:, i], rtol=1e-9, atol=1e-9)
    parts = tf.stack([x[0, 1:4], x[1, 3:6]])
    run = tf.function(lambda query, offset: layer(query, x, query_offset=offset))
    out = run(parts, tf.constant([1, 3]))
    np.testing.assert_allclose(out, np.stack([whole[0, 1:4], whole[1, 3:6]]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, config", [("MultiHeadAttention", {"attention_axes": (2,)})])
def test_an_attention_axis_that_is_not_the_first(flash, name, config):
    layer = ours(name)(4, 4, **config, position_bias="t5", rotary=True, mask=masks.causal(), flash_attention=flash)
    x = random(2, 3, T, 8, dtype="float32")
    out = layer(x, x, attention_bias=BIAS[None, None].astype("float32"))
    flat = ours(name)(4, 4, position_bias="t5", rotary=True, mask=masks.causal(), flash_attention=flash)
    y = tf.reshape(x, (6, T, 8))
    flat.build(y.shape, y.shape)
    flat.set_weights(layer.get_weights())
    np.testing.assert_allclose(
        out, tf.reshape(flat(y, y, attention_bias=BIAS[None].astype("float32")), x.shape), atol=1e-5
    )
    for option in ({"position_bias": "alibi"}, {"rotary": True}, {"mask": masks.causal()}):
        with pytest.raises(ValueError, match="needs exactly one attention axis, and there are 2"):
            ours(name)(4, 4, **option).build(x.shape, x.shape)
    with pytest.raises(ValueError, match="query_offset needs exactly one attention axis"):
        ours(name)(4, 4)(x, x, query_offset=1)


EVERYTHING = dict(
    logits_soft_cap=5.0, sinks=True, position_bias="t5", num_buckets=8, max_distance=16,
    mask=masks.causal() & masks.chunked(4), rotary={"rotary_dim": 2, "scaling": ("linear", 2.0)},
)  # fmt: skip


@pytest.mark.wide(6)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@each_layer
def test_training_files_and_mixed_precision(name, dtype, tmp_path):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 8, mask_zero=True)(tokens)
    bias = keras.Input((4, None, None))
    layer = ours(name)(**CONFIGS[name], **EVERYTHING, dtype=dtype)
    x = layer(x, x, attention_bias=bias)
    model = keras.Model([tokens, bias], keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x)))
    ids = np.random.default_rng(0).integers(0, 5, (16, T))
    inputs = [ids, np.broadcast_to(BIAS.astype("float32"), (16, 4, T, T))]
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    target = np.random.default_rng(1).normal(size=(16, 1))
    before, weights = model.evaluate(inputs, target, verbose=0), [w.numpy() for w in layer.weights]
    assert [w.name for w in layer.weights][:2] == ["sinks", "relative_attention_bias"]
    assert layer.sinks.shape == (4,) and layer.relative_attention_bias.shape == (8, 4)
    assert layer.sinks.dtype == layer.relative_attention_bias.dtype == "float32"
    model.fit(inputs, target, epochs=3, verbose=0)
    assert model.evaluate(inputs, target, verbose=0) < before
    assert all((w.numpy() != old).any() for w, old in zip(layer.weights[:2], weights))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0), atol=1e-6)
    again = next(x for x in loaded.layers if type(x) is ours(name))
    assert again.get_config() == layer.get_config() and repr(again.mask) == repr(layer.mask)
    # Padding changes no real token: chunks of 4 begin where they began.
    inner = keras.Model(model.inputs, x)
    longer = [np.pad(ids, ((0, 0), (0, 3))), np.pad(inputs[1], ((0, 0), (0, 0), (0, 3), (0, 3)))]
    short, padded = (np.array(inner(y), "float32") for y in (inputs, longer))
    np.testing.assert_allclose(padded[:, :T][ids != 0], short[ids != 0], atol=2e-6 if dtype == "float32" else 3e-2)


MASKS = {
    "causal": masks.causal("bottom_right") & masks.window(3, alignment="bottom_right"),
    "chunked": masks.chunked(4),
    "prefix": masks.prefix(2),
    "prefixes": masks.prefix(np.array([2, 3])),
    "intervals": masks.intervals(np.array([0, 0, 1, 1, 2, 2]), None),
    "segments": masks.segments(np.array([0, 0, 1, 1, 0, 2])),
    "packed": masks.packed(np.array([0, 2, 6])),
    "blocks": masks.block_sparse(BLOCKS, 2, 2),
    "padding": masks.padding([5, 6], np.array([3, 4])),
    "dense": masks.boolean(CAUSAL | (ROWS == 2)) & masks.key_padding(KEPT[:, 0, 0]),
    "no keys": masks.intervals(np.zeros((1, 0), np.int32)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_in_configs(mask):
    import json

    layer = ours("MultiHeadAttention")(2, 4, mask=mask)
    config = json.loads(json.dumps(layer.get_config()))
    again = ours("MultiHeadAttention").from_config(config).mask
    rows = 0 if "no keys" in MASKS and mask is MASKS["no keys"] else T
    np.testing.assert_array_equal(again.materialize(rows, T), mask.materialize(rows, T))
    assert repr(again) == repr(mask)


def test_masks_that_no_config_holds():
    function = masks.from_function(lambda b, h, q, k: q >= k)
    with pytest.raises(
        ValueError, match="MultiHeadAttention.get_config: .*holds a Python function, which cannot be saved"
    ):
        ours("MultiHeadAttention")(2, 4, mask=function).get_config()
    layer = ours("MultiHeadAttention")(2, 4, mask=masks.prefix(tf.constant([2, 3])))
    x = random(2, T, 8, dtype="float32")
    assert layer(x, x).shape == x.shape
    with pytest.raises(ValueError, match="MultiHeadAttention.get_config: .*holds a EagerTensor, which cannot be saved"):
        layer.get_config()


@each_layer
def test_defaults_are_those_of_keras(name):
    """Configs, weights and classes of layers that use nothing of this."""
    layer = ours(name)(**CONFIGS[name])
    assert set(layer.get_config()) == set(STOCK[name](**CONFIGS[name]).get_config())
    x = random(2, T, 8, dtype="float32")
    layer(x, x)
    assert len(layer.weights) == 8 and not layer.beyond_stock()
    model = keras.Sequential([layer])
    attn_ops.revert(model)
    assert type(layer) is STOCK[name]
    attn_ops.convert(model)
    assert type(layer) is ours(name) and not layer.beyond_stock() and layer.get_config()["as_in_keras"]


@pytest.mark.parametrize(
    "option", [dict(logits_soft_cap=1.0), dict(sinks=True), dict(position_bias="t5"), dict(mask=masks.causal()), dict(rotary=True)],
    ids=lambda option: [*option][0],
)  # fmt: skip
@each_layer
def test_what_keras_has_not_cannot_be_keras_s(name, option):
    layer = ours(name)(**CONFIGS[name], **option)
    [what] = option
    other = ours(name)(**CONFIGS[name])
    model = keras.Sequential([other, layer])
    with pytest.raises(
        ValueError,
        match=f"attn_ops.revert: .* is a {name} with {what}, which keras.layers.{STOCK[name].__name__} does not have",
    ):
        attn_ops.revert(model)
    assert type(other) is ours(name)  # nothing was changed
    with pytest.raises(ValueError, match=f"{name}: Keras's own code has no {what}, and runs here: as_in_keras=True"):
        ours(name)(**CONFIGS[name], **option, as_in_keras=True)

    class Sub(ours(name)):
        def _masked_softmax(self, scores, attention_mask=None):
            return super()._masked_softmax(scores, attention_mask)

    x = random(2, T, 8, dtype="float32")
    with pytest.raises(ValueError, match="Sub: Keras's own code has no .*runs here: Sub overrides _masked_softmax"):
        Sub(**CONFIGS[name], **option)(x, x, return_attention_scores=True)


@each_layer
def test_converted_layers_refuse_what_keras_has_not(name):
    layer, x = ours(name)(**CONFIGS[name], as_in_keras=True), random(2, T, 8, dtype="float32")
    for given in ({"attention_bias": BIAS}, {"query_offset": 1}):
        with pytest.raises(ValueError, match=f"Keras's own code has no {[*given][0]}, and runs here: as_in_keras=True"):
            layer(x, x, **given)
    with pytest.raises(ValueError, match="Keras's own code has no masks of attn_ops, and runs here: as_in_keras=True"):
        layer(x, x, attention_mask=masks.causal())
    layer = ours(name)(**CONFIGS[name], mask=masks.prefix(2))
    layer.as_in_keras = True
    with pytest.raises(ValueError, match="Keras's own code has no mask, and runs here: as_in_keras=True"):
        layer(x, x)


OF_SUBCLASSES = {  # each with rows without keys
    "intervals": masks.intervals([[0, 0, 1, 3, 7]], [[0, 2, 2, 5, 7]]),
    "segments": masks.segments([[0, 1, 5, 1, 3]], [[1, 0, 1, 0, 1, 2, 2]]),
    "blocks": masks.block_sparse(np.array([[False] * 2, [True, False]])[[0, 1, 0]], 2, 4),
    "lengths": masks.padding([3, 5, 0], [7, 4, 2]),
    "at the last key": masks.causal("bottom_right") & masks.padding(key_lengths=[2, 7, 0]),
    "a function": masks.from_function(lambda b, h, q, k: (q - k) % 3 > q),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("mask", OF_SUBCLASSES)
@each_layer
def test_subclasses_with_masks_of_their_own_give_what_keras_gives(name, mask):
    """The one way for masks with structure into a layer that answers as Keras does: calls and options refuse them."""

    class Own(ours(name)):
        def _compute_attention_mask(self, *inputs, **given):
            return OF_SUBCLASSES[mask]

    stock, mine = twins(name, (3, 5, 6), (3, 7, 6), **CONFIGS[name])
    own = Own.from_config({**mine.get_config(), "as_in_keras": True})
    own.build((3, 5, 6), (3, 7, 6))
    own.set_weights(mine.get_weights())
    dense = np.broadcast_to(OF_SUBCLASSES[mask].materialize(5, 7)[:, 0], (3, 5, 7))
    assert not dense.any(-1).all()
    inputs = [random(3, n, 6, seed=n) for n in (5, 7)]

    def call(layer, inputs):
        return layer(*inputs) if layer is own else layer(*inputs, attention_mask=dense)

    assert_same(stock, own, inputs, call)
    if mask != "a function":  # which needs to know the extents
        unknown = [tf.TensorSpec([None, None, 6], tf.float64)] * 2
        graph = tf.function(lambda *inputs: own(*inputs), input_signature=unknown)
        np.testing.assert_allclose(graph(*inputs), own(*inputs), rtol=1e-12)


BAD = [
    (dict(logits_soft_cap=-1.0), ValueError, "logits_soft_cap must be positive and finite, got -1.0"),
    (dict(logits_soft_cap="a"), TypeError, "logits_soft_cap must be a Python number"),
    (dict(sinks="yes"), TypeError, "sinks must be True or False"),
    (dict(position_bias="rope"), ValueError, "position_bias must be None, 'alibi' or 't5', not 'rope'"),
    (dict(position_bias="t5", num_buckets=3), ValueError, "needs a table of at least 4 buckets.*got 3 buckets"),
    (dict(position_bias="t5", max_distance=2), ValueError, "max_distance beyond the 8"),
    (dict(position_bias="t5", num_buckets=8.0), TypeError, "num_buckets must be an integer, got 8.0"),
    (dict(bidirectional="no"), ValueError, "bidirectional must be None, True or False, not 'no'"),
    (dict(mask=CAUSAL), TypeError, "mask must be an object of attn_ops.masks, got ndarray"),
    (dict(rotary="yes"), TypeError, "rotary must be None, True or a dict"),
    (dict(rotary={"theta": 1}), ValueError, "rotary takes base, rotary_dim, interleaved, scaling, not theta"),
    (dict(rotary={"base": -1}), ValueError, "base must be positive and finite, got -1"),
]


@pytest.mark.parametrize("config, error, message", BAD)
@each_layer
def test_bad_configurations(name, config, error, message):
    with pytest.raises(error, match=message) as raised:
        ours(name)(**CONFIGS[name], **config)
    assert name in str(raised.value)


@each_layer
def test_bad_calls(name):
    layer, x = ours(name)(**CONFIGS[name]), random(2, T, 8, dtype="float32")
    with pytest.raises(ValueError, match=r"an attention_bias of shape \(6,\) has 1 axes, and needs 2"):
        layer(x, x, attention_bias=np.zeros(T, "float32"))
    with pytest.raises(ValueError, match="bias"):
        layer(x, x, attention_bias=np.zeros((T, T + 1), "float32"))
    with pytest.raises(ValueError, match="query_offset must be between 0 and 2.30, got -1"):
        layer(x, x, query_offset=-1)
    with pytest.raises(ValueError, match="rotary_dim must not exceed the 4 features, got 6"):
        ours(name)(**CONFIGS[name], rotary={"rotary_dim": 6})(x, x)
    inputs, ids = keras.Input((T, 8)), keras.Input((T,), dtype="int32")
    with pytest.raises(ValueError, match="attention_mask holds a tensor of a Keras model"):
        layer(inputs, inputs, attention_mask=masks.segments(ids))
    with pytest.raises(TypeError, match="mask holds a tensor of a Keras model"):
        ours(name)(**CONFIGS[name], mask=masks.segments(ids))
