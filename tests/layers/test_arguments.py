"""What the layers refuse, when, and how they describe themselves."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import STOCK, ours, random

DROP_INS = {
    "MultiHeadAttention": dict(num_heads=2, key_dim=4),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
    "Attention": {},
}
OWN = ["SelfAttention", "AttentionLayer", "AttentionLayerWithWeights"]
LAYERS = [*DROP_INS, *OWN, "HierarchicalAttention"]


def make(name, **config):
    return ours(name)(**DROP_INS.get(name, {}), **config)


@pytest.mark.parametrize("rate", [1.5, 1.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_out_of_range(name, rate):
    with pytest.raises(ValueError, match=rf"{name}: dropout must be (in \[0, 1\)|finite), got {rate}"):
        make(name, dropout=rate)


@pytest.mark.parametrize("rate", ["a", None, True, [0.1]])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_that_is_no_number(name, rate):
    with pytest.raises(TypeError, match=f"{name}: dropout must be a number, got "):
        make(name, dropout=rate)


def test_dropout_by_position():
    with pytest.raises(ValueError, match=r"MultiHeadAttention: dropout must be in \[0, 1\), got 2"):
        attn_ops.layers.MultiHeadAttention(2, 4, None, 2)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_of_numpy(name):
    layer = make(name, dropout=np.float32(0.25), seed=1)
    assert float(layer.get_config()["dropout"]) == 0.25


@pytest.mark.parametrize("name", OWN)
def test_scale(name):
    assert make(name, scale=np.float32(0.5)).get_config()["scale"] == 0.5
    with pytest.raises(TypeError, match=f"{name}: scale must be a number, got 'a' of type str"):
        make(name, scale="a")
    with pytest.raises(ValueError, match=f"{name}: scale must be finite, got inf"):
        make(name, scale=float("inf"))


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "2", None])
@pytest.mark.parametrize("what", ["head_dim", "num_query_heads", "num_key_value_heads"])
def test_sizes_of_grouped_heads(what, size):
    with pytest.raises(ValueError, match=f"GroupedQueryAttention: {what} must be a positive integer, got {size!r}"):
        attn_ops.layers.GroupedQueryAttention(**{**DROP_INS["GroupedQueryAttention"], what: size})


def test_masks_of_words():
    x = random(2, 5, 6)
    with pytest.raises(TypeError, match="attention_mask must hold booleans, or numbers that tell as much, got string"):
        make("MultiHeadAttention")(x, x, attention_mask=tf.constant("causal"))


@pytest.mark.parametrize("units", [0, -1, True, False, 2.0, "8"])
def test_units_that_are_no_positive_integer(units):
    with pytest.raises(ValueError, match=f"units must be None or a positive integer, got {units!r}"):
        attn_ops.layers.SelfAttention(units)


def test_units_of_numpy(tmp_path):
    layer = attn_ops.layers.SelfAttention(np.int64(3))
    assert type(layer.get_config()["units"]) is int
    assert layer(random(2, 5, 6)).shape == (2, 5, 3)
    inputs = keras.Input((5, 6))
    keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")


@pytest.mark.parametrize("shape", [(6,), (4, 5, 6), (5, None)])
def test_self_attention_refuses_other_ranks_and_unknown_features(shape):
    with pytest.raises(ValueError, match="ndim=3|known features, got shape"):
        attn_ops.layers.SelfAttention(4)(keras.Input(shape))


SHAPES = [
    ([(6, 8), (6, 4), (6, 8)], "query and key must have the same features"),
    ([(6, 8), (5, 8), (6, 8)], "key and value must have the same length"),
    ([(6, 8), (8,), (6, 8)], r"must be \[batch, seqlen, features\]"),
    ([(2, 6, 8), (2, 6, 8), (2, 6, 8)], r"must be \[batch, seqlen, features\]"),
]


@pytest.mark.parametrize("shapes, rule", SHAPES)
@pytest.mark.parametrize("name", ["AttentionLayer", "AttentionLayerWithWeights"])
def test_attention_layer_refuses_shapes_when_it_is_built(name, shapes, rule):
    text = f"{name}: .*{rule}, got shapes query .*, key .*, value "
    with pytest.raises(ValueError, match=text):
        make(name)([keras.Input(shape) for shape in shapes])
    with pytest.raises(ValueError, match=text):
        make(name)([tf.zeros((3, *shape)) for shape in shapes])
    with pytest.raises(ValueError, match=text):
        make(name).compute_output_shape([(None, *shape) for shape in shapes])
    layer = make(name)
    layer([tf.zeros((3, 6, 8))] * 3)
    with pytest.raises(ValueError, match=text):  # built for other shapes before
        layer([tf.zeros((3, *shape)) for shape in shapes])


@pytest.mark.parametrize("name", ["AttentionLayer", "AttentionLayerWithWeights"])
def test_attention_layer_refuses_other_batches(name):
    inputs = [tf.zeros((n, 6, 8)) for n in (2, 3, 3)]
    with pytest.raises(ValueError, match=r"same batch size, got shapes query \(2, 6, 8\), key \(3, 6, 8\)"):
        make(name)(inputs)
    assert make(name).compute_output_shape([(None, 5, 4), (3, 6, 4), (None, None, 7)]) is not None


@pytest.mark.parametrize("name", ["AttentionLayer", "AttentionLayerWithWeights"])
def test_errors_print_shapes_not_arrays(name):
    x = tf.fill((2, 5, 6), 0.123456)
    for call in (lambda: make(name)([x, x]), lambda: make(name)(x), lambda: make(name)([x] * 3, mask=[x[..., 0] > 0])):
        with pytest.raises(ValueError, match=r"\(2, 5") as error:
            call()
        assert "0.1234" not in str(error.value).split("Arguments received by")[0]


def test_ragged_inputs_say_what_to_do():
    ragged, name = tf.RaggedTensor.from_row_lengths(tf.ones((5, 8)), [2, 3]), "RotaryEmbedding"
    with pytest.raises(TypeError, match=rf"{name}: \w+ is a RaggedTensor.*\.to_tensor\(\).*row_lengths"):
        make(name)(ragged)


@pytest.mark.parametrize("name", LAYERS)
def test_signatures_and_documentation_list_every_argument(name):
    parameters = inspect.signature(ours(name)).parameters
    assert parameters["flash_attention"].default is None
    documentation = inspect.getdoc(ours(name))
    expected = set(parameters)
    if name in DROP_INS:
        stock = inspect.signature(STOCK[name].__init__).parameters
        assert [p for p in parameters if p in stock] == [p for p in stock if p != "self"]
        assert parameters["as_in_keras"].default is False
        expected = {p for p in expected if p not in stock} | {p for p in stock if f"{p}:" in STOCK[name].__doc__}
        assert documentation.index("differs") < documentation.index("Args:")
    for parameter in expected - {"kwargs", "self"}:
        assert parameter in documentation
    assert "Call arguments:" in documentation


def test_signatures_of_subclasses():
    class Same(attn_ops.layers.MultiHeadAttention):
        pass

    class Own(attn_ops.layers.MultiHeadAttention):
        def __init__(self, width):
            super().__init__(2, width)

    class Open(attn_ops.layers.SelfAttention):
        def __init__(self, width, **kwargs):
            super().__init__(width, **kwargs)

    assert inspect.signature(Same) == inspect.signature(attn_ops.layers.MultiHeadAttention)
    assert list(inspect.signature(Own).parameters) == ["width"]
    assert list(inspect.signature(Open).parameters) == ["width", "flash_attention", "kwargs"]
    assert Own(4).key_dim == 4 and Open(4, flash_attention=False).flash_attention is False


@pytest.mark.parametrize("name", DROP_INS)
def test_a_layer_is_a_function_of_its_call(name):
    layer, x = make(name), random(2, 5, 8)
    given = [x, x] if name != "Attention" else [[x, x]]
    assert inspect.signature(layer) == inspect.signature(keras.layers.Dense(1))
    for jit_compile in (False, True):
        found = tf.function(layer, jit_compile=jit_compile)(*given, use_causal_mask=True)
        np.testing.assert_allclose(found, layer(*given, use_causal_mask=True), rtol=1e-5, atol=1e-6)


def test_flash_attention_by_position_is_keras_s():
    """Its place among Keras's arguments means the same as the keyword."""
    for name in ("MultiHeadAttention", "GroupedQueryAttention"):
        before = list(inspect.signature(ours(name)).parameters.values())
        names = [p.name for p in before]
        values = {**{p.name: p.default for p in before}, **DROP_INS[name], "flash_attention": False}
        layer = ours(name)(*(values[n] for n in names[: names.index("flash_attention") + 1]))
        assert layer.flash_attention is False and layer.implementation == "composite"


@pytest.mark.parametrize(
    "call",
    (
        lambda x, mask: ours("Attention")()([x, x], mask=[None, mask]),
        lambda x, mask: ours("Attention")()([x, x], mask=[mask, None]),
        lambda x, mask: ours("SelfAttention")(4)(x, mask=mask),
        lambda x, mask: ours("MultiHeadAttention")(2, 4)(x, x, query_mask=mask),
        lambda x, mask: ours("GroupedQueryAttention")(4, 2, 1)(x, x, value_mask=mask),
    ),
    ids=("values", "queries", "self", "query_mask", "value_mask"),
)
def test_masks_of_attn_ops_where_arrays_are_needed(call):
    x = np.zeros((2, 5, 8), "float32")
    with pytest.raises(TypeError, match="must be a boolean tensor, got <Mask: causal>; of the layers MultiHeadAttention"):
        call(x, attn_ops.masks.causal())


def test_as_in_keras_is_a_switch():
    with pytest.raises(ValueError, match="as_in_keras must be True or False, not 'yes'"):
        make("MultiHeadAttention", as_in_keras="yes")
    for name in DROP_INS:
        assert "as_in_keras" not in make(name).get_config()
        layer = make(name, as_in_keras=True)
        assert ours(name).from_config(layer.get_config()).as_in_keras is True


def test_documentation_without_indentation():
    """As Python 3.13 leaves it."""
    stock = type("Stock", (STOCK["Attention"],), {"__doc__": inspect.cleandoc(STOCK["Attention"].__doc__)})
    mixed = type("Mixed", (attn_ops.layers.base.DropIn, stock), {"__doc__": "One that differs."})
    assert mixed.__doc__.startswith("One that differs.\n\nWhat follows is of `keras.layers.Stock`.\n\nArgs:\n    use_scale:")
    assert "\n    What" not in mixed.__doc__
