"""Rotary embedding: the function in TensorFlow and JAX, and the layer, against rotations of complex numbers in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import random

RotaryEmbedding = attn_ops.layers.RotaryEmbedding
FRAMEWORKS = {
    "tensorflow": (attn_ops.rotary_embedding, tf.constant),
    "jax": (attn_ops.jax.rotary_embedding, jnp.asarray),
}
FAR = 131072
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return FRAMEWORKS[request.param]


def rotated(x, positions, frequencies, interleaved=False, factor=1.0):
    """Pairs as complex numbers times exp(i angle); x [batch, seqlen, heads, dim], positions [batch or 1, seqlen]."""
    width = 2 * len(frequencies)
    y = np.array(x, np.complex128)
    turn = factor * np.exp(1j * np.asarray(positions)[..., None] * np.asarray(frequencies))[:, :, None, :]
    out = np.array(x, np.float64)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        pair = (y[..., a] + 1j * y[..., b]) * turn[..., i]
        out[..., a], out[..., b] = pair.real, pair.imag
    return out


def plain(width, base=10000.0):
    return [base ** (-2 * i / width) for i in range(width // 2)]


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
@pytest.mark.parametrize("base", [10000.0, 500000])
def test_it_is_a_complex_rotation(framework, interleaved, rotary_dim, base):
    function, constant = framework
    x = array(2, 5, 3, 8).astype("float32")
    out = function(constant(x), base=base, rotary_dim=rotary_dim, interleaved=interleaved)
    expected = rotated(x, [np.arange(5)], plain(rotary_dim or 8, base), interleaved)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert out.dtype == x.dtype and out.shape == x.shape
    heads_first = function(
        constant(x.swapaxes(1, 2)), base=base, rotary_dim=rotary_dim, interleaved=interleaved, layout="BHSD"
    )
    np.testing.assert_array_equal(np.swapaxes(heads_first, 1, 2), out)
    one_head = function(constant(x[:, :, 0]), base=base, rotary_dim=rotary_dim, interleaved=interleaved)
    np.testing.assert_array_equal(one_head, np.asarray(out)[:, :, 0])
    alone = function(constant(x[0, :, 0]), base=base, rotary_dim=rotary_dim, interleaved=interleaved)
    np.testing.assert_array_equal(alone, np.asarray(out)[0, :, 0])


def yarn_frequencies(width, base=10000.0, beta_fast=32, beta_slow=1, truncate=True):
    """Written by pair, after YaRN's code."""
    length, factor = YARN["original_max_position_embeddings"], YARN["factor"]
    ends = [width * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (beta_fast, beta_slow)]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    low, high = max(low, 0), min(high, width - 1)
    result = []
    for i, f in enumerate(plain(width, base)):
        interpolated = min(max((i - low) / (high - low), 0), 1)
        result.append(f / factor * interpolated + f * (1 - interpolated))
    return result


def llama3_frequencies(width, base=10000.0):
    """Written by pair, with the cases of Llama 3.1's code."""
    length, factor = LLAMA3["original_max_position_embeddings"], LLAMA3["factor"]
    result = []
    for f in plain(width, base):
        wavelength = 2 * math.pi / f
        if wavelength < length / LLAMA3["high_freq_factor"]:
            result.append(f)
        elif wavelength > length / LLAMA3["low_freq_factor"]:
            result.append(f / factor)
        else:
            smooth = (length / wavelength - 1.0) / (LLAMA3["high_freq_factor"] - 1.0)
            result.append((1 - smooth) * f / factor + smooth * f)
    return result


SCALINGS = {
    "linear": (("linear", 4.0), [f / 4 for f in plain(16)], 1.0),
    "ntk": (("ntk", 4), plain(16, 10000.0 * 4 ** (16 / 14)), 1.0),
    "yarn": (("yarn", YARN), yarn_frequencies(16), 0.1 * math.log(4) + 1),
    "yarn, all said": (
        {"rope_type": "yarn", **YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.25, "truncate": False},
        yarn_frequencies(16, beta_fast=8, beta_slow=2, truncate=False),
        1.25,
    ),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, llama3_frequencies(16), 1.0),
    "default": ({"rope_type": "default"}, plain(16), 1.0),
}


@pytest.mark.parametrize("scaling, frequencies, factor", SCALINGS.values(), ids=SCALINGS)
def test_scalings(framework, scaling, frequencies, factor):
    function, constant = framework
    x = array(1, 40, 2, 16).astype("float32")
    out = function(constant(x), scaling=scaling)
    np.testing.assert_allclose(out, rotated(x, [np.arange(40)], frequencies, factor=factor), atol=2e-6)


def runs(function, constant):
    """The function of known positions, and of those that only the running graph or XLA knows."""
    yield lambda x, positions, **options: function(constant(x), positions, **options)
    if constant is tf.constant:
        for jit_compile in (False, True):
            yield lambda x, positions, jit_compile=jit_compile, **options: tf.function(
                lambda x, positions: function(x, positions, **options),
                [
                    tf.TensorSpec([None, None, None, x.shape[-1]], x.dtype),
                    tf.TensorSpec([None] * positions.ndim, positions.dtype),
                ],
                jit_compile=jit_compile,
            )(x, positions)
    else:
        yield lambda x, positions, **options: jax.jit(lambda x, p: function(x, p, **options))(x, positions)


@pytest.mark.parametrize(
    "positions", [np.arange(FAR, FAR + 6), np.array([0, -1, -FAR, 2**30, 77777, 3])], ids=["far", "any"]
)
def test_far_positions_are_right_in_float32(framework, positions):
    """A float32 product of position and frequency is some 0.004 off there."""
    x = array(2, 6, 2, 64).astype("float32")
    by_entry = np.stack([positions, positions[::-1]]).astype("int32")
    for run in runs(*framework):
        for given in (by_entry, by_entry[0]):
            expected = rotated(x, np.atleast_2d(given), plain(64))
            np.testing.assert_allclose(run(x, given), expected, atol=3e-6)


def test_unsigned_positions(framework):
    x, positions = array(1, 4, 1, 8).astype("float32"), np.array([7, 2**31 - 1, 2**31, 2**32 - 1], "uint32")
    for run in runs(*framework):
        np.testing.assert_allclose(run(x, positions), rotated(x, [positions.astype("int64")], plain(8)), atol=3e-6)


@pytest.mark.parametrize("table", ["short", "long"])
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_positions_beyond_32_bits(framework, dtype, table, monkeypatch):
    """They were taken modulo 2^32; by JAX, which has no 64 bits, as the nearest that it has."""
    from attn_ops.call import rotary

    function, constant = framework
    monkeypatch.setattr(rotary, "_ON_HOST", 0 if table == "long" else 100)
    x = array(1, 6, 1, 4).astype("float32")
    positions = np.array([2**31, 2**32 - 1, 2**32, 2**33 + 7, -1, -(2**34) - 3])
    positions = (np.abs(positions) if dtype == "uint64" else positions).astype(dtype)
    expected = rotated(x, [positions], plain(4, base=100.0))
    by_jax = [lambda x, p, base: jax.jit(lambda x: function(x, p, base=base))(x)]
    known = runs(*framework) if constant is tf.constant else by_jax
    for run in known:
        np.testing.assert_allclose(run(x, positions, base=100.0), expected, atol=1e-5)


def test_float64_and_half_precision(framework):
    function, constant = framework
    positions = np.array([5, FAR, 7])
    x = array(1, 3, 1, 8)
    expected = rotated(x, [positions], plain(8))
    for run in runs(*framework) if constant is tf.constant else ():
        np.testing.assert_allclose(run(x, positions), expected, rtol=1e-9, atol=1e-9)
    out = function(constant(x.astype("float16")), positions)
    assert out.dtype == "float16"
    np.testing.assert_allclose(np.asarray(out, "float64"), expected, atol=4e-3)


def test_a_long_table_is_computed_where_it_runs(framework, monkeypatch):
    """And not a constant of the graph; the same values."""
    from attn_ops.call import rotary

    function, constant = framework
    x = array(1, 6, 1, 8).astype("float32")
    expected = function(constant(x), np.arange(FAR, FAR + 6))
    monkeypatch.setattr(rotary, "_ON_HOST", 0)
    np.testing.assert_allclose(function(constant(x), np.arange(FAR, FAR + 6)), expected, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_turns_back(framework, interleaved):
    """The adjoint of a rotation is its inverse: the gradient of out·y is y rotated by the negative positions."""
    function, constant = framework
    x, y = (array(2, 5, 3, 8, seed=seed).astype("float32") for seed in (0, 1))
    positions = np.array([3, 1, 4, 1, 5])
    options = dict(rotary_dim=6, interleaved=interleaved)
    if constant is tf.constant:
        with tf.GradientTape() as tape:
            tape.watch(x := tf.constant(x))
            total = tf.reduce_sum(function(x, positions, **options) * y)
        gradient = tape.gradient(total, x)
    else:
        gradient = jax.grad(lambda x: (function(x, positions, **options) * y).sum())(constant(x))
    np.testing.assert_allclose(gradient, rotated(y, [-positions], plain(6), interleaved), atol=1e-6)


def test_empty_sequences_in_graphs():
    """TensorFlow 2.21 divides by 0 where it folds the gradient of the product that there was, and the process ended."""

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(attn_ops.rotary_embedding(x))
        return tape.gradient(loss, x)

    assert gradient(tf.zeros((2, 0, 4, 8))).shape == (2, 0, 4, 8)


BAD = {
    "odd features": (dict(x=np.ones((1, 2, 1, 7), "f")), ValueError, "features turn in pairs.*got 7"),
    "odd width": (dict(rotary_dim=3), ValueError, "rotary_dim must be even and at least 2, got 3"),
    "wide": (dict(rotary_dim=10), ValueError, "rotary_dim must not exceed the 8 features, got 10"),
    "text": (dict(rotary_dim="4"), TypeError, "rotary_dim must be an integer or None, got str"),
    "base": (dict(base=0), ValueError, "base must be positive and finite, got 0"),
    "base of text": (dict(base="a"), TypeError, "base must be a number, got str"),
    "flag": (dict(interleaved="yes"), TypeError, "interleaved must be True or False"),
    "integers": (dict(x=np.ones((1, 2, 1, 8), "i")), TypeError, "x must be floating, got int32"),
    "rank": (dict(x=np.ones(8, "f")), ValueError, r"x must be \[batch, seqlen.*got shape \(8,\)"),
    "positions": (dict(positions=np.arange(3)), ValueError, r"positions must be \[seqlen=2\] or \[batch=1, seqlen\], got \(3,\)"),
    "batch": (dict(positions=np.ones((3, 2), "i")), ValueError, r"positions must be .*got \(3, 2\)"),
    "float positions": (dict(positions=np.ones(2, "f")), TypeError, "positions must hold integers, got float32"),
    "layout": (dict(layout="SBHD"), ValueError, "layout must be 'BSHD' or 'BHSD', got 'SBHD'"),
    "scaling": (dict(scaling=("cubic", 2.0)), ValueError, "scaling must be one of 'linear', 'ntk', 'yarn', 'llama3', got 'cubic'"),
    "number": (dict(scaling=2.0), TypeError, "scaling must be None, a pair"),
    "factor": (dict(scaling=("linear", -1.0)), ValueError, "factor of scaling 'linear' must be positive and finite, got -1"),
    "lacks": (dict(scaling=("yarn", 2.0)), ValueError, "scaling 'yarn' needs original_max_position_embeddings, got"),
    "unknown": (dict(scaling=("ntk", {"factor": 2, "f": 3})), ValueError, "scaling 'ntk' takes factor, not f, got"),
    "order": (
        dict(scaling=("yarn", {**YARN, "beta_fast": 1})), ValueError, "beta_slow of scaling 'yarn' must be below beta_fast"
    ),
    "narrow ntk": (dict(rotary_dim=2, scaling=("ntk", 2.0)), ValueError, "scaling 'ntk' needs at least 4 features that turn, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("given, error, message", BAD.values(), ids=BAD)
def test_bad_input(framework, given, error, message):
    function, constant = framework
    given = {"x": np.ones((1, 2, 1, 8), "f"), **given}
    with pytest.raises(error, match=f"rotary_embedding: {message}"):
        function(constant(given.pop("x")), **given)


def test_the_signatures_are_the_same():
    signatures = {inspect.signature(function) for function, _ in FRAMEWORKS.values()}
    assert len(signatures) == 1
    for parameter in signatures.pop().parameters:
        assert f"{parameter}: " in attn_ops.rotary_embedding.__doc__


def test_the_layer():
    x = random(2, 5, 3, 8, dtype="float32")
    layer = RotaryEmbedding()
    np.testing.assert_allclose(layer(x), rotated(x, [np.arange(5)], plain(8)), atol=1e-6)
    np.testing.assert_allclose(layer(x, start_index=7), rotated(x, [np.arange(7, 12)], plain(8)), atol=1e-6)
    start = tf.constant([4, FAR])
    expected = rotated(x, start.numpy()[:, None] + np.arange(5), plain(8))
    np.testing.assert_allclose(layer(x, start_index=start), expected, atol=2e-6)
    traced = tf.function(
        lambda x, start: layer(x, start_index=start),
        [tf.TensorSpec([None, None, 3, 8]), tf.TensorSpec([None], tf.int32)],
    )
    np.testing.assert_allclose(traced(x, start), expected, atol=2e-6)
    scalar = tf.function(lambda x, start: layer(x, start), [tf.TensorSpec([2, 5, 3, 8]), tf.TensorSpec([], tf.int64)])
    np.testing.assert_allclose(scalar(x, 7), layer(x, start_index=7), atol=1e-6)
    np.testing.assert_allclose(layer(x, positions=np.arange(7, 12)), layer(x, start_index=7), atol=1e-6)
    np.testing.assert_allclose(
        RotaryEmbedding(scaling_factor=2.0)(x), rotated(x, [np.arange(5) / 2], plain(8)), atol=1e-6
    )
    with pytest.raises(ValueError, match="RotaryEmbedding: give positions or start_index, not both"):
        layer(x, start_index=1, positions=np.arange(5))


@pytest.mark.parametrize("sequence_axis, feature_axis", [(1, -1), (2, -1), (-1, 1), (1, 2), (3, 2)])
def test_axes_of_the_layer(sequence_axis, feature_axis):
    x = random(2, 5, 3, 8, dtype="float32")
    order = [axis for axis in range(4) if axis not in (sequence_axis % 4, feature_axis % 4)]
    order = {0: order[0], sequence_axis % 4: None, feature_axis % 4: None}
    moved = np.moveaxis(x, (1, 3), (sequence_axis, feature_axis))
    layer = RotaryEmbedding(500.0, sequence_axis=sequence_axis, feature_axis=feature_axis)
    expected = np.moveaxis(rotated(x, [np.arange(5)], plain(8, 500.0)), (1, 3), (sequence_axis, feature_axis))
    np.testing.assert_allclose(layer(tf.constant(moved)), expected, atol=1e-6)


def test_the_layer_in_files_and_in_mixed_precision(tmp_path):
    inputs = keras.Input((None, 3, 16))
    layer = RotaryEmbedding(500, rotary_dim=8, interleaved=True, scaling=("yarn", YARN), dtype="mixed_bfloat16")
    heads_first = attn_ops.rotary_embedding(
        keras.ops.swapaxes(inputs, 1, 2), base=700.0, layout="BHSD", scaling=("ntk", 2.0)
    )
    model = keras.Model(inputs, [layer(inputs), heads_first])
    x = random(2, 5, 3, 16, dtype="float32")
    expected = rotated(x, [np.arange(5)], yarn_frequencies(8, 500.0), True, 0.1 * math.log(4) + 1)
    out, other = model(x)
    assert out.dtype == "bfloat16" and not model.weights
    np.testing.assert_allclose(tf.cast(out, "float64"), expected, atol=5e-2)
    expected = rotated(x, [np.arange(5)], plain(16, 700.0 * 2 ** (16 / 14)))
    np.testing.assert_allclose(np.swapaxes(other, 1, 2), expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    for one, two in zip(keras.models.load_model(tmp_path / "model.keras").predict(x, verbose=0), (out, other)):
        np.testing.assert_allclose(tf.cast(one, "float32"), tf.cast(two, "float32"), atol=1e-6)
    assert RotaryEmbedding.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize(
    "config, error, message",
    [
        (dict(scaling_factor=0.0), ValueError, "scaling_factor must be positive, got 0"),
        (dict(scaling_factor="2"), TypeError, "scaling_factor must be a number"),
        (dict(scaling_factor=2, scaling=("ntk", 2)), ValueError, "scaling_factor and scaling both change"),
        (dict(max_wavelength=-1), ValueError, "base must be positive and finite, got -1"),
        (dict(sequence_axis=1.0), TypeError, "sequence_axis must be an integer, got 1.0"),
        (dict(sequence_axis=-1), ValueError, "must be two axes of the input, got shape"),
        (dict(rotary_dim=16), ValueError, "rotary_dim must not exceed the 8 features"),
    ],
)
def test_bad_configurations(config, error, message):
    with pytest.raises(error, match=f"RotaryEmbedding: .*{message}"):
        RotaryEmbedding(**config)(keras.Input((5, 8)))
