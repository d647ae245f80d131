"""Where our layers differ from Keras's on purpose, beyond keras_suite/expected_differences.py.

Each case is run with the stock class, where it has to fail, and with ours, where it has to hold. A case that holds for
both is no difference any more and fails its test.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from layer_twins import STOCK, ours, random

X = random(2, 5, 6, dtype="float32")


def _mha(cls, *shapes, **config):
    keras.utils.set_random_seed(0)
    layer = cls(**{"num_heads": 2, "key_dim": 4, "use_bias": False, **config})
    layer.build(*(shapes or [(2, 5, 6), (2, 5, 6)]))
    return layer


def _gqa(cls):
    layer = cls(head_dim=4, num_query_heads=4, num_key_value_heads=2, use_bias=False)
    layer.build((2, 5, 6), (2, 5, 6))
    return layer


def empty_rows_give_zeros(cls):
    """Keras: the mean of all values, masked ones included (and zeros with dropout or scores)."""
    hidden = np.zeros((2, 5, 5), bool)
    assert not _mha(cls)(X, X, attention_mask=hidden).numpy().any()


def empty_rows_of_grouped_heads_give_zeros(cls):
    """Keras: as for MultiHeadAttention."""
    assert not _gqa(cls)(X, X, attention_mask=np.zeros((2, 5, 5), bool)).numpy().any()


def empty_rows_of_attention_give_zeros(cls):
    """Keras: the mean of all values."""
    assert not cls()([X, X], mask=[None, tf.zeros((2, 5), tf.bool)]).numpy().any()


def hidden_nan_does_not_leak(cls):
    """Keras: 0 times NaN."""
    poisoned = tf.tensor_scatter_nd_update(X, [[0, 4], [1, 4]], tf.fill([2, 6], np.nan))
    mask = np.arange(5) < 4
    assert np.isfinite(_mha(cls)(X, poisoned, value_mask=np.stack([mask, mask]))).all()


def half_precision_logits_do_not_overflow(cls):
    """Keras: products in float16 before the scale are infinite, the output NaN."""
    layer = _mha(cls, (1, 3, 4), (1, 3, 4), num_heads=1, dtype="float16")
    eye = np.eye(4)
    layer.set_weights([eye[:, None] * 64, eye[:, None] * 64, eye[:, None], eye[None]])
    assert np.isfinite(layer(*[np.full((1, 3, 4), 2.83, "float16")] * 2)).all()


def additive_masks_are_refused(cls):
    """Keras: cast to bool, which inverts them."""
    with pytest.raises(TypeError, match="must be boolean"):
        _mha(cls)(X, X, attention_mask=np.where(np.eye(5), 0.0, -1e9).astype("float32"))


def additive_masks_of_grouped_heads_are_refused(cls):
    """Keras: as for MultiHeadAttention."""
    with pytest.raises(TypeError, match="must be boolean"):
        _gqa(cls)(X, X, attention_mask=np.where(np.eye(5), 0.0, -1e9).astype("float32"))


def flash_attention_false_is_kept(cls):
    """Keras: lost in the constructor."""
    assert _mha(cls, flash_attention=False)._flash_attention is False


def flash_attention_true_runs(cls):
    """Keras: not supported on TensorFlow."""
    _mha(cls, flash_attention=True)(X, X)


def flash_attention_true_runs_with_dropout(cls):
    """Keras: refused by the constructor."""
    _mha(cls, flash_attention=True, dropout=0.1)(X, X, training=True)


def flash_attention_true_returns_scores(cls):
    """Keras: refused by the call."""
    _mha(cls, flash_attention=True)(X, X, return_attention_scores=True)


def causal_mask_is_along_the_attention_axis(cls):
    """Keras: along axis 1, whatever attention_axes says; an error or a wrong mask."""
    x = random(2, 3, 4, 6, dtype="float32")
    _, scores = _mha(cls, x.shape, x.shape, attention_axes=2)(x, x, use_causal_mask=True, return_attention_scores=True)
    assert not scores.numpy()[..., np.triu(np.ones((4, 4), bool), 1)].any()


def symbolic_scores_have_the_length_of_the_keys(cls):
    """Keras: that of the queries, twice."""
    _, scores = _mha(cls)(keras.Input((5, 6)), keras.Input((7, 6)), return_attention_scores=True)
    assert scores.shape == (None, 2, 5, 7)


def masked_inputs_of_grouped_heads_give_no_warning(cls):
    """Keras: each projection warns that it destroys the mask."""
    x = keras.layers.Embedding(4, 6, mask_zero=True)(np.array([[1, 2, 0, 0, 0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _gqa(cls)(x, x)


def given_query_masks_count(cls):
    """Keras: ignored."""
    mask = np.array([[True, True, False, False, True]] * 2)
    assert not _mha(cls)(X, X, query_mask=mask, return_attention_scores=True)[0].numpy()[:, 2:4].any()


def inputs_keep_their_masks(cls):
    """Keras: deleted, so that an addition to the output has none."""
    x = tf.identity(X)
    x._keras_mask = tf.ones((2, 5), tf.bool)
    assert keras.layers.Add()([x, _mha(cls)(x, x)])._keras_mask is not None


def a_loss_of_scores_is_of_all_of_them(cls):
    """Keras: the mask of its softmax stays on the scores, and losses take it for one of theirs."""
    _, scores = _mha(cls)(X, X, use_causal_mask=True, return_attention_scores=True)
    loss = keras.losses.MeanSquaredError()(tf.zeros_like(scores), scores)
    np.testing.assert_allclose(loss, np.mean(scores.numpy() ** 2), rtol=1e-5)


CASES = {
    "MultiHeadAttention": [
        given_query_masks_count,
        inputs_keep_their_masks,
        empty_rows_give_zeros,
        hidden_nan_does_not_leak,
        half_precision_logits_do_not_overflow,
        additive_masks_are_refused,
        flash_attention_false_is_kept,
        flash_attention_true_runs,
        flash_attention_true_runs_with_dropout,
        flash_attention_true_returns_scores,
        causal_mask_is_along_the_attention_axis,
        symbolic_scores_have_the_length_of_the_keys,
        a_loss_of_scores_is_of_all_of_them,
    ],
    "GroupedQueryAttention": [
        empty_rows_of_grouped_heads_give_zeros,
        additive_masks_of_grouped_heads_are_refused,
        masked_inputs_of_grouped_heads_give_no_warning,
    ],
    "Attention": [empty_rows_of_attention_give_zeros],
}
PARAMETERS = [pytest.param(name, case, id=case.__name__) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("name, case", PARAMETERS)
def test_ours(name, case):
    case(ours(name))


@pytest.mark.parametrize("name, case", PARAMETERS)
def test_keras_still_differs(name, case):
    # pytest.raises reports what did not happen with an exception that is none of Exception.
    with pytest.raises((Exception, pytest.fail.Exception)):
        case(STOCK[name])
