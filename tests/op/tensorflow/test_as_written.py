"""Functions that AutoGraph is to leave alone, and what layers of one model share in a graph."""

import sys

import pytest
import tensorflow as tf

import attn_ops
from attn_ops.tensorflow.as_written import as_written
from children import run


def where():
    return sys._getframe().f_code.co_filename


@as_written
def kept():
    assert (lambda: where())() == __file__  # neither this nor what it calls is converted
    return where()


def converted():
    return where()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_autograph_leaves_it_alone(jit_compile):
    found = []

    @tf.function(jit_compile=jit_compile)
    def function():
        found.extend([kept(), converted()])
        return tf.constant(0)

    function()
    assert found[0] == __file__ and found[1] != __file__  # which is what AutoGraph does to others
    assert kept() == __file__


EVERY_DOOR = """
import attn_ops, tensorflow as tf
x = tf.ones((1, 4, 2, 8))
layers = [attn_ops.layers.MultiHeadAttention(2, 4), attn_ops.layers.GroupedQueryAttention(4, 2, 1, position_bias="alibi")]

@tf.function
def function(x):
    masks = attn_ops.masks
    mask = masks.chunked(2) & masks.causal() & masks.from_function(lambda b, h, q, k: q >= k)
    cache = attn_ops.KVCache.create(1, 8, 2, 8, "float32")
    out, cache = attn_ops.decode_attention(attn_ops.rotary_embedding(x), cache, x, x, mask=mask)
    cache = cache.rewind(1).update(x, x)
    out += attn_ops.scaled_dot_product_attention(x, x, x, mask=mask, alibi_slopes=attn_ops.alibi_slopes(2))
    out += attn_ops.varlen_attention(x[0], x[0], x[0], [0, 2, 4], [0, 2, 4])
    ragged = tf.RaggedTensor.from_row_lengths(x[0], [1, 3])
    outputs = [layer(x[0], x[0], attention_mask=mask) for layer in layers]
    return out, cache.copy(), attn_ops.ragged_attention(ragged, ragged, ragged), outputs, attn_ops.attention_weights(x, x)

function(x)
"""


def test_autograph_warns_of_no_door(tmp_path):
    """It says of each function, once in a process, that it could not read it; and it reads files alone."""
    (tmp_path / "doors.py").write_text(EVERY_DOOR)
    done = run("import runpy; runpy.run_path(sys.argv[1])", str(tmp_path / "doors.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "AutoGraph" not in done.stdout + done.stderr


def library_of(layers, **options):
    """How many functions the graph of so many attentions, forward and backward, has."""

    @tf.function(autograph=False)
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(layers):
                y = attn_ops.scaled_dot_product_attention(y, y, y, implementation="fused", **options)
        return tape.gradient(y, x)

    graph = function.get_concrete_function(tf.TensorSpec([2, 8, 2, 16])).graph
    return len(graph.as_graph_def().library.function)


def test_equal_calls_share_their_branches():
    assert library_of(4) == library_of(1)
    assert library_of(4, is_causal=True) == library_of(1, is_causal=True)
