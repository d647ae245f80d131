"""Bad input to the public function: the exact exception, naming the function, the rule and the values.

The raw op and the NumPy binding have their own checks (tensorflow/test_raw_op.py, kernels/test_core.py); here is what Python sees, eagerly
and while a graph is built.
"""

import gc
import re

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import masks, scaled_dot_product_attention

NAME = "scaled_dot_product_attention: "


def normal(*shape, dtype=tf.float32):
    return tf.random.stateless_normal(shape, [1, 2], dtype=dtype)


def inputs(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 3)):
    return {"query": normal(*q), "key": normal(*k), "value": normal(*v)}


def ragged():
    return tf.ragged.constant([[1.0, 2.0], [3.0]])


def zeros(*shape):
    """Zeros that take no memory whatever their size."""
    return tf.zeros(shape)


# What changes in a good call, the exception, and words of its message: the rule and the values.
CASES = {
    "rank 2": (dict(query=normal(5, 8)), ValueError, ["rank 4", "rank 3", "(5, 8)"]),
    "rank 5": (dict(query=normal(1, 2, 5, 4, 8)), ValueError, ["rank 4", "(1, 2, 5, 4, 8)"]),
    "rank 3 and rank 4": (dict(query=normal(2, 5, 8)), ValueError, ["rank 4", "(2, 5, 8)", "(2, 7, 2, 8)"]),
    "batch": (dict(query=normal(3, 5, 4, 8)), ValueError, ["same batch size", "3, 2, 2"]),
    "batch of value": (dict(value=normal(1, 7, 2, 3)), ValueError, ["same batch size", "2, 2, 1"]),
    "head_dim": (dict(query=normal(2, 5, 4, 9)), ValueError, ["same head_dim", "9, 8"]),
    "head_dim 0": (dict(query=normal(2, 5, 4, 0), key=normal(2, 7, 2, 0)), ValueError, ["head_dim must be at least 1"]),
    "lengths of key and value": (dict(value=normal(2, 6, 2, 3)), ValueError, ["key and value", "same length", "7, 6"]),
    "heads of key and value": (dict(value=normal(2, 7, 4, 3)), ValueError, ["same number of heads", "2, 4"]),
    "num_heads not a multiple": (
        dict(query=normal(2, 5, 6, 8), key=normal(2, 7, 4, 8), value=normal(2, 7, 4, 8)),
        ValueError,
        ["num_heads (6) must be a multiple of num_kv_heads (4)"],
    ),
    "more kv heads than heads": (
        dict(query=normal(2, 5, 1, 8)),
        ValueError,
        ["num_heads (1) must be a multiple of num_kv_heads (2)"],
    ),
    "no kv heads": (
        dict(key=normal(2, 7, 0, 8), value=normal(2, 7, 0, 3)),
        ValueError,
        ["num_heads (4) must be a multiple of num_kv_heads (0)"],
    ),
    "layout": (dict(layout="SBHD"), ValueError, ["layout must be 'BSHD' or 'BHSD'", "'SBHD'"]),
    "integer query": (dict(query=tf.zeros([2, 5, 4, 8], tf.int32)), TypeError, ["query must be float16", "int32"]),
    "complex value": (dict(value=tf.zeros([2, 7, 2, 3], tf.complex64)), TypeError, ["value must be", "complex64"]),
    "string key": (dict(key=tf.fill([2, 7, 2, 8], "a")), TypeError, ["key must be", "string"]),
    "None": (dict(key=None), TypeError, ["key must be a dense tensor", "NoneType"]),
    "an object": (dict(key=object()), TypeError, ["key must be a dense tensor", "object"]),
    "ragged query": (dict(query=ragged()), TypeError, ["query is a RaggedTensor", "query_seq_lengths"]),
    "ragged mask": (dict(mask=ragged()), TypeError, ["mask is a RaggedTensor"]),
    "ragged bias": (dict(bias=ragged()), TypeError, ["bias is a RaggedTensor"]),
    "sparse value": (dict(value=tf.sparse.eye(3)), TypeError, ["value must be a dense tensor", "SparseTensor"]),
    "float mask": (dict(mask=normal(5, 7)), TypeError, ["mask must be boolean", "float32", "bias="]),
    "integer mask": (dict(mask=tf.ones([5, 7], tf.int32)), TypeError, ["mask must be boolean", "int32", "cast"]),
    "boolean bias": (dict(bias=tf.ones([5, 7], tf.bool)), TypeError, ["bias must be floating", "bool", "mask="]),
    "mask of the wrong keys": (
        dict(mask=tf.ones([2, 1, 5, 8], tf.bool)),
        ValueError,
        ["mask of shape (2, 1, 5, 8)", "does not broadcast", "seqlen_k=7", "seqlen_k is 8"],
    ),
    "mask of the wrong heads": (
        dict(mask=tf.ones([2, 3, 5, 7], tf.bool)),
        ValueError,
        ["does not broadcast", "num_heads=4", "num_heads is 3"],
    ),
    "key padding as a matrix": (
        dict(mask=tf.ones([2, 7], tf.bool)),
        ValueError,
        ["does not broadcast", "seqlen_q is 2"],
    ),
    "mask of rank 1": (dict(mask=tf.ones([7], tf.bool)), ValueError, ["mask must have rank 4", "(7,)"]),
    "one of many masks": (
        dict(mask=[tf.ones([5, 7], tf.bool), tf.ones([5, 6], tf.bool)]),
        ValueError,
        ["mask of shape (5, 6)", "does not broadcast"],
    ),
    "masks of two alignments": (
        dict(mask=masks.causal("bottom_right"), window=(1, 1)),
        ValueError,
        ["causal_alignment", "'bottom_right'", "'top_left'"],
    ),
    "bias of the wrong shape": (dict(bias=normal(4, 5, 7)), ValueError, ["bias of shape (4, 5, 7)", "batch is 4"]),
    "NaN scale": (dict(scale=float("nan")), ValueError, ["scale must be finite", "nan"]),
    "infinite scale": (dict(scale=-np.inf), ValueError, ["scale must be finite", "-inf"]),
    "infinite tensor scale": (dict(scale=tf.constant(np.inf)), ValueError, ["scale must be finite", "inf"]),
    "scale too large": (dict(scale=10**400), ValueError, ["scale must be finite"]),
    "scale of rank 1": (dict(scale=tf.ones([4])), ValueError, ["scale must be a scalar", "(4,)"]),
    "integer tensor scale": (dict(scale=tf.constant(2)), TypeError, ["scale must be floating", "int32"]),
    "dropout 1": (dict(dropout_rate=1.0), ValueError, ["dropout_rate must be in [0, 1)", "1.0"]),
    "dropout negative": (dict(dropout_rate=-0.1), ValueError, ["dropout_rate must be in [0, 1)", "-0.1"]),
    "dropout NaN": (dict(dropout_rate=float("nan")), ValueError, ["dropout_rate must be in [0, 1)", "nan"]),
    "dropout tensor": (dict(dropout_rate=tf.constant(0.1)), TypeError, ["dropout_rate must be a Python number"]),
    "seed of 3": (dict(dropout_rate=0.1, dropout_seed=tf.zeros([3], tf.int64)), ValueError, ["shape [2]", "(3,)"]),
    "float seed": (dict(dropout_rate=0.1, dropout_seed=tf.zeros([2])), TypeError, ["dropout_seed", "float32"]),
    "seed too large": (dict(dropout_rate=0.1, dropout_seed=2**64), ValueError, ["64 bits", str(2**64)]),
    "window of one": (dict(window=3), TypeError, ["window must be a pair (left, right)", "got 3"]),
    "window of three": (dict(window=(1, 2, 3)), TypeError, ["window must be a pair", "(1, 2, 3)"]),
    "window negative": (dict(window=(-2, 1)), ValueError, ["window", "(-2, 1)"]),
    "window of floats": (dict(window=(1.5, 1)), TypeError, ["window must hold integers", "(1.5, 1)"]),
    "alignment": (
        dict(is_causal=True, causal_alignment="lower"),
        ValueError,
        ["'top_left' or 'bottom_right'", "'lower'"],
    ),
    "negative length": (dict(key_value_seq_lengths=[3, -1]), ValueError, ["between 0 and 7", "-1"]),
    "length too long": (dict(query_seq_lengths=[6, 1]), ValueError, ["query_seq_lengths", "between 0 and 5", "6"]),
    "length beyond int32": (
        dict(key_value_seq_lengths=np.array([2**32 + 3, 1])),
        ValueError,
        ["key_value_seq_lengths", "between 0 and 7", str(2**32 + 3)],
    ),
    "float lengths": (
        dict(query_seq_lengths=[1.0, 2.0]),
        TypeError,
        ["query_seq_lengths must hold integers", "float32"],
    ),
    "lengths of another batch": (dict(query_seq_lengths=[1, 2, 3]), ValueError, ["[batch=2]", "(3,)"]),
    "scalar length": (dict(key_value_seq_lengths=3), ValueError, ["key_value_seq_lengths", "[batch=2]", "()"]),
    "lengths of a mask": (
        dict(mask=masks.padding(key_lengths=np.array([8, 1]))),
        ValueError,
        ["key_value_seq_lengths", "between 0 and 7", "8"],
    ),
    "implementation": (
        dict(implementation="cuda"),
        ValueError,
        ["implementation", "'fused', 'composite', 'reference'", "'cuda'"],
    ),
    "overflowing output": (
        dict(query=zeros(2**40, 0, 2**21, 8), key=zeros(2**40, 0, 1, 8), value=zeros(2**40, 0, 1, 2**21)),
        ValueError,
        ["overflow 64 bits", str(2**21)],
    ),
    "overflowing scores": (
        dict(query=zeros(2**40, 0, 2**21, 1), key=zeros(2**40, 0, 1, 1), value=zeros(2**40, 0, 1, 1)),
        ValueError,
        ["overflow 64 bits", str(2**21)],
    ),
}


def assert_message(error, words, name=NAME):
    assert str(error.value).startswith(name), error.value
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, mode):
    change, exception, words = CASES[case]
    arguments = {**inputs(), **change}
    with pytest.raises(exception) as error:
        if mode == "eager":
            scaled_dot_product_attention(**arguments)
        else:
            tf.function(lambda: scaled_dot_product_attention(**arguments), autograph=False)()
    assert type(error.value) is exception
    assert_message(error, words)


def test_error_of_autograph_functions_keeps_its_type():
    @tf.function
    def function(x):
        return scaled_dot_product_attention(x, x, x, scale=float("nan"))

    with pytest.raises(ValueError, match="scale must be finite"):
        function(normal(2, 5, 4, 8))


def test_no_other_layout_is_proposed_that_would_not_do_either():
    with pytest.raises(ValueError, match="head_dim must be at least 1") as error:
        scaled_dot_product_attention(*[normal(1, 2, 2, 0)] * 3)
    assert "they fit as" not in str(error.value)
    with pytest.raises(ValueError, match='they fit as layout="BHSD"'):
        scaled_dot_product_attention(normal(2, 4, 5, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 8))


@pytest.mark.parametrize("function", ["explain", "can_use_fused"])
def test_questions_refuse_bad_input_under_their_own_name(function):
    with pytest.raises(ValueError) as error:
        getattr(attn_ops, function)(**inputs(q=(2, 5, 3, 8)))
    assert_message(error, ["num_heads (3) must be a multiple of num_kv_heads (2)"], name=f"{function}: ")


def test_attention_weights_refuses_bad_input_under_its_own_name():
    with pytest.raises(ValueError) as error:
        attn_ops.attention_weights(normal(2, 5, 4, 8), normal(2, 5, 4, 9))
    assert_message(error, ["same head_dim", "8, 9"], name="attention_weights: ")


def test_attention_weights_refuses_an_lse_of_another_shape():
    query = normal(2, 5, 4, 8)
    with pytest.raises(ValueError) as error:
        attn_ops.attention_weights(query, query, lse=normal(2, 5, 4))
    assert_message(error, ["lse", "[2, 4, 5]", "(2, 5, 4)"], name="attention_weights: ")


@pytest.mark.parametrize("forced", ["fused", "composite"])
@pytest.mark.parametrize(
    "signature, arguments, words",
    [
        (dict(query=[None] * 4), dict(query=(2, 5, 3, 8)), "num_heads|heads"),
        (dict(query=None), dict(query=(2, 5, 8)), "rank"),
        (dict(value=[None] * 4), dict(value=(2, 6, 2, 3)), "6"),
    ],
)
def test_shapes_known_only_when_running(forced, signature, arguments, words):
    good = inputs()
    specs = [tf.TensorSpec(signature.get(name, x.shape), x.dtype) for name, x in good.items()]

    @tf.function(input_signature=specs, autograph=False)
    def function(query, key, value):
        return scaled_dot_product_attention(query, key, value, implementation=forced)

    function(*good.values())
    bad = {**good, **{name: normal(*shape) for name, shape in arguments.items()}}
    # The composite runs many ops: the one that fails is named after the function.
    with pytest.raises(tf.errors.InvalidArgumentError, match=words if forced == "fused" else NAME[:-2]):
        function(*bad.values())


@pytest.mark.parametrize("forced", ["fused", "composite"])
@pytest.mark.parametrize("lengths", [[3, 8], [-1, 3], [2**32 + 1, 3]])
def test_lengths_known_only_when_running(forced, lengths):
    @tf.function(autograph=False)
    def function(lengths):
        return scaled_dot_product_attention(**inputs(), key_value_seq_lengths=lengths, implementation=forced)

    function(tf.constant([7, 0], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="key"):
        function(tf.constant(lengths, tf.int64))


def test_memory_is_flat_over_errors():
    # A failing eager op would keep its inputs alive: 2 MB each here, 4 GB in all.
    query = np.zeros((1, 1024, 8, 64), np.float32)
    key = np.zeros((1, 4, 3, 64), np.float32)

    def fail():
        with pytest.raises(ValueError):
            scaled_dot_product_attention(tf.constant(query), key, key)

    def resident():
        gc.collect()
        with open("/proc/self/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) / 1024

    for _ in range(50):
        fail()
    before = resident()
    for _ in range(2000):
        fail()
    assert resident() - before < 100, "MB more than before"
