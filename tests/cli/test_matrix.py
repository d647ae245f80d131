"""`python -m attn_ops matrix`: that what it says holds, that it leaves nothing out, and that FEATURES.md is what it says."""

from pathlib import Path

import attn_ops.jax
import jax
import numpy as np
import pytest

from attn_ops import T5RelativeBias, masks, reference
from attn_ops.call.options import Options
from attn_ops.cli import app, matrix, matrix_of_caches
from attn_ops.tensorflow import attention, composite
from cases import TOLERANCES, assert_close
from implementations import GRADIENTS, differentiable, of_own_choice, specification

WRITTEN = Path(__file__).parents[2] / "FEATURES.md"
COLUMNS = {"eager": "TensorFlow", "function": "tf.function", "xla": "XLA", "jax": "JAX"}


@pytest.fixture(scope="module")
def said():
    return {**matrix.implementations()[0], "gradients": matrix.gradients()}


def cells(text):
    """The tables of a text, by row and column."""
    found, head = {}, None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if row is None or head is None:
            head = row
        elif set(row) != {"---"}:
            found.update({(row[0], column): cell for column, cell in zip(head[1:], row[1:], strict=True)})
    return found


def test_the_file_is_current(capsys):
    """In the columns that this machine can tell: that of GPUs needs the library of the CUDA kernels."""
    assert app.main(["matrix"]) == 0
    now, written = cells(capsys.readouterr().out), cells(WRITTEN.read_text())
    missing = {column for _, column in written} - {column for _, column in now}
    assert missing <= {"GPU"}
    assert now == {place: cell for place, cell in written.items() if place[1] not in missing}, (
        "python -m attn_ops matrix > FEATURES.md"
    )


def test_every_option_and_every_mask_has_a_row():
    named = {name for feature in matrix.FEATURES for name in matrix.arguments(feature)}
    assert set(Options._fields) <= named
    constructors = {name for name in masks.__all__ if getattr(masks, name).__class__.__name__ == "function"}
    others = {"boolean", "combined", "interval", "not_boolean", "tells_visible"}
    rows = " ".join(matrix.FEATURES)
    assert [name for name in sorted(constructors - others) if f"masks.{name}" not in rows] == []


def call(feature, rng):
    """Arguments with the feature of random values, the cotangents, and what the reference gives for them."""

    def random(x):
        if isinstance(x, T5RelativeBias):
            return T5RelativeBias(random(x.table), x.bidirectional, x.max_distance)
        floating = isinstance(x, np.ndarray) and x.dtype.kind not in "iub"
        return rng.standard_normal(x.shape).astype(x.dtype) if floating else x

    given = {name: random(x) for name, x in matrix.arguments(feature).items() if name != "return_lse"}
    out, lse = reference.attention(**given)
    given["d_out"] = rng.standard_normal(out.shape).astype(given["query"].dtype)
    given["d_lse"] = np.where(lse == -np.inf, 0, rng.standard_normal(lse.shape)).astype(np.float32)
    return given, specification(**given)


def assert_holds(implementation, feature, said):
    """It is fused, forward and backward, gives what the reference does, and all the gradients that were promised."""
    assert said[COLUMNS[implementation.name]][feature] == "fused"
    given, expected = call(feature, np.random.default_rng(len(feature)))
    found = implementation(**given)
    assert_close(found, expected, TOLERANCES[given["query"].dtype.name], feature)
    promised = {GRADIENTS[name] for name in said["gradients"][feature] if name != "scale"}
    assert promised == {name for name, _ in found.items()} - {"out", "lse"}


EAGER, FUNCTION, XLA, JAX = of_own_choice()


@pytest.fixture
def fused_alone(monkeypatch):
    """No call in TensorFlow may run anything else."""

    def refuse(*arguments, **options):
        raise AssertionError("this is not fused")

    for name in ("composite", "reference"):
        monkeypatch.setitem(attention.RUN, name, refuse)
    for name in ("attention", "gradients"):
        monkeypatch.setattr(composite, name, refuse)


@pytest.mark.parametrize("cache", matrix_of_caches.CACHES)
def test_a_step_with_a_cache_is_right(cache, fused_alone):
    """The first row sees itself alone, so that it gets its value, as far as the cache keeps that."""
    options = matrix_of_caches.CACHES[cache]
    queries, layout = options.get("queries", "float32"), options.get("layout", "BSHD")
    value = matrix_of_caches.rows(queries, layout)[2]
    out, *_ = matrix_of_caches.step("tensorflow", **options)()
    tolerance = {"int8": np.abs(value).max() / 254, "bfloat16": 2e-2}.get(options.get("dtype"), 1e-6)
    expected = np.repeat(value, 2, axis=2 if layout == "BSHD" else 1)
    assert out.dtype == queries
    np.testing.assert_allclose(np.asarray(out, "float64"), expected.astype("float64"), rtol=0, atol=tolerance * 1.001)


@pytest.mark.parametrize("feature", matrix.FEATURES)
def test_eager(feature, said, fused_alone):
    assert_holds(EAGER, feature, said)


@pytest.mark.wide(10)
@pytest.mark.parametrize("feature", matrix.FEATURES)
def test_function(feature, said, fused_alone):
    assert_holds(FUNCTION, feature, said)


@pytest.mark.wide(20)
@pytest.mark.parametrize("feature", matrix.FEATURES)
def test_xla(feature, said, fused_alone):
    assert_holds(XLA, feature, said)


@pytest.mark.wide(20)
@pytest.mark.parametrize("feature", matrix.FEATURES)
def test_jax(feature, said):
    """There the composite is traced in any case: what counts is the program for the CPU."""
    assert_holds(JAX, feature, said)
    given, _ = call(feature, np.random.default_rng(0))
    with jax.enable_x64(given["query"].dtype == np.float64):
        program = jax.jit(lambda inputs: value_and_gradients(inputs, given)).lower(
            {name: given[name] for name in differentiable(given)}
        )
    kernels = [line for line in program.as_text().splitlines() if "custom_call" in line]
    assert ["attn_ops.forward" in line for line in kernels] == [True, False] and "attn_ops.backward" in kernels[1]
    assert "dot_general" not in program.as_text()  # as the composite has


def value_and_gradients(inputs, given):
    options = {name: x for name, x in given.items() if name not in ("d_out", "d_lse")}
    out, pull = jax.vjp(lambda inputs: attn_ops.jax.scaled_dot_product_attention(**{**options, **inputs}), inputs)
    return out, pull(out)
