"""The binding `attn_ops._core`: dtypes, memory layouts, threads, bad input. The numbers themselves are checked for
every implementation in op/."""

import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from attn_ops import kernels, reference

core = kernels.core()
assert core is not None, kernels.core_unavailable_reason()

DTYPES = ("float32", "float64", "float16", ml_dtypes.bfloat16)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
# Two query heads per key head, value_dim not head_dim, nothing a multiple of a vector.
SHAPES = {"q": (2, 7, 4, 19), "k": (2, 11, 2, 19), "v": (2, 11, 2, 13), "d_out": (2, 7, 4, 13)}
STATISTICS = (2, 4, 7)


def arrays(rng, dtype="float32"):
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def run(a, **options):
    """out, lse, dq, dk, dv, d_bias."""
    d_lse = options.pop("d_lse", None)
    out, lse, statistics = core.forward(a["q"], a["k"], a["v"], **options)
    return out, lse, *core.backward(a["q"], a["k"], a["v"], out, statistics, a["d_out"], d_lse=d_lse, **options)[:4]


def expected(a, d_lse=None, **options):
    q, k, v, d_out = (a[name].astype("float64") for name in SHAPES)
    out, lse = reference.attention(q, k, v, **options)
    return out, lse, *reference.attention_gradients(q, k, v, d_out=d_out, d_lse=d_lse, **options)


def assert_close(results, references, dtype):
    for result, wanted in zip(results, references):
        if wanted is not None:
            scale = np.abs(wanted).max(initial=1.0, where=np.isfinite(wanted))
            np.testing.assert_allclose(result.astype("float64"), wanted, rtol=0, atol=TOLERANCE[str(dtype)] * scale)


def assert_same(results, others):
    for result, other in zip(results, others):
        np.testing.assert_array_equal(result, other)


def swapped(x):
    """The same tensor in the other layout, contiguous."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_dtypes(rng, dtype, isa):
    a = arrays(rng, dtype)
    bias = rng.normal(size=(1, 4, 7, 11)).astype(dtype)
    results = run(a, bias=bias, isa=isa)
    out, lse, *gradients = results
    assert lse.dtype == ("float64" if dtype == "float64" else "float32")
    for x, like in zip((out, *gradients), (a["d_out"], a["q"], a["k"], a["v"], bias)):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)
    assert_close(results, expected(a, bias=bias.astype("float64")), np.dtype(dtype).name)


@pytest.mark.parametrize("isa", core.isas())
def test_lse_is_what_its_statistics_say(rng, isa):
    """m + ln l, also where the two all but cancel, for many rows and for few, and beside infinities."""
    for seqlen_q, seqlen_k, spread in ((130, 1, 1.0), (130, 64, 0.1), (50, 3000, 3.0), (6, 700, 1e-3)):
        q, k = (rng.normal(size=(1, n, 1, 16)).astype("float32") for n in (seqlen_q, seqlen_k))
        bias = (rng.normal(size=(1, 1, seqlen_q, 1)) - np.log(seqlen_k)).astype("float32")
        bias[..., 0, 0] = -np.inf
        bias[..., 1, 0] = np.nan
        _, lse, statistics = core.forward(q * np.float32(spread), k, k, bias=bias, isa=isa)
        m, total = np.moveaxis(statistics.astype("float64"), -1, 0)
        with np.errstate(divide="ignore"):
            wanted = m + np.log(total)
        assert wanted[..., 0] == -np.inf and np.isnan(wanted[..., 1])
        np.testing.assert_array_equal(lse[..., :2], wanted[..., :2])
        lse, wanted = lse[..., 2:], wanted[..., 2:]
        np.testing.assert_array_less(np.abs(lse - wanted), 0.501 * np.spacing(np.abs(wanted).astype("float32")) + 4e-9)


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_bias_hides_garbage_from_all_rows(rng, dtype, isa):
    """One of each row, which lanes without a row have none of: their scores of the hidden key are numbers."""
    for rows in (3, 13, 37):
        q, d_out = (rng.normal(size=(1, rows, 1, 16)).astype(dtype) for _ in range(2))
        k, v = (rng.normal(size=(1, 45, 1, 16)).astype(dtype) for _ in range(2))
        bias = np.zeros((1, 1, rows, 45), "float64" if dtype == "float64" else "float32")
        bias[..., 7] = -np.inf
        plain = run(dict(q=q, k=k, v=v, d_out=d_out), bias=bias, isa=isa)
        v[0, 7] = np.nan
        assert_same(run(dict(q=q, k=k, v=v, d_out=d_out), bias=bias, isa=isa), plain)


@pytest.mark.parametrize("isa", core.isas())
def test_garbage_that_another_head_did_not_load(rng, isa):
    """Those that share a bias pass their keys in turn: the last rows of one see less than the first of the next."""
    q, d_out = (rng.normal(size=(1, 100, 2, 16)).astype("float32") for _ in range(2))
    k, v = (rng.normal(size=(1, 100, 1, 16)).astype("float32") for _ in range(2))
    options = dict(bias=np.zeros((1, 1, 100, 100), "float32"), window_left=40, window_right=0, isa=isa)
    options["masks"] = [np.broadcast_to(np.arange(100) != 10, (1, 1, 100, 100))]
    plain = run(dict(q=q, k=k, v=v, d_out=d_out), **options)
    k[0, 10], v[0, 10] = np.nan, np.inf
    assert_same(run(dict(q=q, k=k, v=v, d_out=d_out), **options), plain)


@pytest.mark.parametrize("isa", core.isas())
def test_slopes_are_added_to_capped_scores(rng, isa):
    """Where all rows see all keys too, and few rows."""
    for rows in (3, 40):
        x = [rng.normal(size=(1, n, 2, 16)).astype("float32") for n in (rows, 45, 45, rows)]
        a, slopes = dict(zip(SHAPES, x, strict=True)), np.array([0.5, 0.1])
        results = run(a, soft_cap=2.0, slopes=slopes[None].astype("float32"), isa=isa)
        assert_close(results, expected(a, logits_soft_cap=2.0, alibi_slopes=slopes), "float32")


def test_strides_are_read_in_place(rng):
    a = arrays(rng)
    plain = run(a)

    def reversed_view(x):  # negative strides
        return np.ascontiguousarray(x[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]

    def spread(x):  # gaps on every axis
        padded = np.zeros([2 * n for n in x.shape], x.dtype)
        padded[::2, ::2, ::2, ::2] = x
        return padded[::2, ::2, ::2, ::2]

    for view in (np.asfortranarray, reversed_view, spread):
        assert_same(run({name: view(x) for name, x in a.items()}), plain)
    repeated = dict(a, k=np.broadcast_to(a["k"][:1], SHAPES["k"]))
    assert_same(run(repeated), run(dict(a, k=np.repeat(a["k"][:1], 2, axis=0))))


def test_layouts_agree(rng):
    a = arrays(rng)
    bias = rng.normal(size=(2, 1, 7, 11)).astype("float32")
    out, lse, dq, dk, dv, d_bias = run(a, bias=bias)
    other = run({name: swapped(x) for name, x in a.items()}, bias=bias, layout="BHSD")
    assert_same(other, (swapped(out), lse, swapped(dq), swapped(dk), swapped(dv), d_bias))


def test_what_has_to_be_copied(rng):
    """Another byte order, elements which are not whole strides apart, lists, statistics with strides."""
    a = arrays(rng)
    plain = run(a)
    foreign = run({name: x.astype(x.dtype.newbyteorder()) for name, x in a.items()})
    assert_same(foreign, plain)
    assert all(x is None or x.dtype.isnative for x in foreign)

    record = np.zeros(SHAPES["q"], [("pad", "u1"), ("value", "f4")])
    record["value"] = a["q"]
    assert_same(run(dict(a, q=record["value"])), plain)

    lists = {name: x.astype("float64").tolist() for name, x in a.items()}
    assert_same(run(lists), run({name: np.array(x) for name, x in lists.items()}))

    out, _, statistics = core.forward(a["q"], a["k"], a["v"])
    strided = np.repeat(statistics, 2, axis=2)[:, :, ::2]
    gradients = core.backward(a["q"], a["k"], a["v"], out, strided, a["d_out"])
    assert_same(gradients, plain[2:])


def test_masks_and_bias_broadcast(rng):
    a = arrays(rng)
    masks = [rng.random(shape) < 0.7 for shape in ((2, 1, 1, 11), (1, 4, 7, 1), (1, 1, 7, 11), (2, 4, 1, 1))]
    bias = rng.normal(size=(1, 1, 7, 1)).astype("float32")
    results = run(a, masks=masks, bias=bias)
    assert results[-1].shape == bias.shape
    assert_close(results, expected(a, mask=masks, bias=bias), "float32")


@pytest.mark.parametrize("integer", ("int32", "int64", "uint8"))
def test_lengths_of_any_integer_type(rng, integer):
    a = arrays(rng)
    lengths = dict(query_lengths=np.array([7, 3], integer), key_lengths=np.array([0, 11], integer))
    wanted = expected(a, query_seq_lengths=[7, 3], key_value_seq_lengths=[0, 11])
    assert_close(run(a, **lengths), wanted, "float32")
    assert_same(run(a, query_lengths=[7, 3], key_lengths=(0, 11)), run(a, **lengths))


def test_options_reach_the_kernel(rng):
    a = arrays(rng)
    results = run(a, scale=0.3, window_left=2, window_right=1, bottom_right=True)
    wanted = expected(a, scale=0.3, window=(2, 1), causal_alignment="bottom_right")
    assert_close(results, wanted, "float32")
    d_lse = rng.normal(size=STATISTICS).astype("float32")
    assert_close(run(a, d_lse=d_lse), expected(a, d_lse=d_lse.astype("float64")), "float32")
    dropped = run(a, dropout_rate=0.4, dropout_seed=2**64 - 5, dropout_offset=3)
    assert_close(dropped, expected(a, dropout_rate=0.4, dropout_seed=(-5, 3)), "float32")
    assert_same(dropped, run(a, dropout_rate=0.4, dropout_seed=-5, dropout_offset=3))


def test_scale_has_double_precision(rng):
    a = arrays(rng, "float64")
    assert_close(run(a, scale=1 / 3), expected(a, scale=1 / 3), "float64")


@pytest.mark.parametrize("shapes", [
    {"q": (0, 7, 4, 8), "k": (0, 11, 2, 8), "v": (0, 11, 2, 8)},
    {"q": (2, 0, 4, 8), "k": (2, 11, 2, 8), "v": (2, 11, 2, 8)},
    {"q": (2, 7, 4, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 8)},
    {"q": (2, 7, 0, 8), "k": (2, 11, 2, 8), "v": (2, 11, 2, 8)},
    {"q": (2, 7, 4, 8), "k": (2, 11, 2, 8), "v": (2, 11, 2, 0)},
])  # fmt: skip
@pytest.mark.parametrize("isa", core.isas())
def test_empty_arrays(rng, shapes, isa):
    a = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    a["d_out"] = rng.normal(size=(*shapes["q"][:3], shapes["v"][3])).astype("float32")
    bias = np.zeros((1, 1, shapes["q"][1], shapes["k"][1]), "float32")
    assert_close(run(a, bias=bias, isa=isa), expected(a, bias=bias), "float32")


@pytest.mark.parametrize("isa", core.isas())
def test_any_number_of_threads_gives_the_same_bits(rng, isa):
    a = {name: rng.normal(size=(2, 150, shape[2], 20)).astype("float32") for name, shape in SHAPES.items()}
    bias = rng.normal(size=(1, 1, 150, 150)).astype("float32")
    one = run(a, bias=bias, window_right=0, num_threads=1, isa=isa)
    for threads in (0, 2, 3, 16):
        assert_same(run(a, bias=bias, window_right=0, num_threads=threads, isa=isa), one)


def test_the_gil_is_released(rng):
    """While one call runs, another thread counts."""
    a = {name: rng.normal(size=(1, 1500, shape[2], 64)).astype("float32") for name, shape in SHAPES.items()}
    done = threading.Event()
    call = threading.Thread(target=lambda: (run(a, num_threads=1), done.set()))
    call.start()
    steps = 0
    while not done.wait(0.001):
        steps += 1
    call.join()
    assert steps > 3


def test_many_callers_at_once(rng):
    a = arrays(rng)
    wanted = run(a)
    failures = []

    def work():
        for _ in range(100):
            try:
                assert_same(run(a, num_threads=4), wanted)
            except Exception as error:
                failures.append(error)

    callers = [threading.Thread(target=work) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


FORKED = """
import os, numpy as np
from attn_ops import _core
x = np.ones((1, 300, 4, 16), "float32")
wanted, *_ = _core.forward(x, x, x, num_threads=3)
child = os.fork()
out, *_ = _core.forward(x, x, x, num_threads=3)
assert np.array_equal(out, wanted)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_works_after_a_fork_and_without_tensorflow():
    code = FORKED + "\nimport sys; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_isas():
    assert core.isas()[-1] == "generic"
    assert core.default_isa() in core.isas()
    environment = dict(os.environ, ATTN_OPS_ISA="generic")
    code = "from attn_ops import _core; print(_core.default_isa())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "generic"


def test_unusable_isa_in_the_environment_is_an_error():
    environment = dict(os.environ, ATTN_OPS_ISA="mmx")
    code = "import numpy as np; from attn_ops import _core; x = np.ones((1, 1, 1, 8)); _core.forward(x, x, x)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: attn_ops._core.forward: isa ('mmx') must be one of those usable here" in run.stderr


def bad(rng, **changes):
    a = arrays(rng)
    options = {}
    for name, value in changes.items():
        (a if name in a else options)[name] = value
    return a, options


FLOATS = np.zeros((2, 1, 1, 11), "float32")


@pytest.mark.parametrize("error, message, changes", [
    (ValueError, "q must have rank 4 [batch, seqlen, heads, dim], got rank 3", dict(q=np.zeros((7, 4, 19), "float32"))),
    (ValueError, "q must have rank 4 [batch, seqlen, heads, dim], got rank 5", dict(q=np.zeros((1,) * 5, "float32"))),
    (ValueError, "k must have the batch of q (2), got 3", dict(k=np.zeros((3, 11, 2, 19), "float32"))),
    (ValueError, "k must have the head_dim of q (19), got 18", dict(k=np.zeros((2, 11, 2, 18), "float32"))),
    (ValueError, "v must have the seqlen_k of k (11), got 12", dict(v=np.zeros((2, 12, 2, 13), "float32"))),
    (ValueError, "v must have the num_kv_heads of k (2), got 4", dict(v=np.zeros((2, 11, 4, 13), "float32"))),
    (ValueError, "num_heads (5) must be a multiple of num_kv_heads (2)", dict(q=np.zeros((2, 7, 5, 19), "float32"))),
    (ValueError, "num_heads (4) must be a multiple of num_kv_heads (0)",
     dict(k=np.zeros((2, 11, 0, 19), "float32"), v=np.zeros((2, 11, 0, 13), "float32"))),
    (ValueError, "head_dim must be at least 1", {n: np.zeros((2, 7, 4, 0), "float32") for n in ("q", "k", "v")}),
    (ValueError, "k must be float32, the dtype of q, got float64", dict(k=np.zeros(SHAPES["k"]))),
    (TypeError, "q must hold float32, float64, float16, bfloat16, int8 or bool, got int32",
     dict(q=np.zeros(SHAPES["q"], "int32"))),
    (ValueError, "q must be float32, float64, float16 or bfloat16, got bool", dict(q=np.zeros(SHAPES["q"], bool))),
    (ValueError, "k must be float32, the dtype of q, got bool", dict(k=np.zeros(SHAPES["k"], bool))),
    (TypeError, "q must hold float32", dict(q="text")),
    (ValueError, "bias must be float32, the dtype of q, got float64", dict(bias=np.zeros((2, 4, 7, 11)))),
    (ValueError, "bias must have rank 4", dict(bias=FLOATS[0])),
    (ValueError, "bias [2,1,1,10] must broadcast to [batch, num_heads, seqlen_q, seqlen_k] [2,4,7,11]",
     dict(bias=FLOATS[..., :10])),
    (ValueError, "masks[0] must be bool", dict(masks=[FLOATS])),
    (ValueError, "masks[1] [1,3,1,1] must broadcast", dict(masks=[FLOATS > 0, np.ones((1, 3, 1, 1), bool)])),
    (ValueError, "masks must be at most 4 arrays", dict(masks=[FLOATS > 0] * 5)),
    (TypeError, "masks", dict(masks=FLOATS > 0)),
    (ValueError, "query_lengths[1] (8) must be from 0 to seqlen_q (7)", dict(query_lengths=[7, 8])),
    (ValueError, "key_lengths[0] (-1) must be from 0 to seqlen_k (11)", dict(key_lengths=[-1, 8])),
    (ValueError, "key_lengths[0] (4294967297) must be from 0", dict(key_lengths=[2**32 + 1, 8])),
    (ValueError, "key_lengths must have the shape [2] of [batch], got [3]", dict(key_lengths=[1, 2, 3])),
    (ValueError, "key_lengths must have the shape [2] of [batch], got [1,2]", dict(key_lengths=[[1, 2]])),
    (TypeError, "key_lengths must hold integers, got float64", dict(key_lengths=[1.0, 2.0])),
    (ValueError, "scale (nan) must be finite", dict(scale=float("nan"))),
    (ValueError, "scale (-inf) must be finite", dict(scale=float("-inf"))),
    (TypeError, "scale ('x') must be a number", dict(scale="x")),
    (ValueError, "dropout_rate (1) must be at least 0 and less than 1", dict(dropout_rate=1.0)),
    (ValueError, "dropout_rate (nan)", dict(dropout_rate=float("nan"))),
    (ValueError, "window_left (-2) and window_right (-1) must be -1", dict(window_left=-2)),
    (TypeError, "window_right (1.5) must be an integer", dict(window_right=1.5)),
    (ValueError, "window_right (18446744073709551616) must fit 64 bits", dict(window_right=2**64)),
    (ValueError, "dropout_seed (-9223372036854775809) must fit 64 bits", dict(dropout_seed=-(2**63) - 1)),
    (ValueError, "layout ('BSDH') must be 'BSHD' or 'BHSD'", dict(layout="BSDH")),
    (ValueError, "isa ('mmx') must be one of those usable here: " + ", ".join(core.isas()), dict(isa="mmx")),
    (ValueError, "num_threads (-1) must be from 0", dict(num_threads=-1)),
    (ValueError, "num_threads (1025) must be from 0", dict(num_threads=1025)),
    (TypeError, "unknown keyword 'causal'", dict(causal=True)),
])  # fmt: skip
@pytest.mark.parametrize("function", ("forward", "backward"))
def test_bad_input(rng, function, error, message, changes):
    a, options = bad(rng, **changes)
    with pytest.raises(error) as raised:
        if function == "forward":
            core.forward(a["q"], a["k"], a["v"], **options)
        else:
            statistics = np.zeros((*STATISTICS, 2), "float32")
            core.backward(a["q"], a["k"], a["v"], a["d_out"], statistics, a["d_out"], **options)
    assert f"attn_ops._core.{function}: " in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("message, changes", [
    ("out must have the shape [2,7,4,13] of the forward output, got [2,7,4,12]", dict(out=(2, 7, 4, 12))),
    ("d_out must have the shape [2,7,4,13] of the forward output, got [2,4,7,13]", dict(d_out=(2, 4, 7, 13))),
    (
        "statistics must have the shape [2,4,7,2] of [batch, num_heads, seqlen_q, 2], got [2,7,4,2]",
        dict(statistics=(2, 7, 4, 2)),
    ),
    ("d_lse must have the shape [2,4,7] of [batch, num_heads, seqlen_q], got [2,4,7,1]", dict(d_lse=(2, 4, 7, 1))),
])  # fmt: skip
def test_bad_input_of_backward(rng, message, changes):
    shapes = dict(out=SHAPES["d_out"], statistics=(*STATISTICS, 2), d_out=SHAPES["d_out"], d_lse=STATISTICS) | changes
    given = {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    a = arrays(rng)
    with pytest.raises(ValueError) as raised:
        core.backward(a["q"], a["k"], a["v"], **given)
    assert message in str(raised.value)
    with pytest.raises(ValueError, match="statistics must be float32, float64 when q is float64, else float32, got float64"):
        core.backward(a["q"], a["k"], a["v"], a["d_out"], np.zeros((*STATISTICS, 2)), a["d_out"])


def test_sizes_that_overflow():
    """Arrays of stride 0 claim any size; so do empty ones, whose partial products overflow all the same."""

    def claim(*shape):
        return np.broadcast_to(np.float32(0), shape)

    with pytest.raises(ValueError, match=r"the size of out \[1048576,1073741824,1,1073741824\] overflows 64 bits"):
        core.forward(claim(2**20, 2**30, 1, 1), claim(2**20, 1, 1, 1), claim(2**20, 1, 1, 2**30))
    with pytest.raises(ValueError, match="the size of out .* overflows 64 bits"):
        core.forward(claim(2**30, 2**30, 0, 1), claim(2**30, 0, 1, 1), claim(2**30, 0, 1, 2**10))
    with pytest.raises(ValueError, match="the size of scores .* overflows 64 bits"):
        core.forward(claim(1, 2**40, 1, 1), claim(1, 2**40, 1, 1), claim(1, 2**40, 1, 1))
    with pytest.raises(MemoryError):
        core.forward(claim(2**50, 1, 1, 1), claim(2**50, 1, 1, 1), claim(2**50, 1, 1, 1))
    with pytest.raises(MemoryError, match=r"attn_ops\._core\.forward: no memory for a workspace of \d+ bytes"):
        # Of so many threads no machine has it: of two, 24 GB do, and the call goes on for days.
        core.forward(claim(1, 8, 1, 2**24), claim(1, 2**24, 1, 2**24), claim(1, 2**24, 1, 1), num_threads=256)
