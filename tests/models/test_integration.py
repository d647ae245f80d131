"""patch(), unpatch(), patched(), convert() and revert()."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, HAS_WINDOW, KERAS, STOCK, assert_same, ours, random, twins

import keras.src.backend.tensorflow.nn as backend_nn

X = random(2, 5, 6, dtype="float32")


@pytest.fixture
def runs(monkeypatch):
    """The implementations that patched calls asked for."""
    seen = []
    run = attn_ops.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["implementation"])
        return run(*args, **kwargs)

    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", spy)
    return seen


@pytest.fixture(autouse=True)
def unpatched():
    original = backend_nn.dot_product_attention
    yield
    attn_ops.unpatch()
    assert backend_nn.dot_product_attention is original


def test_patch_and_unpatch_restore_keras():
    original = backend_nn.dot_product_attention
    attn_ops.patch()
    replaced = backend_nn.dot_product_attention
    assert replaced is not original
    attn_ops.patch()
    assert backend_nn.dot_product_attention is replaced
    attn_ops.unpatch()
    assert backend_nn.dot_product_attention is original
    attn_ops.unpatch()
    assert backend_nn.dot_product_attention is original


def test_patched_leaves_an_earlier_patch_alone_and_survives_errors():
    original = backend_nn.dot_product_attention
    with pytest.raises(KeyError), attn_ops.patched():
        raise KeyError
    assert backend_nn.dot_product_attention is original
    attn_ops.patch()
    with attn_ops.patched():
        pass
    assert backend_nn.dot_product_attention is not original


def test_blocks_that_overlap_end_with_the_last(runs):
    """Those of several threads do not end one inside the other."""
    x = random(2, 5, 4, 8)
    inputs = keras.Input((5, 4, 8))
    model = keras.Model(inputs, keras.ops.dot_product_attention(inputs, inputs, inputs))
    first, second = attn_ops.patched(model), attn_ops.patched()
    first.__enter__()
    second.__enter__()
    model.predict(x, verbose=0)
    first.__exit__(None, None, None)
    keras.ops.dot_product_attention(x, x, x)
    assert runs == [None] * 2
    second.__exit__(None, None, None)
    keras.ops.dot_product_attention(x, x, x)
    model.predict(x, verbose=0)
    assert runs == [None] * 2


@pytest.mark.parametrize("wraps", [functools.wraps, lambda wrapped: lambda function: function], ids=["wraps", "plain"])
def test_a_replacement_by_others_stays(wraps):
    attn_ops.patch()
    ours_ = backend_nn.dot_product_attention

    @wraps(ours_)
    def other(*args, **kwargs):
        return ours_(*args, **kwargs)

    backend_nn.dot_product_attention = other
    attn_ops.unpatch()
    assert backend_nn.dot_product_attention is other
    backend_nn.dot_product_attention = ours_


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (5, 7), (1, 1, 7), (4, 5, 7), (3, 1, 5, 7), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("bias", [None, (5, 7), (3, 4, 1, 7)], ids=str)
def test_op_keeps_its_meaning(runs, mask, bias, causal):
    """Masks and biases broadcast from the right, as in NumPy: (4, 5, 7) is one per head."""
    q, k, v = random(3, 5, 4, 8), random(3, 7, 4, 8, seed=1), random(3, 7, 4, 8, seed=2)
    options = {"is_causal": causal, "scale": 0.5}
    if mask is not None:
        options["mask"] = np.random.default_rng(3).random(mask) > 0.3
        options["mask"][..., 0] = True
    if bias is not None:
        options["bias"] = random(*bias, seed=4)
    expected = keras.ops.dot_product_attention(q, k, v, **options)
    assert not runs
    with attn_ops.patched():
        np.testing.assert_allclose(keras.ops.dot_product_attention(q, k, v, **options), expected, rtol=1e-9)
    assert runs == [None]


@pytest.mark.skipif(KERAS < (3, 15), reason="Keras's op does not group heads before")
def test_op_groups_heads(runs):
    q, k, v = random(3, 5, 4, 8), random(3, 7, 2, 8, seed=1), random(3, 7, 2, 8, seed=2)
    expected = keras.ops.dot_product_attention(q, k, v, scale=0.5)
    with attn_ops.patched():
        np.testing.assert_allclose(keras.ops.dot_product_attention(q, k, v, scale=0.5), expected, rtol=1e-9)
        one = keras.ops.dot_product_attention(q, k[:, :, :1], v[:, :, :1], scale=0.5)  # fails in Keras 3.15
    repeated = (tf.repeat(x[:, :, :1], 4, axis=2) for x in (k, v))
    np.testing.assert_allclose(one, keras.ops.dot_product_attention(q, *repeated, scale=0.5), rtol=1e-9)


def test_flash_attention_argument(runs):
    q = random(2, 5, 4, 8)
    with attn_ops.patched():
        keras.ops.dot_product_attention(q, q, q, flash_attention=False)
        assert runs == []
        keras.ops.dot_product_attention(q, q, q, flash_attention=True)
        assert runs == ["fused"]


def test_what_we_do_not_take_is_left_to_keras(runs):
    """Also where Keras raises, or accepts what it should not."""
    q = random(2, 5, 4, 8)
    integers = tf.cast(2 * q, "int32")
    for inputs, options in ((q, {"mask": np.tril(np.ones((5, 5)))}), (integers, {})):
        expected = keras.ops.dot_product_attention(inputs, inputs, inputs, **options)
        with attn_ops.patched():
            actual = keras.ops.dot_product_attention(inputs, inputs, inputs, **options)
        np.testing.assert_array_equal(actual, expected)
    with attn_ops.patched(), pytest.raises(ValueError, match="only supports 4D inputs"):
        keras.ops.dot_product_attention(q[0], q[0], q[0])
    assert not runs


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupedQueryAttention"])
def test_stock_layers_run_through_the_patch(runs, name):
    config = dict(num_heads=2, key_dim=4) if name == "MultiHeadAttention" else dict(
        head_dim=4, num_query_heads=4, num_key_value_heads=2
    )  # fmt: skip
    layer = STOCK[name](**config)
    mask = np.random.default_rng(0).random((2, 5, 5)) > 0.3
    mask[..., 0] = True
    calls = [lambda: layer(X, X), lambda: layer(X, X, use_causal_mask=True), lambda: layer(X, X, attention_mask=mask)]
    expected = [call() for call in calls]
    with attn_ops.patched():
        for call, result in zip(calls, expected):
            np.testing.assert_allclose(call(), result, atol=1e-6)
        assert runs == [None] * 3
        x = keras.Input((5, 6))
        model = keras.Model(x, layer(x, x, use_causal_mask=True))
        model.compile("sgd", "mse", jit_compile=True)
        np.testing.assert_allclose(model.predict(X, verbose=0), expected[1], atol=1e-5)
        model.fit(X, X, verbose=0)
    np.testing.assert_allclose(layer(X, X).shape, expected[0].shape)


@pytest.mark.parametrize("mask", [[True, False, True, True], [[[[True], [False], [True]]]], True])
def test_masks_and_biases_of_few_axes_and_of_lists(runs, mask):
    """They broadcast from the right, and Keras takes lists. Two rows of one see no key."""
    q, k = random(2, 3, 4, 6), random(2, 4, 4, 6, seed=1)
    bias = [0.5, -1.0, 0.0, 2.0]
    expected = keras.ops.dot_product_attention(q, k, k, mask=np.array(mask), bias=np.array(bias))
    with attn_ops.patched():
        np.testing.assert_allclose(keras.ops.dot_product_attention(q, k, k, mask=mask, bias=bias), expected, atol=1e-6)
    assert runs == [None]


@pytest.mark.parametrize("causal, bias", [(False, False), (True, True)])
def test_unknown_sizes_in_xla(causal, bias):
    """A mask of one column, and a bias beside hidden keys, whose values choose between two computations."""
    q, k = random(2, 3, 4, 6, dtype="float32"), random(2, 1, 4, 6, seed=1, dtype="float32")
    given = dict(bias=np.array([[1.0], [-2.0], [0.5]], "f")) if bias else dict(mask=np.array([[True], [False], [True]]))

    def gradients(q, k):
        with tf.GradientTape() as tape:
            tape.watch([q, k])
            out = keras.ops.dot_product_attention(q, k, k, is_causal=causal, **given)
        return out, *tape.gradient(out, [q, k], tf.sin(out))

    expected = gradients(q, k)
    with attn_ops.patched():
        signature = [tf.TensorSpec([None, None, 4, 6])] * 2
        for a, e in zip(tf.function(gradients, jit_compile=True, input_signature=signature)(q, k), expected):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("broken", ["missing", "arguments", "backend"])
def test_patch_says_why_it_cannot(monkeypatch, broken):
    if broken == "missing":
        monkeypatch.delattr(backend_nn, "dot_product_attention")
        match = "dot_product_attention"
    elif broken == "arguments":
        monkeypatch.setattr(backend_nn, "dot_product_attention", lambda query, key, value, sinks=None: None)
        match = "sinks"
    else:
        import keras.src.ops.nn as ops_nn

        class Backend:
            nn = None

        monkeypatch.setattr(ops_nn, "backend", Backend)
        match = "keras.ops does not use"
    with pytest.raises(RuntimeError, match=match):
        attn_ops.patch()
    monkeypatch.undo()


# convert and revert


class Block(keras.layers.Layer):
    """A custom layer with attention in a list, a dict and an attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = [keras.layers.MultiHeadAttention(2, 4), keras.layers.Dense(6)]
        self.second = {"gqa": keras.layers.GroupQueryAttention(4, 4, 2)}
        self.third = keras.layers.Attention(use_scale=True)

    def call(self, x):
        x = self.first[1](self.first[0](x, x))
        x = self.second["gqa"](x, x, use_causal_mask=True)
        return self.third([x, x])


def deep_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    inner_in = keras.Input((5, 6))
    inner = keras.Model(inner_in, keras.layers.MultiHeadAttention(2, 4, name="inner")(inner_in, inner_in))
    x = inner(Block(name="block")(inputs))
    shared = keras.layers.TimeDistributed(keras.Sequential([Block()]))
    x = shared(keras.ops.expand_dims(x, 1))
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def attention_types(model):
    names = set(STOCK) | {"GroupQueryAttention"}
    return [type(layer) for layer in model._flatten_layers() if type(layer).__name__ in names]


def test_convert_and_revert_change_every_attention_layer_and_nothing_else():
    model = deep_model()
    expected, weights = model(X), model.get_weights()
    before = list(model._flatten_layers())
    stock_types = attention_types(model)
    assert len(stock_types) == 7
    assert attn_ops.convert(model) is model
    assert all(cls.__module__.startswith("attn_ops.") for cls in attention_types(model))
    assert [id(layer) for layer in model._flatten_layers()] == [id(layer) for layer in before]
    np.testing.assert_allclose(model(X), expected, atol=1e-5)
    assert attn_ops.revert(model) is model
    assert attention_types(model) == stock_types
    np.testing.assert_allclose(model(X), expected, atol=1e-6)
    for a, b in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(a, b)


def test_converted_layers_run_ours(monkeypatch):
    count = []
    run = attn_ops.scaled_dot_product_attention
    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", lambda *a, **k: count.append(1) or run(*a, **k))
    model = deep_model()
    model(X)
    assert not count
    attn_ops.convert(model)(X)
    assert len(count) == 7


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("name", STOCK)
def test_converted_layers_equal_ours(name, flash):
    config = {
        "MultiHeadAttention": dict(num_heads=2, key_dim=4, dropout=0.5, seed=1),
        "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2, dropout=0.5, seed=1),
        "Attention": dict(use_scale=True, dropout=0.5, seed=1),
    }[name]
    if HAS_WINDOW and name != "Attention":
        config["sliding_window"] = 2
    stock, mine = twins(name, (2, 5, 6), (2, 5, 6), flash_attention=FLASH[flash], **config)
    attn_ops.convert(stock)

    def call(layer, inputs):
        x = inputs[0]
        return layer([x, x], training=True) if name == "Attention" else layer(x, x, training=True)

    assert_same(stock, mine, [random(2, 5, 6)], call)


def test_conversion_before_build():
    layer = keras.layers.MultiHeadAttention(2, 4)
    attn_ops.convert(layer)
    assert type(layer) is ours("MultiHeadAttention")
    assert layer(X, X, return_attention_scores=True)[1].shape == (2, 2, 5, 5)


def test_training_goes_on_after_conversion():
    """Optimizer state stays, and the functions traced with the stock layers are traced again."""
    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5, 6))
        return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)))

    model, control = make(), make()
    y = random(2, 5, 1, dtype="float32")
    histories = []
    for net, change in ((control, lambda net: None), (model, attn_ops.convert)):
        net.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
        net.fit(X, y, epochs=2, verbose=0)
        net.predict(X, verbose=0)
        traced = net.train_function
        change(net)
        assert (net.train_function is traced) == (net is control)
        histories.append(net.fit(X, y, epochs=2, verbose=0).history["loss"])
        np.testing.assert_allclose(net.predict(X, verbose=0), net(X), atol=1e-5)
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)


def test_converted_models_save_and_reverted_ones_do_not_need_us(tmp_path):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs))
    attn_ops.convert(model)
    model.save(tmp_path / "ours.keras")
    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert attention_types(loaded) == [ours("MultiHeadAttention")]
    np.testing.assert_array_equal(loaded(X), model(X))
    attn_ops.revert(loaded)
    loaded.save(tmp_path / "stock.keras")
    reloaded = keras.saving.load_model(tmp_path / "stock.keras")
    assert attention_types(reloaded) == [STOCK["MultiHeadAttention"]]
    np.testing.assert_allclose(reloaded(X), model(X), atol=1e-6)


def test_revert_makes_a_forced_layer_one_that_keras_can_run():
    layer = ours("MultiHeadAttention")(2, 4, flash_attention=True)
    layer(X, X)
    attn_ops.revert(layer)
    assert type(layer) is STOCK["MultiHeadAttention"]
    assert np.isfinite(layer(X, X)).all()
    assert attn_ops.convert(layer).flash_attention is None


@pytest.mark.parametrize("name, arguments", [("MultiHeadAttention", (2, 4)), ("GroupQueryAttention", (4, 2, 1))])
def test_revert_of_a_layer_that_was_made_as_ours(name, arguments):
    layer = ours(name)(*arguments)
    expected = layer(X, X)
    attn_ops.revert(layer)
    np.testing.assert_allclose(layer(X, X), expected, atol=1e-6)


@pytest.mark.parametrize("name", STOCK)
def test_a_layer_whose_class_changed_takes_what_its_class_takes(name):
    """Keras keeps the signature of `call`, and the method `build`, of the class that a layer was made as."""
    x, bias = random(2, 5, 6), random(5, 5, seed=1)
    config = {"MultiHeadAttention": (2, 4), "GroupedQueryAttention": (4, 2, 1), "Attention": (True,)}[name]
    call = (lambda layer, **k: layer([x, x], **k)) if name == "Attention" else (lambda layer, **k: layer(x, x, **k))
    layer, made = attn_ops.convert(STOCK[name](*config, dtype="float64")), ours(name)(*config, dtype="float64")
    for one in (layer, made):
        call(one)
    made.set_weights(layer.get_weights())
    with pytest.raises(ValueError, match="Keras's own code has no attention_bias"):
        call(layer, attention_bias=bias)
    layer.as_in_keras = False
    np.testing.assert_allclose(call(layer, attention_bias=bias), call(made, attention_bias=bias), rtol=1e-9)
    with pytest.raises(TypeError, match="attention_bias"):
        call(attn_ops.revert(layer), attention_bias=bias)

    unbuilt = attn_ops.revert(ours(name)(*config, dtype="float64"))
    call(unbuilt)
    unbuilt.set_weights(made.get_weights())
    np.testing.assert_allclose(call(unbuilt), call(made), rtol=1e-9)


def test_subclasses_keep_their_class():
    class Mine(keras.layers.MultiHeadAttention):
        pass

    assert type(attn_ops.convert(Mine(2, 4))) is Mine


def test_convert_refuses_what_is_no_layer():
    for function in (attn_ops.convert, attn_ops.revert):
        with pytest.raises(TypeError, match="model must be a Keras layer or model, got list"):
            function([keras.layers.MultiHeadAttention(2, 4)])
