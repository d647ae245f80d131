"""AttentionAxes: several attention axes as one."""

import numpy as np
import pytest
import tensorflow as tf

from attn_ops.layers.axes import AttentionAxes

SHAPE = (2, 3, 4, 5, 2, 6)  # batch, three dims, heads, depth


@pytest.mark.parametrize("attended", [(1, 2, 3), (3,), (2, 1), (1, 3), (-2,)])
@pytest.mark.parametrize("static", [True, False])
def test_flatten_and_back(attended, static):
    x = tf.constant(np.random.default_rng(0).normal(size=SHAPE))
    axes = AttentionAxes(attended, 4)
    order = [axis if axis >= 0 else 5 + axis for axis in attended]
    free = [axis for axis in range(4) if axis not in order]

    def run(x):
        flat = axes.flatten(x)
        return flat, axes.unflatten(flat, x)

    if not static:
        run = tf.function(run, input_signature=[tf.TensorSpec([None] * 4 + [2, 6], tf.float64)])
    flat, back = run(x)
    expected = np.transpose(x, [*free, *order, 4, 5]).reshape(
        int(np.prod([SHAPE[i] for i in free])), int(np.prod([SHAPE[i] for i in order])), 2, 6
    )
    np.testing.assert_array_equal(flat, expected)
    np.testing.assert_array_equal(back, x)


def test_one_axis_is_left_as_it_is():
    x = tf.zeros((2, 3, 4, 5))
    axes = AttentionAxes((1,), 2)
    assert axes.is_flat
    assert axes.flatten(x) is x and axes.unflatten(x, x) is x
    assert not AttentionAxes((2,), 3).is_flat and not AttentionAxes((1,), 3).is_flat


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4), (1, 3, 4), (2, 1, 1)])
def test_padding_masks_cover_the_first_axes(shape):
    """Those of two axes, [2, 3], too: none of the attended ones below has this length but the first."""
    like = tf.zeros((2, 3, 4, 6))
    mask = np.random.default_rng(0).random(shape) > 0.5
    full = np.broadcast_to(mask.reshape(shape + (1,) * (3 - len(shape))), (2, 3, 4))
    for attended in ((1,), (2,), (1, 2)):
        axes = AttentionAxes(attended, 3)
        flat = axes.flatten_padding(tf.constant(mask), like).numpy()
        expected = np.transpose(full, [*axes.free, *axes.attended])
        expected = expected.reshape(int(np.prod(expected.shape[: len(axes.free)])), -1)
        np.testing.assert_array_equal(np.broadcast_to(flat, expected.shape), expected)


def test_masks_that_broadcast_stay_small():
    axes = AttentionAxes((2, 3), 4)
    query, key = tf.zeros((2, 3, 4, 5, 6)), tf.zeros((2, 3, 2, 2, 6))
    for shape, flat in (((4, 5, 2, 2), (1, 1, 20, 4)), ((2, 1, 1, 1, 2, 2), (6, 1, 1, 4)), ((1, 1, 1, 1), (1, 1, 1, 1))):
        assert axes.flatten_mask(tf.ones(shape, tf.bool), query, key).shape == flat


def test_masks_of_the_wrong_rank_are_refused():
    axes = AttentionAxes((1,), 2)
    x = tf.zeros((2, 3, 6))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3,\) has 1 axes, and needs 2"):
        axes.flatten_mask(tf.ones(3, tf.bool), x, x)
    with pytest.raises(ValueError, match="has 5 axes"):
        axes.flatten_mask(tf.ones((1, 1, 1, 3, 3), tf.bool), x, x)
    with pytest.raises(ValueError, match=r"padding mask of shape \(2, 3, 6\) has more axes than the 2"):
        axes.flatten_padding(tf.ones((2, 3, 6), tf.bool), x)


def test_a_padding_mask_of_two_axes_is_of_the_attended_one():
    """As in Keras, which reads `[batch, seqlen]` so wherever the axis stands; unless its length says otherwise."""
    rng = np.random.default_rng(0)
    for shape, attended, at in (((2, 4), 2, 2), ((2, 1), 2, 2), ((2, 3), 2, 1), ((1, 3), 1, 1)):
        mask, like = rng.random(shape) > 0.4, tf.zeros((2, 3, 4, 6))
        full = np.broadcast_to(np.expand_dims(mask, 3 - at), (2, 3, 4))
        axes = AttentionAxes((attended,), 3)
        expected = np.transpose(full, [*axes.free, *axes.attended]).reshape(-1, full.shape[attended])
        flat = axes.flatten_padding(tf.constant(mask), like).numpy()
        np.testing.assert_array_equal(np.broadcast_to(flat, expected.shape), expected)


def test_masks_that_do_not_broadcast_are_refused():
    axes, x = AttentionAxes((2,), 3), tf.zeros((2, 3, 4, 6))
    with pytest.raises(ValueError, match=r"padding mask of shape \(2, 5\) does not broadcast .* shape \(2, 3, 4, 6\)"):
        axes.flatten_padding(tf.ones((2, 5), tf.bool), x)
    with pytest.raises(ValueError, match=r"an attention_mask of shape \(2, 4, 4, 4\) does not broadcast .* and \(2, 3, 4, 6\)"):
        axes.flatten_mask(tf.ones((2, 4, 4, 4), tf.bool), x, x)
