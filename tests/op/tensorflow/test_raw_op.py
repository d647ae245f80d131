"""The operators `AttnOps>Forward` and `AttnOps>Backward` called without anything of ours in between: shapes known and
unknown, bad input from eager calls and from graphs, sizes at the edge, and the library loaded twice."""

import gc
import os
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from attn_ops import kernels, masks, reference

import children

library = kernels.library()
assert library is not None, kernels.unavailable_reason()

SHAPES = {"q": (2, 7, 4, 19), "k": (2, 11, 2, 19), "v": (2, 11, 2, 13), "d_out": (2, 7, 4, 13)}
STATISTICS = (2, 4, 7)
LISTS = (
    "bias",
    "masks",
    "query_lengths",
    "key_lengths",
    "seed",
    "intervals",
    "query_offset",
    "segments",
    "blocks",
    "slopes",
    "relative_bias",
    "sinks",
)


def forward(q, k, v, **options):
    lists = [options.pop(name, ()) for name in LISTS]
    return library.attn_ops_forward(q, k, v, *lists, **options)


def backward(q, k, v, out, statistics, d_out, d_lse=(), **options):
    lists = [options.pop(name, ()) for name in LISTS]
    return library.attn_ops_backward(q, k, v, out, statistics, d_out, d_lse, *lists, **options)


def arrays(rng, dtype="float32"):
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def expected(a, **options):
    out, lse = reference.attention(a["q"], a["k"], a["v"], **options)
    gradients = reference.attention_gradients(a["q"], a["k"], a["v"], d_out=a["d_out"], **options)
    return out, lse, *[g for g in gradients if g is not None]


def run(a, **options):
    out, statistics, (lse,) = forward(a["q"], a["k"], a["v"], num_lse=1, **options)
    options.pop("Tlse", None)  # follows from the statistics
    dq, dk, dv, *others = backward(a["q"], a["k"], a["v"], out, statistics, a["d_out"], **options)
    return out, lse, dq, dk, dv, *(d for gradients in others for d in gradients)


def assert_close(results, references, tolerance):
    assert len(results) == len(references)
    for result, wanted in zip(results, references):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance)


def test_all_inputs_and_attributes(rng):
    a = arrays(rng, "float64")
    masks = [rng.random(shape) < 0.8 for shape in ((2, 1, 1, 11), (1, 4, 7, 1))]
    bias = rng.normal(size=(1, 4, 1, 11))
    results = run(
        a,
        bias=[tf.constant(bias)],
        masks=masks,
        query_lengths=[np.int32([7, 5])],
        key_lengths=[np.int32([11, 6])],
        seed=[np.int64([3, -4])],
        Tlse=tf.float64,
        scale=repr(1 / 3),
        dropout_rate=repr(0.3),
        window_left=3,
        window_right=4,
        bottom_right=True,
    )
    wanted = expected(
        a,
        bias=bias,
        mask=masks,
        query_seq_lengths=[7, 5],
        key_value_seq_lengths=[11, 6],
        dropout_seed=(3, -4),
        scale=1 / 3,
        dropout_rate=0.3,
        window=(3, 4),
        causal_alignment="bottom_right",
    )
    assert_close(results, wanted, 1e-12)


def test_scores_and_structured_masks(rng):
    a = arrays(rng, "float64")
    slopes, table, sinks = rng.normal(size=(2, 4)), rng.normal(size=(4, 7)), rng.normal(size=4)
    begin, end = np.sort(rng.integers(0, 12, (2, 2, 7)), axis=-1).astype("int32")
    ids = [rng.integers(0, 3, (2, n)).astype("int32") for n in (7, 11)]
    blocks = rng.random((1, 4, 3, 3)) < 0.7
    results = run(
        a,
        intervals=[begin // 2, end],
        query_offset=[np.int32([1, 4])],
        segments=ids,
        blocks=[blocks],
        slopes=[tf.constant(slopes)],  # arrays of NumPy would be cast to the default of their type
        relative_bias=[tf.constant(table)],
        sinks=[tf.constant(sinks)],
        block_q=3,
        block_k=4,
        soft_cap=repr(1.5),
        window_right=2,
        Tlse=tf.float64,
    )
    wanted = expected(
        a,
        mask=masks.intervals(begin // 2, end) & masks.segments(*ids) & masks.block_sparse(blocks, 3, 4),
        query_offset=np.array([1, 4]),
        alibi_slopes=slopes,
        relative_bias=table.T,
        sinks=sinks,
        logits_soft_cap=1.5,
        window=(None, 2),
    )
    assert_close(results, [*wanted[:5], wanted[5].T, wanted[6]], 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 1e-1)])
def test_dtypes(rng, dtype, tolerance):
    a = {name: tf.cast(x, dtype) for name, x in arrays(rng).items()}
    results = run(a)
    assert [r.dtype for r in results] == [dtype, "float32", dtype, dtype, dtype]
    wide = {name: tf.cast(x, "float64").numpy() for name, x in a.items()}
    assert_close([tf.cast(r, "float64") for r in results], expected(wide), tolerance)


def test_layout(rng):
    a = arrays(rng)
    swapped = {name: x.swapaxes(1, 2) for name, x in a.items()}
    out, lse, *gradients = run(a)
    other_out, other_lse, *others = run(swapped, layout="BHSD")
    np.testing.assert_array_equal(other_lse, lse)
    for x, other in zip((out, *gradients), (other_out, *others)):
        np.testing.assert_array_equal(x, tf.transpose(other, (0, 2, 1, 3)))


def test_bias_gradient_only_when_wanted(rng):
    a = arrays(rng)
    bias = [rng.normal(size=(1, 4, 7, 11)).astype("float32")]
    out, statistics, lse = forward(a["q"], a["k"], a["v"], bias=bias)
    assert lse == []
    results = [a[name] for name in ("q", "k", "v")] + [out, statistics, a["d_out"]]
    assert backward(*results, bias=bias).grad_bias[0].shape == bias[0].shape
    assert backward(*results, bias=bias, d_bias=False).grad_bias[0].shape == [0]
    assert backward(*results).grad_bias == []


@pytest.mark.parametrize("known", [
    lambda shape: shape,
    lambda shape: [None, *shape[1:]],
    lambda shape: [shape[0], None, shape[2], None],
    lambda shape: [None] * 4,
    lambda shape: None,
])  # fmt: skip
def test_graph_with_unknown_shapes(rng, known):
    a = arrays(rng)
    names = list(SHAPES)

    @tf.function(input_signature=[tf.TensorSpec(known(SHAPES[name]), "float32") for name in names])
    def function(*inputs):
        results = run(dict(zip(names, inputs)), masks=[tf.ones((1, 1, 7, 11), tf.bool)])
        shapes.append([r.shape for r in results])
        return results

    shapes = []
    results = function(*a.values())
    assert_close(results, expected(a), 1e-5)
    for static, result in zip(shapes[0], results):
        assert static.is_compatible_with(result.shape)
    out, lse, dq, dk, dv = shapes[0]
    if known(SHAPES["q"]) is not None:
        q, k, v, d_out = (known(SHAPES[name]) for name in names)
        assert [s.as_list() for s in (out, dq, dk, dv)] == [list(shape) for shape in (d_out, q, k, v)]
        assert lse.rank == 3 and lse[0] == q[0]
    else:
        assert out.rank is None and lse.rank == 3


@pytest.mark.parametrize("changes", [
    {"q": (0, 7, 4, 19), "k": (0, 11, 2, 19), "v": (0, 11, 2, 13)},
    {"q": (2, 0, 4, 19)},
    {"k": (2, 0, 2, 19), "v": (2, 0, 2, 13)},
    {"q": (2, 7, 0, 19)},
    {"v": (2, 11, 2, 0)},
])  # fmt: skip
def test_empty_tensors(rng, changes):
    shapes = SHAPES | changes
    shapes["d_out"] = (*shapes["q"][:3], shapes["v"][3])
    a = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    assert_close(run(a), expected(a), 1e-5)


def zeros(*shape, dtype="float32"):
    return tf.zeros(shape, dtype)


def changed(changes):
    given = {name: zeros(*SHAPES[name]) for name in ("q", "k", "v")}
    return given | changes


LENGTHS = tf.constant([3, 4])
# The rule that is broken, and the inputs or attributes that break it. Those marked "shapes" are found when a graph is
# built, where shapes are all that is known; the rest when it runs.
BAD_FORWARD = [
    ("shapes", "q must have rank 4", dict(q=zeros(7, 4, 19))),
    ("shapes", "v must have rank 4", dict(v=zeros(2, 11, 2, 13, 1))),
    ("shapes", "k must have the batch of q (2), got 3", dict(k=zeros(3, 11, 2, 19))),
    ("shapes", "k must have the head_dim of q (19), got 18", dict(k=zeros(2, 11, 2, 18))),
    ("shapes", "(11), got 12", dict(v=zeros(2, 12, 2, 13))),
    ("shapes", "(2), got 4", dict(v=zeros(2, 11, 4, 13))),
    ("shapes", "head_dim must be at least 1, got 0", dict(q=zeros(2, 7, 4, 0), k=zeros(2, 11, 2, 0))),
    ("shapes", "must have rank 4 [batch, num_heads, seqlen_q, seqlen_k]", dict(bias=[zeros(2, 7, 11)])),
    ("values", "num_heads (6) must be a multiple of num_kv_heads (4)",
     dict(q=zeros(2, 7, 6, 19), k=zeros(2, 11, 4, 19), v=zeros(2, 11, 4, 13))),
    ("values", "num_heads (4) must be a multiple of num_kv_heads (0)",
     dict(k=zeros(2, 11, 0, 19), v=zeros(2, 11, 0, 13))),
    ("values", "bias [2,1,7,10] must broadcast to [batch, num_heads, seqlen_q, seqlen_k] [2,4,7,11]",
     dict(bias=[zeros(2, 1, 7, 10)])),
    ("values", "masks[1] [1,3,1,1] must broadcast",
     dict(masks=[zeros(1, 1, 1, 1, dtype="bool"), zeros(1, 3, 1, 1, dtype="bool")])),
    ("values", "query_lengths[1] (8) must be from 0 to seqlen_q (7)", dict(query_lengths=[tf.constant([7, 8])])),
    ("values", "key_lengths[0] (-1) must be from 0 to seqlen_k (11)", dict(key_lengths=[tf.constant([-1, 8])])),
    ("values", "key_lengths must have the shape [2] of [batch], got [3]", dict(key_lengths=[tf.constant([1, 2, 3])])),
    ("values", "num_masks (5) must be from 0 to 4", dict(masks=[zeros(1, 1, 1, 1, dtype="bool")] * 5)),
    ("values", "num_bias (2) must be from 0 to 1", dict(bias=[zeros(1, 1, 1, 1)] * 2)),
    ("values", "num_key_lengths (2) must be from 0 to 1", dict(key_lengths=[LENGTHS] * 2)),
    ("values", "seed must have the shape [2] of (seed, offset), got [3]",
     dict(seed=[tf.constant([1, 2, 3], tf.int64)])),
    ("values", "dropout_rate > 0 needs a seed", dict(dropout_rate="0.5")),
    ("values", "dropout_rate (1) must be at least 0 and less than 1", dict(dropout_rate="1")),
    ("values", "dropout_rate (-0.5)", dict(dropout_rate="-0.5")),
    ("values", "dropout_rate (nan)", dict(dropout_rate="nan")),
    ("values", "dropout_rate ('') must be a decimal number", dict(dropout_rate="")),
    ("values", "scale (nan) must be finite", dict(scale="nan")),
    ("values", "scale (-inf) must be finite", dict(scale="-inf")),
    ("values", "scale (inf) must be finite", dict(scale="1e999")),
    ("values", "scale ('0,5') must be a decimal number", dict(scale="0,5")),
    ("values", "scale ('1.5x') must be a decimal number", dict(scale="1.5x")),
    ("values", "window_left (-2) and window_right (-1) must be -1", dict(window_left=-2)),
    ("values", "Tlse must be double when T is double, else float", dict(Tlse=tf.float64)),
]  # fmt: skip


@pytest.mark.parametrize("message, changes", [case[1:] for case in BAD_FORWARD])
def test_bad_input_eager(message, changes):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        forward(**changed(changes))
    assert "AttnOps>Forward: " in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize("found, message, changes", BAD_FORWARD)
def test_bad_input_in_a_graph(found, message, changes):
    # Tensors of the eager context cannot go into a graph: take their values.
    given = tf.nest.map_structure(lambda x: x.numpy() if tf.is_tensor(x) else x, changed(changes))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        if found == "shapes":
            with pytest.raises(ValueError) as raised:
                forward(**given)
        else:
            out, *_ = forward(**given)
            with pytest.raises(tf.errors.InvalidArgumentError) as raised:
                session.run(out)
    assert "AttnOps>Forward: " in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize("changes", [case[2] for case in BAD_FORWARD if case[0] == "shapes"])
def test_bad_shapes_known_only_at_run_time(changes):
    """The shape function had nothing to check, so the kernel must."""
    given = changed(changes)
    tensors = [given[name] for name in ("q", "k", "v")]
    bias = given.get("bias", ())
    signature = [tf.TensorSpec(None, "float32")] * len([*tensors, *bias])
    function = tf.function(lambda q, k, v, *bias: forward(q, k, v, bias=bias).out, input_signature=signature)
    with pytest.raises(tf.errors.InvalidArgumentError, match="AttnOps>Forward: "):
        function(*tensors, *bias)


@pytest.mark.parametrize("message, changes", [
    ("out must have", dict(out=zeros(2, 7, 4, 12))),
    ("d_out must have", dict(d_out=zeros(2, 4, 7, 13))),
    ("d_out must have rank 4", dict(d_out=zeros(2, 7, 13))),
    (
        "statistics must have the shape [2,4,7,2] of [batch, num_heads, seqlen_q, 2], got [2,7,4,2]",
        dict(statistics=zeros(2, 7, 4, 2)),
    ),
    ("d_lse must have the shape [2,4,7]", dict(d_lse=[zeros(2, 4, 8)])),
    ("num_d_lse (2) must be from 0 to 1", dict(d_lse=[zeros(2, 4, 7)] * 2)),
    ("num_heads (4) must be a multiple of num_kv_heads (3)", dict(k=zeros(2, 11, 3, 19), v=zeros(2, 11, 3, 13))),
])  # fmt: skip
@pytest.mark.parametrize("mode", ("eager", "graph"))
def test_bad_input_of_backward(mode, message, changes):
    given = changed(dict(out=zeros(2, 7, 4, 13), statistics=zeros(*STATISTICS, 2), d_out=zeros(2, 7, 4, 13)) | changes)
    call = backward if mode == "eager" else tf.function(backward)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)) as raised:
        call(**given)
    assert "AttnOps>Backward: " in str(raised.value) and message.split(" rank")[0] in str(raised.value)


@pytest.mark.parametrize("changes", [
    dict(q=zeros(2, 7, 4, 19, dtype="int32")),
    dict(k=zeros(2, 11, 2, 19, dtype="float64")),
    dict(masks=[zeros(2, 1, 1, 11)]),
    dict(key_lengths=[tf.constant([1, 2], tf.int64)]),
    dict(seed=[tf.constant([1, 2])], dropout_rate="0.5"),
    dict(layout="SBHD"),
    dict(scale=0.5),
])  # fmt: skip
@pytest.mark.parametrize("mode", ("eager", "graph"))
def test_what_tensorflow_itself_refuses(mode, changes):
    call = forward if mode == "eager" else tf.function(lambda given: forward(**given))
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.NotFoundError, TypeError, ValueError)):
        call(**changed(changes)) if mode == "eager" else call(changed(changes))


def test_sizes_that_overflow():
    """Products of extents that overflow, of tensors which are empty and so cost nothing to make."""
    for q, k, v in (
        ((2**30, 2**30, 0, 1), (2**30, 0, 1, 1), (2**30, 0, 1, 2**10)),
        ((2**31, 0, 2**20, 1), (2**31, 0, 1, 1), (2**31, 0, 1, 2**20)),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="AttnOps>Forward: the size of .* overflows 64 bits"):
            forward(zeros(*q), zeros(*k), zeros(*v))


def test_errors_keep_no_more_memory_than_those_of_tensorflow():
    """Of failing eager calls some TensorFlows keep the inputs; ours must keep none on top."""
    big = 2**18  # elements: a MiB each

    def ours(index):
        q, k = tf.fill((1, 1, 3, big), float(index)), tf.fill((1, 1, 2, big), 0.0)
        with pytest.raises(tf.errors.InvalidArgumentError):
            if index % 2:
                forward(q, k, k)  # num_heads
            else:
                backward(q, q, q, q, zeros(1, 3, 2, 2), q)  # statistics

    def theirs(index):
        q, k = tf.fill((3, big), float(index)), tf.fill((2, big), 0.0)
        with pytest.raises(tf.errors.InvalidArgumentError):
            tf.linalg.matmul(q, k)

    def growth(fail, calls=150):
        for index in range(20):
            fail(index)
        before = resident()
        for index in range(calls):
            fail(index)
        return resident() - before

    def resident():
        gc.collect()  # exceptions, their frames and what lies there are cycles
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    assert growth(ours) <= growth(theirs) + 32 * 2**20


def test_many_threads_at_once(rng):
    """More callers than TensorFlow has threads to help them: none waits for another."""
    a = {name: rng.normal(size=(2, 150, shape[2], 20)).astype("float32") for name, shape in SHAPES.items()}
    wanted = run(a)
    graph = tf.function(lambda: run(a))
    graph()
    failures = []

    def work(call):
        try:
            for _ in range(20):
                for result, other in zip(call(), wanted):
                    np.testing.assert_array_equal(result, other)
        except Exception as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(c,)) for c in (graph, lambda: run(a)) * 4]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


ONE_CALL = """
import hashlib, os
import tensorflow as tf
if "INTRA_OP_THREADS" in os.environ:
    tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["INTRA_OP_THREADS"]))
from attn_ops import kernels

def digest():
    x = tf.reshape(tf.sin(tf.range(2 * 300 * 4 * 16, dtype="float32")), (2, 300, 4, 16))
    return hashlib.sha256(kernels.library().attn_ops_forward(x, x, x, *[()] * 12).out.numpy()).hexdigest()
"""


def test_threads_with_and_without_tensorflows_pool():
    """The same bits with one of TensorFlow's threads, with threads of our own, and here."""
    names = {}
    exec(ONE_CALL, names)
    for environment in ({"INTRA_OP_THREADS": "1"}, {"ATTN_OPS_DISABLE_TF_POOL": "1"}):
        done = children.run(ONE_CALL + "print(digest())", **environment)
        assert done.stdout.strip() == names["digest"](), done.stderr


@pytest.fixture
def why_not(monkeypatch):
    """What `kernels.unavailable_reason` would say if it looked for the library at a path now."""

    def ask(path=kernels._LIBRARY):
        monkeypatch.setattr(kernels, "_LIBRARY", Path(path))
        loaded, reason = kernels._library.__wrapped__()
        assert loaded is None
        return reason

    return ask


def test_reasons_for_no_library(tmp_path, monkeypatch, why_not):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    assert f"{broken} cannot be loaded with TensorFlow {tf.__version__}" in why_not(broken)
    assert f"{tmp_path}/none.so does not exist" in why_not(tmp_path / "none.so")
    with monkeypatch.context() as patch:
        patch.setattr(tf, "__version__", "2.15.1")
        assert "TensorFlow 2.15.1 is older than 2.16" in why_not()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        assert "pip install tensorflow" in why_not() and "attn_ops[" not in why_not()
    with monkeypatch.context() as patch:
        patch.setenv("ATTN_OPS_DISABLE", "1")
        assert "ATTN_OPS_DISABLE switches the fused op off" in why_not()


def test_a_second_copy_of_the_library(rng, tmp_path, capfd, why_not):
    """The package refuses to load one; one loaded all the same stays unused, and the first goes on working."""
    first = os.path.realpath(kernels._LIBRARY)
    copy = shutil.copy(first, tmp_path)
    assert f"another copy of the library is already loaded in this process, from {first}" in why_not(copy)

    tf.load_op_library(copy)
    assert f"a copy of this library is already loaded from {first}" in capfd.readouterr().err
    a = arrays(rng)
    assert_close(run(a), expected(a), 1e-5)


def test_unusable_isa_in_the_environment_is_an_error():
    code = (
        "import numpy as np, tensorflow as tf, attn_ops; x = np.ones((1, 1, 1, 8), 'float32')\n"
        "try: attn_ops.scaled_dot_product_attention(x, x, x, implementation='fused')\n"
        "except tf.errors.InvalidArgumentError as error: print(error.message)"
    )
    run = children.run(code, ATTN_OPS_ISA="mmx")
    assert "the environment variable ATTN_OPS_ISA ('mmx') must name an instruction set" in run.stdout
