"""Config, files and tools of Keras: our layers and the stock ones stand in for each other."""

import copy
import functools
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from attn_ops import masks
from layer_twins import HAS_GATE, HAS_WINDOW, STOCK, ours, random

LAYERS = {
    "MultiHeadAttention": dict(num_heads=2, key_dim=4, value_dim=3, **({"use_gate": True} if HAS_GATE else {})),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
    "Attention": dict(use_scale=True),
}
X = random(2, 5, 6, dtype="float32")


def call(name, layer, x, **kwargs):
    return layer([x, x], **kwargs) if name == "Attention" else layer(x, x, **kwargs)


class Block(keras.Model):
    """The layer as an attribute of a custom model."""

    def __init__(self, cls, name, config):
        super().__init__()
        self.kind = name
        self.attention = cls(**config)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(call(self.kind, self.attention, x))


def functional(cls, name, **config):
    inputs = keras.Input((5, 6))
    return keras.Model(inputs, keras.layers.Dense(3)(call(name, cls(**{**LAYERS[name], **config}), inputs)))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["from_stock", "to_stock"])
@pytest.mark.parametrize("kind", ["functional", "custom"])
def test_weights_files_load_both_ways(tmp_path, name, direction, kind):
    def model(cls):
        if kind == "functional":
            return functional(cls, name)
        block = Block(cls, name, LAYERS[name])
        block(X)
        return block

    classes = STOCK[name], ours(name)
    source, target = map(model, classes if direction == "from_stock" else classes[::-1])
    randomize(source)
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(target(X), source(X), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("flash", [None, False])
def test_model_files(tmp_path, name, flash):
    model = functional(ours(name), name, flash_attention=flash)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    [layer] = [layer for layer in loaded.layers if isinstance(layer, ours(name))]
    assert type(layer) is ours(name) and layer.flash_attention is flash
    np.testing.assert_array_equal(loaded(X), model(X))


@pytest.mark.parametrize("dropouts", [(0.0, 0.5), (0.5, 0.0)])
def test_weights_files_do_not_depend_on_dropout(tmp_path, dropouts):
    """Dropout adds the state of its seed to the layer's variables."""
    source, target = (functional(ours("MultiHeadAttention"), "MultiHeadAttention", dropout=d) for d in dropouts)
    randomize(source)
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(target(X), source(X), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_configs_are_those_of_keras(name):
    """Before and after build (which changes attention_axes), and in both directions."""
    config = dict(LAYERS[name], name="layer", dropout=0.1)
    if HAS_WINDOW and name != "Attention":
        config["sliding_window"] = 3
    stock, mine = STOCK[name](**config), ours(name)(**config)
    for build in (False, True):
        if build:
            call(name, stock, X), call(name, mine, X)
        assert mine.get_config() == stock.get_config()
    assert STOCK[name].from_config(mine.get_config()).get_config() == stock.get_config()
    assert ours(name).from_config(stock.get_config()).get_config() == stock.get_config()


@pytest.mark.parametrize("name", LAYERS)
def test_variables_are_those_of_keras(name):
    stock, mine = (cls(**LAYERS[name], dropout=0.1, name="layer") for cls in (STOCK[name], ours(name)))
    call(name, stock, X), call(name, mine, X)
    # Seed generators are numbered within the process.
    described = [[(re.sub(r"_\d+/", "/", v.path), v.shape, v.dtype) for v in x.variables] for x in (stock, mine)]
    assert described[1] == described[0]
    assert [type(x) for x in mine._flatten_layers()][1:] == [type(x) for x in stock._flatten_layers()][1:]


@pytest.mark.parametrize("name", LAYERS)
def test_export(tmp_path, name):
    model = functional(ours(name), name)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(loaded.serve(X), model(X), atol=1e-5)
    assert b"AttnOps>" not in (tmp_path / "saved_model.pb").read_bytes()


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupedQueryAttention"])
def test_quantize_int8(name):
    model = functional(ours(name), name)
    expected = model(X).numpy()
    model.quantize("int8")
    [layer] = [layer for layer in model.layers if isinstance(layer, ours(name))]
    assert keras.backend.standardize_dtype(layer._query_dense._kernel.dtype) == "int8"
    np.testing.assert_allclose(model(X), expected, atol=0.1)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupedQueryAttention"])
def test_lora(name):
    layer = ours(name)(**LAYERS[name])
    call(name, layer, X)
    full = len(layer.trainable_weights)
    layer._query_dense.enable_lora(2)
    layer._value_dense.enable_lora(2)
    assert len(layer.trainable_weights) == full - 2 + 4  # two kernels frozen, two pairs of factors added
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(call(name, layer, X, use_causal_mask=True) ** 2)
    gradients = tape.gradient(y, [v.value for v in layer.trainable_weights])
    assert all(g is not None for g in gradients)


def test_clone_model_keeps_our_class():
    model = functional(ours("MultiHeadAttention"), "MultiHeadAttention", flash_attention=False)
    clone = keras.models.clone_model(model)
    [layer] = [layer for layer in clone.layers if isinstance(layer, ours("MultiHeadAttention"))]
    assert layer.flash_attention is False


MASKS = {
    "causal": masks.causal(),
    "window and prefix": masks.window(2, 1) & masks.prefix(3),
    "segments": masks.segments(np.array([0, 0, 1, 1, 1])),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupedQueryAttention"])
def test_masks_of_calls_are_saved(tmp_path, name, mask):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, call(name, ours(name)(**LAYERS[name]), inputs, attention_mask=MASKS[mask]))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.abs(loaded(X) - call(name, loaded.layers[-1], X)).max() > 1e-3  # the mask hides something
    for copied in (loaded, copy.deepcopy(loaded)):
        np.testing.assert_array_equal(copied(X), model(X))


def test_masks_of_calls_that_cannot_be_saved_say_so(tmp_path):
    inputs = keras.Input((5, 6))
    mask = masks.from_function(lambda b, h, q, k: q >= k)
    model = keras.Model(inputs, ours("MultiHeadAttention")(2, 4)(inputs, inputs, attention_mask=mask))
    with pytest.raises(ValueError, match="holds a Python function, which cannot be saved"):
        model.save(tmp_path / "model.keras")


# Quantized projections and LoRA: what loads back

FILES = {"MultiHeadAttention": "_query_dense", "GroupedQueryAttention": "_query_dense"}


def quantized(cls, name, seed=3):
    model = functional(cls, name)
    randomize(model, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that have nothing to quantize
        model.quantize("int8")
    return model


# For tests that leave the model as it is: quantizing takes seconds.
quantized_once = functools.cache(quantized)


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", FILES)
def test_quantized_models_load_back(tmp_path, name):
    model = quantized_once(ours(name), name)
    for i in range(2):  # and what was loaded can be saved
        model.save(tmp_path / f"{i}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{i}.keras")
        [layer] = [layer for layer in loaded.layers if isinstance(layer, ours(name))]
        assert all(projection.quantization_mode == "int8" for projection in layer._projections().values())
        np.testing.assert_array_equal(loaded(X), model(X))
        model = loaded


@pytest.mark.parametrize("name", FILES)
def test_models_with_some_quantized_projections_load_back(tmp_path, name):
    model = functional(ours(name), name)
    randomize(model)
    [layer] = [layer for layer in model.layers if isinstance(layer, ours(name))]
    layer._value_dense.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    [layer] = [layer for layer in loaded.layers if isinstance(layer, ours(name))]
    assert layer._value_dense.quantization_mode == "int8" and layer._query_dense.quantization_mode is None
    np.testing.assert_array_equal(loaded(X), model(X))


@pytest.mark.parametrize("name", FILES)
def test_a_map_of_policies_with_a_quantized_projection_loads_back(tmp_path, name):
    policies = keras.dtype_policies.DTypePolicyMap("float32", {"attention/value": keras.dtype_policies.get("float8_from_float32")})
    inputs = keras.Input((5, 6))
    layer = ours(name)(**LAYERS[name], name="attention", dtype=policies)
    model = keras.Model(inputs, call(name, layer, inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("attention")._value_dense.quantization_mode == "float8"
    np.testing.assert_array_equal(loaded(X), model(X))


CONFIGURATIONS = {
    "weights alone": lambda of: of.Int8QuantizationConfig(activation_quantizer=None),
    "blocks of 4": lambda of: of.Int4QuantizationConfig(block_size=4),
    "one block": lambda of: of.Int4QuantizationConfig(block_size=-1),
}


@pytest.mark.skipif(not hasattr(keras.quantizers, "Int4QuantizationConfig"), reason="no configurations in this Keras")
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", FILES)
def test_how_projections_are_quantized_loads_back(tmp_path, name, configuration):
    model = functional(ours(name), name)
    randomize(model)
    [layer] = [layer for layer in model.layers if isinstance(layer, ours(name))]
    layer._value_dense.quantize(config=CONFIGURATIONS[configuration](keras.quantizers))
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(loaded(X), model(X))
    loaded.save(path)  # and what was loaded can be saved
    np.testing.assert_array_equal(keras.saving.load_model(path)(X), model(X))


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", FILES)
def test_weights_files_of_quantized_models_need_a_quantized_one(tmp_path, name):
    model = quantized_once(ours(name), name)
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        functional(ours(name), name).load_weights(tmp_path / "model.weights.h5")
    other = quantized(ours(name), name, seed=4)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(X), model(X))


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", FILES)
def test_stock_layers_still_lose_their_quantization(tmp_path, name):
    """Why ours save it with what they were built of. When this fails, files of either load into the other."""
    model = quantized(STOCK[name], name)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="could not be loaded"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("name", FILES)
def test_lora_is_merged_into_what_is_saved(tmp_path, name):
    model = functional(ours(name), name)
    randomize(model)
    [layer] = [layer for layer in model.layers if isinstance(layer, ours(name))]
    layer._query_dense.enable_lora(2)
    rng = np.random.default_rng(0)
    for factor in (layer._query_dense.lora_kernel_a, layer._query_dense.lora_kernel_b):
        factor.assign(rng.normal(size=factor.shape))
    expected = model(X)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    [layer] = [layer for layer in loaded.layers if isinstance(layer, ours(name))]
    assert not layer._query_dense.lora_enabled
    np.testing.assert_allclose(loaded(X), expected, rtol=1e-5, atol=1e-5)
    model.save_weights(tmp_path / "model.weights.h5")
    plain = functional(ours(name), name)
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(plain(X), expected, rtol=1e-5, atol=1e-5)


def test_layers_without_projections_stay_as_they_are_in_quantized_models(tmp_path):
    """Their weights are no layers of Keras's: `quantize` leaves them, and files load."""
    inputs = keras.Input((5, 6))
    x = ours("SelfAttention")(4)(inputs)
    x = ours("Attention")(use_scale=True)([x, x])
    x = ours("AttentionLayer")()([x, x, x])
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
    assert keras.backend.standardize_dtype(model.layers[1].W_q.dtype) == "float32"
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(X), model(X))
