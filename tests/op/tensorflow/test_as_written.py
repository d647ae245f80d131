"""Functions that AutoGraph is to leave alone, and what layers of one model share in a graph."""

import sys

import pytest
import tensorflow as tf

import attn_ops
from attn_ops.tensorflow.as_written import as_written


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
