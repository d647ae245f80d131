"""The same bits whoever calls: from run to run, on any number of threads, eager, in graphs and under XLA, in any mode of rounding."""

import json
import platform
import sys

import numpy as np
import pytest
import tensorflow as tf
from attn_ops import kernels, scaled_dot_product_attention

import children
from load import calls, float_mode

core = kernels.core()
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads MXCSR, which x86-64 has")


@pytest.fixture(scope="module")
def mode():
    return float_mode.FloatMode()


def subnormal(rows, dtype="float32"):
    """Values whose products and sums are subnormal, of float32."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, rows, heads, 17)).astype(dtype) for heads in (4, 2, 2, 4)]
    arrays[2] *= np.array(1e-40, dtype)
    return arrays


@on_x86
@pytest.mark.parametrize("how", float_mode.MODES)
@pytest.mark.parametrize("rows", [2, 150])
@pytest.mark.parametrize("isa", core.isas())
def test_kernels_round_as_they_always_do(mode, isa, rows, how):
    """And leave the mode as it was: flushing on the calling thread alone would make bits hang on the number of threads."""
    q, k, v, d_out = subnormal(rows)

    def run(threads):
        options = {"scale": 0.25, "num_threads": threads, "isa": isa}
        out, lse, statistics = core.forward(q, k, v, **options)
        return [out, lse, *core.backward(q, k, v, out, statistics, d_out, **options)[:3], *core.quantize(v)]

    wanted = run(1)
    assert np.any((wanted[0] != 0) & (np.abs(wanted[0]) < np.finfo("float32").tiny)), "nothing subnormal"
    with mode.set(float_mode.MODES[how]):
        found = {threads: run(threads) for threads in (1, 2)}
    for results in found.values():
        assert calls.same(results, wanted)


@on_x86
def test_the_mode_makes_a_difference_to_others(mode):
    """That the tests above could fail: NumPy's sums follow the mode."""
    x = np.full(8, 1e-40, "float32")
    with mode.set(float_mode.FLUSH):
        flushed = x + x
    assert np.any(x + x != 0) and not flushed.any()


@pytest.mark.parametrize("rows", [2, 150])
def test_all_forms_keep_what_is_subnormal(rows):
    """TensorFlow flushes it in the threads of graphs and of XLA, and not in Python's."""
    q, k, v, d_out = map(tf.constant, subnormal(rows))

    def attend(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch((q, k, v))
            out = scaled_dot_product_attention(q, k, v, implementation="fused")
        return out, *tape.gradient(out, (q, k, v), d_out)

    forms = [attend, tf.function(attend), tf.function(attend, jit_compile=True)]
    eager, *others = ([x.numpy() for x in form(q, k, v)] for form in forms)
    assert np.any((eager[0] != 0) & (np.abs(eager[0]) < np.finfo("float32").tiny))
    for results in others:
        assert calls.same(results, eager)


def test_forms_and_frameworks():
    """Also of the gradients: all that have one are asked for."""
    made = calls.op(True, wraps=("eager", "graph", "xla")) | calls.jax(True)
    for name in ("plain", *calls.options(1)):
        eager, *others = (made[f"{form} {name}"]() for form in ("eager", "graph", "xla", "jax"))
        assert all(calls.same(results, eager) for results in others), name


def run(*arguments):
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}; from load import determinism; determinism.main()"
    ended = children.run(code, *arguments, without=())
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.strip().splitlines()[-1])


def test_runs_and_threads(pytestconfig):
    """The digests of processes with so many threads, after as many runs."""
    if not pytestconfig.getoption("whole"):
        pytest.skip("with --whole: starts TensorFlow four times")
    first, *others = (run("--runs", "3", "--threads", threads) for threads in "1237")
    assert all(digests == first for digests in others)
    assert run("--runs", "3", "--mode", "upwards, flush to zero")["core plain"] == first["core plain"]
