"""`attn_ops.visualize.attention`: the weights of models of all kinds, by hand, and a model that stays as it was."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import reference, visualize

RNG = np.random.default_rng(0)
IDS = np.array([[5, 3, 9, 1, 7, 2, 0, 0], [4, 4, 1, 8, 2, 6, 3, 9]], "int32")


def encoder(layers=keras.layers, **options):
    """Two attentions of one head and of several, over tokens that may be padding."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(10, 16, mask_zero=True, name="embedding")(ids)
    y = layers.MultiHeadAttention(4, 6, name="first", **options)(x, x)
    x = keras.layers.Add(name="sum")([x, keras.layers.Dropout(0.5)(y)])
    x = keras.layers.Attention(name="second", use_scale=True)([x, x])
    model = keras.Model(ids, keras.layers.Dense(3)(x), name="encoder")
    for weight in model.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    return model


def by_hand(layer, x, visible, y=None):
    """The weights of a multi-head layer from its own projections, in float64."""
    y = x if y is None else y
    q = np.einsum("btf,fnh->bnth", x, layer._query_dense.kernel) + np.asarray(layer._query_dense.bias)[:, None]
    k = np.einsum("btf,fnh->bnth", y, layer._key_dense.kernel) + np.asarray(layer._key_dense.bias)[:, None]
    s = np.where(visible, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(s - s.max(-1, keepdims=True))
        return np.nan_to_num(p / p.sum(-1, keepdims=True))


def embedded(model, ids=IDS):
    return np.asarray(model.get_layer("embedding")(ids), np.float64)


@pytest.mark.wide(2)
@pytest.mark.parametrize("form", ["stock", "converted", "ours"])
def test_weights_are_softmax_of_the_models_own_projections(form):
    model = encoder(attn_ops.layers if form == "ours" else keras.layers)
    if form == "converted":
        attn_ops.convert(model)
    found = visualize.attention(model, IDS)
    assert found.names == ["first", "second"] and found.model == "encoder" and not found.left_out
    real = IDS != 0
    visible = real[:, None, :, None] & real[:, None, None, :]
    expected = by_hand(model.get_layer("first"), embedded(model), visible)
    np.testing.assert_allclose(found["first"].weights, expected, atol=1e-5)
    np.testing.assert_array_equal(found["first"].hidden, ~visible)
    np.testing.assert_array_equal(found["first"].real_rows, real)
    np.testing.assert_array_equal(found["first"].real_keys, real)
    assert found["first"].heads == 4 and found[1].heads == 1 and found["first"].shape == (2, 4, 8, 8)


def test_of_all_forms_the_same():
    stock, converted = encoder(dropout=0.3), attn_ops.convert(encoder(dropout=0.3))
    for a, b in zip(visualize.attention(stock, IDS), visualize.attention(converted, IDS)):
        np.testing.assert_array_equal(a.weights, b.weights)
        np.testing.assert_array_equal(a.hidden, b.hidden)


def test_entropy_and_distance():
    found = visualize.attention(encoder(), IDS)["first"]
    p, real = found.weights.astype(np.float64), IDS != 0
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    distance = np.sum(p * np.abs(np.arange(8)[:, None] - np.arange(8)), -1)
    for entry in range(2):
        np.testing.assert_allclose(found.entropy[entry], entropy[entry][:, real[entry]].mean(-1), rtol=1e-4)
        np.testing.assert_allclose(found.distance[entry], distance[entry][:, real[entry]].mean(-1), rtol=1e-4)


class Block(keras.layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.attention = inner
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        return self.norm(x + self.attention(x, x))


class Subclassed(keras.Model):
    """Blocks, one of them twice, and a function of its own that TensorFlow compiles."""

    def __init__(self):
        super().__init__()
        self.first = Block(keras.layers.MultiHeadAttention(2, 4, name="self"), name="first")
        self.again = Block(keras.layers.GroupQueryAttention(4, 4, 2, name="grouped"), name="again")
        self.noise = keras.layers.GaussianNoise(0.1)
        self.runs = 0

    @tf.function
    def traced(self, x):
        self.runs += 1
        return self.again(x)

    def call(self, x, training=False):
        return self.traced(self.again(self.noise(self.first(x), training=training)))


def test_subclassed_and_nested_models_and_layers_that_run_twice():
    inner = Subclassed()
    x = RNG.normal(size=(2, 5, 8)).astype("float32")
    inner(x)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, keras.Sequential([inner, keras.layers.Dense(2)], name="nested")(inputs))
    model(x)
    runs = inner.runs
    found = visualize.attention(model, x)
    model(x)
    assert inner.runs == runs + 1  # as Python, and not traced again
    path = f"nested/{inner.name}"
    assert found.names == [f"{path}/first/self", f"{path}/again/grouped", f"{path}/again/grouped#2"]
    y = inner.first(x)
    q, k = (dense(np.asarray(y)) for dense in (inner.again.attention._query_dense, inner.again.attention._key_dense))
    np.testing.assert_allclose(found["again/grouped"].weights, reference.attention_weights(q, k), atol=1e-5)
    assert [layer.name for layer in visualize.attention(model, x, layers="*#2")] == [f"{path}/again/grouped#2"]
    assert len(visualize.attention(model, x, layers=["self"])) == 1
    both = visualize.attention(model, x, layers="grouped", tokens={"grouped": list("abcde")})
    assert both.names == [f"{path}/again/grouped", f"{path}/again/grouped#2"]
    assert both[0].key_tokens == both[1].key_tokens == [list("abcde")] * 2


def test_the_layer_alone_and_cross_attention():
    layer = keras.layers.MultiHeadAttention(2, 4, name="cross")
    q, v = (RNG.normal(size=(1, n, 8)).astype("float32") for n in (3, 5))
    layer(q, v)
    found = visualize.attention(layer, (q, v), tokens=(list("abc"), list("vwxyz")))["cross"]
    np.testing.assert_allclose(found.weights, by_hand(layer, q, True, v), atol=1e-5)
    assert found.query_tokens == [list("abc")] and found.key_tokens == [list("vwxyz")]
    assert np.isnan(found.distance).all() and not found.of_one_sequence


def test_wrappers_and_text():
    inputs = keras.Input((3, 5, 8))
    model = keras.Model(
        inputs, keras.layers.TimeDistributed(attn_ops.layers.SelfAttention(4, name="self"), name="each")(inputs)
    )
    found = visualize.attention(model, RNG.normal(size=(1, 3, 5, 8)).astype("float32"))
    assert found.names == ["each/self", "each/self#2", "each/self#3"] and not found.left_out
    words = keras.layers.TextVectorization(output_sequence_length=6, vocabulary=["the", "film", "was", "good"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Embedding(9, 8, mask_zero=True),
                              keras.layers.Dropout(0.5), attn_ops.layers.SelfAttention(8, name="self")])  # fmt: skip
    (found,) = visualize.attention(model, ["the film was good"], tokens="the film was good".split() + ["", ""])
    np.testing.assert_array_equal(found.real_keys, [[True] * 4 + [False] * 2])


class OwnAttention(keras.layers.Layer):
    """Attention without a layer for it."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        y = x[:, :, None]
        return self.function(y, y, y, is_causal=True)[:, :, 0]


@pytest.mark.wide(2)
@pytest.mark.parametrize("function", [keras.ops.dot_product_attention, attn_ops.scaled_dot_product_attention])
@pytest.mark.parametrize("as_layer", [True, False])
def test_attention_without_a_layer(function, as_layer):
    inputs = keras.Input((5, 8))
    if as_layer:
        model = keras.Model(inputs, OwnAttention(function, name="own")(inputs))
    else:
        x = keras.ops.expand_dims(inputs, 2)
        model = keras.Model(inputs, function(x, x, x, is_causal=True))
    x = RNG.normal(size=(1, 5, 8)).astype("float32")
    (found,) = visualize.attention(model, x)
    np.testing.assert_allclose(
        found.weights, reference.attention_weights(x[:, :, None], x[:, :, None], is_causal=True), atol=1e-5
    )
    assert found.name == "own" if as_layer else "dot_product_attention" in found.name
    np.testing.assert_array_equal(found.hidden[0, 0], ~np.tri(5, dtype=bool))


@pytest.mark.parametrize("layer", [keras.layers.AdditiveAttention, keras.layers.Attention])
def test_layers_whose_scores_are_no_dot_products(layer):
    options = {"score_mode": "concat"} if layer is keras.layers.Attention else {}
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layer(name="additive", **options)([inputs, inputs]))
    x = RNG.normal(size=(2, 5, 8)).astype("float32")
    (found,) = visualize.attention(model, x)
    expected = model.get_layer("additive")([x, x], return_attention_scores=True)[1]
    np.testing.assert_allclose(found.weights[:, 0], expected, atol=1e-6)


def state(model):
    """All that a call could change."""
    layers = list(model._flatten_layers())
    return [
        [np.asarray(x) for x in (*model.weights, *model.non_trainable_variables)],
        [np.asarray(seed.state) for layer in layers for seed in getattr(layer, "_seed_generators", ())],
        [type(layer) for layer in layers],
        [sorted(vars(layer)) for layer in layers],
        [len(layer.losses) for layer in layers],
        [layer.__dict__.get("call") for layer in layers],
        model.predict_function,
        keras.ops.dot_product_attention.__module__,
        keras.Operation.__call__,
        tf.config.functions_run_eagerly(),
    ]


class Changing(keras.layers.Layer):
    """Counts its calls, draws random numbers and adds losses, also where nobody trains; and may fail."""

    def __init__(self):
        super().__init__(name="changing")
        self.seeds = keras.random.SeedGenerator(1)
        self.fails = False

    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, x):
        self.count.assign_add(1.0)
        self.add_loss(keras.ops.sum(x))
        if self.fails:
            raise RuntimeError("from inside")
        return x + 0 * keras.random.normal(keras.ops.shape(x), seed=self.seeds)


@pytest.mark.wide(3)
@pytest.mark.parametrize("fails", [False, True, "too large"])
def test_nothing_of_the_model_changes(fails):
    inputs = keras.Input((5, 8))
    x = keras.layers.MultiHeadAttention(2, 4, dropout=0.2, name="stock", flash_attention=None)(inputs, inputs)
    changing = Changing()
    x = attn_ops.layers.MultiHeadAttention(2, 4, name="ours")(changing(x), x)
    model = keras.Model(inputs, keras.layers.BatchNormalization()(x))
    x = RNG.normal(size=(1, 5, 8)).astype("float32")
    model.predict(x, verbose=0)
    before, out = state(model), None
    changing.fails = fails is True
    if fails:
        with pytest.raises(
            RuntimeError if fails is True else ValueError, match="from inside" if fails is True else "max_bytes"
        ):
            visualize.attention(model, x, max_bytes=2**30 if fails is True else 300)
    else:
        out = visualize.attention(model, x)
    after = state(model)
    for a, b in zip(before, after):
        np.testing.assert_equal(a, b)
    assert fails or out.names == ["stock", "ours"]


# ----------------------------------------------------------------------------------------------------- long sequences


def dense(model, x):
    return visualize.attention(model, x, longest=10**6)


@pytest.mark.wide(2)
@pytest.mark.parametrize("rows, keys", [(300, 300), (700, 500)])
def test_blocks_and_top_keys_are_those_of_the_matrix(rows, keys):
    layer = attn_ops.layers.MultiHeadAttention(2, 4, name="long")
    q, v = (3 * RNG.normal(size=(2, n, 8)).astype("float32") for n in (rows, keys))
    key_mask = np.ones((2, keys), bool)
    key_mask[1, 250:] = False
    options = {"use_causal_mask": True, "key_mask": key_mask}
    layer(q, v, **options)
    call = lambda **more: visualize.attention(Call(layer, options), (q, v), **more)[0]
    whole, kept = call(longest=1000), call(longest=64, top_keys=5)
    assert kept.weights is None and kept.hidden is None and whole.blocks is None
    p, hidden = whole.weights.astype(np.float64), np.broadcast_to(whole.hidden, whole.weights.shape)
    size = kept.blocks.size
    assert size == (2 if rows < 512 else 4)
    for r in (0, 1, rows // size // 2, -(-rows // size) - 1):
        for c in (0, keys // size // 2, -(-keys // size) - 1):
            block = np.s_[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size]
            np.testing.assert_allclose(kept.blocks.means[:, :, r, c], p[block].mean((2, 3)), atol=1e-7)
            seen = np.broadcast_to(kept.blocks.seen, kept.blocks.means.shape)[:, :, r, c]
            np.testing.assert_allclose(seen, 1 - hidden[block].mean((2, 3)), atol=1e-6)
    top = np.sort(p, -1)[..., ::-1][..., :5]
    np.testing.assert_allclose(kept.blocks.top_weights, top, atol=1e-6)
    there = kept.blocks.top_keys >= 0
    np.testing.assert_array_equal(there, top > 0)
    at = np.take_along_axis(p, np.maximum(kept.blocks.top_keys, 0), -1)
    np.testing.assert_allclose(np.where(there, at, 0), np.where(there, top, 0), atol=1e-6)
    np.testing.assert_allclose(kept.entropy, whole.entropy, rtol=1e-4)
    np.testing.assert_array_equal(kept.real_keys, whole.real_keys)


class Call(keras.layers.Layer):
    """A layer called with more arguments."""

    def __init__(self, layer, options):
        super().__init__()
        self.layer, self.options = layer, options
        self.built = True

    def call(self, query, value):
        return self.layer(query, value, **self.options)


def test_the_matrix_is_never_there(monkeypatch):
    """2,048 tokens: the largest array that is made beside the model's own is a fraction of the matrix."""
    from attn_ops.visualize import probabilities

    CHUNK = 2**17
    monkeypatch.setattr(probabilities, "CHUNK", CHUNK)
    seen = []
    inner = probabilities.Probabilities._piece
    monkeypatch.setattr(
        probabilities.Probabilities, "_piece", lambda *a: seen.append((result := inner(*a))[0].nbytes) or result
    )
    layer = attn_ops.layers.MultiHeadAttention(2, 4, name="long")
    x = RNG.normal(size=(1, 2048, 8)).astype("float32")
    layer(x, x)
    (found,) = visualize.attention(layer, (x, x))
    matrix = 4 * 2 * 2048**2
    assert max(seen) <= 4 * CHUNK == matrix // 64
    kept = sum(array.nbytes for array in found.blocks[1:])
    assert kept < 1.2 * (2 * 4 * 256**2 * 1.5 + 2 * 2048 * 8 * 8) < matrix / 20


# ------------------------------------------------------------------------------------------------------- every option


@pytest.mark.wide(3)
@pytest.mark.parametrize(
    "options",
    [
        {"logits_soft_cap": 2.0, "is_causal": True},
        {"alibi_slopes": attn_ops.alibi_slopes(4), "mask": attn_ops.masks.window(3, 2)},
        {"relative_bias": RNG.normal(size=(5, 4)), "query_offset": np.array([1, 2])},
        {"bias": np.where(RNG.random((2, 4, 6, 9)) < 0.3, -np.inf, RNG.normal(size=(2, 4, 6, 9)))},
        {"sinks": RNG.normal(size=4), "is_causal": True, "causal_alignment": "bottom_right"},
        {"mask": RNG.random((2, 4, 6, 9)) < 0.6, "scale": 0.7},
        {"mask": attn_ops.masks.segments(RNG.integers(0, 2, (2, 6)), RNG.integers(0, 2, (2, 9)))},
        {"mask": attn_ops.masks.prefix(np.array([2, 0])), "key_value_seq_lengths": np.array([9, 4])},
        {"mask": attn_ops.masks.chunked(4), "query_seq_lengths": np.array([6, 2])},
        {"mask": attn_ops.masks.block_sparse(RNG.random((1, 4, 3, 5)) < 0.5, 2, 2)},
        {"window": (2, 1), "layout": "BHSD"},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option_of_the_op_as_the_specification_has_it(options):
    q, k = RNG.normal(size=(2, 6, 4, 8)), RNG.normal(size=(2, 9, 2, 8))
    if options.get("layout") == "BHSD":
        q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    expected = reference.attention_weights(q, k, **options)
    found = visualize.attention(Direct(options), (q, k))[0]
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)
    # Hidden is what no finite score would show: of equal scores and no sink, every key that is seen has a weight.
    plain = {what: x for what, x in options.items() if what not in ("sinks", "bias", "alibi_slopes", "relative_bias")}
    if "bias" in options:
        plain["bias"] = np.where(options["bias"] == -np.inf, -np.inf, 0.0)
    seen = reference.attention_weights(0 * q, 0 * k, **plain) > 0
    np.testing.assert_array_equal(np.broadcast_to(~found.hidden, seen.shape), seen)


class Direct(keras.layers.Layer):
    def __init__(self, options):
        super().__init__(dtype="float64")
        self.options = options
        self.built = True

    def call(self, q, k):
        return attn_ops.scaled_dot_product_attention(q, k, k, **self.options)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_refusals():
    model = encoder()
    with pytest.raises(TypeError, match="must be a Keras layer"):
        visualize.attention(lambda x: x, IDS)
    with pytest.raises(ValueError, match="never built"):
        visualize.attention(keras.Sequential([keras.layers.Dense(2)]), IDS)
    with pytest.raises(ValueError, match=r"no attention of plain .*MultiHeadAttention.*attn_ops.models.register"):
        visualize.attention(keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)], name="plain"), IDS)
    with pytest.raises(ValueError, match="'third' is no attention layer here; known: first, second"):
        visualize.attention(model, IDS, layers=["first", "third"])
    with pytest.raises(ValueError, match="'embedding' is no attention layer here; known: first, second"):
        visualize.attention(model, IDS, layers="embedding")
    with pytest.raises(ValueError, match=r"layer first \(batch 2, 4 heads, 8 x 8\).*max_bytes allows 1,000.*layers="):
        visualize.attention(model, IDS, max_bytes=1000)
    with pytest.raises(ValueError, match="3 tokens, and the attention is over 8 positions"):
        visualize.attention(model, IDS, tokens=list("abc"))
    with pytest.raises(ValueError, match="1 lists of tokens for a batch of 2"):
        visualize.attention(model, IDS, tokens=[list("abcdefgh")])
    with pytest.raises(ValueError, match="tokens for 'third', which is no layer here; known: first, second"):
        visualize.attention(model, IDS, tokens={"third": list("abcdefgh")})
    with pytest.raises(TypeError, match="sequence of labels, got str"):
        visualize.attention(model, IDS, tokens="abcdefgh")
    for wrong in ([], 3, [3]):
        with pytest.raises(ValueError, match="layers must be None or names of layers"):
            visualize.attention(model, IDS, layers=wrong)
    for wrong in ({"longest": -1}, {"top_keys": 0}, {"max_bytes": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a positive integer"):
            visualize.attention(model, IDS, **wrong)
    np.testing.assert_array_equal(  # as `predict` takes them
        visualize.attention(model, IDS.tolist())[0].weights, visualize.attention(model, IDS)[0].weights
    )
    with pytest.raises(KeyError, match="'third': there is none; known: first, second"):
        visualize.attention(model, IDS)["third"]


class UnknownAttention(keras.layers.Layer):
    def call(self, x):
        return keras.ops.softmax(x @ keras.ops.transpose(x, (0, 2, 1))) @ x


def test_what_cannot_be_read_is_named():
    inputs = keras.Input((5, 8))
    x = UnknownAttention(name="unknown")(inputs)
    x = keras.layers.MultiHeadAttention(2, 4, name="known")(x, x)
    model = keras.Model(inputs, x)
    data = np.ones((1, 5, 8), "float32")
    found = visualize.attention(model, data)
    assert found.names == ["known"] and "UnknownAttention" in found.left_out["unknown"]
    assert "left out: unknown" in str(found)
    with pytest.raises(ValueError, match="unknown: attn_ops does not know UnknownAttention"):
        visualize.attention(model, data, layers="unknown")


# ------------------------------------------------------------------------------------------------------- from weights


def test_weights_from_elsewhere():
    p = reference.attention_weights(*RNG.normal(size=(2, 2, 5, 3, 4)), is_causal=True)
    hidden = ~np.tri(5, dtype=bool)
    found = visualize.ModelAttention.from_weights({"a": p, "b": p[0]}, tokens=list("abcde"), hidden=hidden)
    np.testing.assert_allclose(found["a"].weights, p, atol=1e-7)
    np.testing.assert_array_equal(found["b"].hidden[0, 0], hidden)
    assert found["b"].shape == (1, 3, 5, 5) and found["a"].query_tokens[1] == list("abcde")
    of_nan = visualize.ModelAttention.from_weights(np.where(hidden, np.nan, p))
    np.testing.assert_array_equal(of_nan[0].hidden[1, 2], hidden)
    assert len(visualize.ModelAttention.from_weights([p, p])) == 2


@pytest.mark.parametrize("wrong", [-1, 2, "scores", "sums"])
def test_weights_that_are_no_probabilities(wrong):
    p = reference.attention_weights(*RNG.normal(size=(2, 1, 5, 2, 4)))
    p = {-1: p - 0.5, 2: 2 * p, "scores": np.log(p), "sums": np.minimum(2 * p, 1)}[wrong]
    with pytest.raises(ValueError, match="must be probabilities.*attn_ops.attention_weights"):
        visualize.ModelAttention.from_weights(p)


def test_other_bad_weights():
    with pytest.raises(ValueError, match="not empty, got shape"):
        visualize.ModelAttention.from_weights(np.zeros(3))
    with pytest.raises(TypeError, match="must hold values, got KerasTensor"):
        visualize.ModelAttention.from_weights(keras.KerasTensor((2, 3)))
    with pytest.raises(ValueError, match="must broadcast to the weights"):
        visualize.ModelAttention.from_weights(np.eye(3), hidden=np.zeros((2, 3), bool))
    with pytest.raises(TypeError, match="must be bool"):
        visualize.ModelAttention.from_weights(np.eye(3), hidden=np.zeros((3, 3)))
