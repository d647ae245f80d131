"""The kernels as nvcc compiles them, against float64: features, shapes, rounding as tensor cores do it, races, banks
of shared memory.

The breadth is in the other tests of the CUDA kernels, which run so too (ATTN_OPS_STANDIN_PTX=1, README.md).
"""

import numpy as np
import pytest
from attn_ops import masks
from cases import TOLERANCES, assert_close, check, make_inputs
from implementations import Cuda, specification
from reference_cases import CASES

from cuda_host import wavefronts
from cuda_host.ptx import launching
from cuda_host.ptx.accuracy import assert_as_accurate_as_plain
from cuda_host.ptx.banks import Banks
from cuda_host.ptx.publication import Publication
from cuda_host.ptx.races import Races


@pytest.mark.wide(10)
@pytest.mark.parametrize("decodes", [True, False], ids=["", "without-decode"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_features(interpreter, case, dtype, decodes):
    interpreter()
    arrays = [x.astype(make_inputs(dtype)[0].dtype) for x in (*case.inputs.values(), case.d_out)]
    d_lse = case.d_lse.astype(np.float32)
    found = Cuda(False, decodes)(*arrays, d_lse, **case.options)
    options = dict(case.options)
    if "bias" in options and dtype == "bfloat16":
        options["bias"] = options["bias"].astype(arrays[0].dtype)
    assert_close(found, specification(*arrays, d_lse, **options), TOLERANCES[dtype], f"{case.name} {options}")


# More than one tile each way, with a rest; (options, dtype, whether few rows are decoded).
SHAPES = {
    "plain": (dict(seqlen_q=150, seqlen_k=200, head_dim=64), "bfloat16", False),
    "causal": (dict(seqlen_q=140, seqlen_k=140, head_dim=64, is_causal=True), "bfloat16", False),
    "halves, groups": (dict(seqlen_q=70, seqlen_k=90, num_heads=6, num_kv_heads=2, head_dim=64), "float16", False),
    "float32": (dict(seqlen_q=70, seqlen_k=90, head_dim=64, is_causal=True), "float32", False),
    "decode": (dict(seqlen_q=2, seqlen_k=700, head_dim=64), "bfloat16", True),
    "decode, float32": (dict(seqlen_q=3, seqlen_k=500, head_dim=64), "float32", True),
    "dropout, window": (
        dict(seqlen_q=70, seqlen_k=90, head_dim=64, dropout_rate=0.3, dropout_seed=3, window=(30, 9)),
        "bfloat16",
        False,
    ),
    "rows of 8 bytes": (dict(seqlen_q=40, seqlen_k=50, head_dim=20), "bfloat16", False),
    "rows of 4 bytes": (dict(seqlen_q=40, seqlen_k=50, head_dim=18), "bfloat16", False),
    "odd rows": (dict(seqlen_q=40, seqlen_k=50, head_dim=17), "bfloat16", False),
    "head dim 96": (dict(seqlen_q=70, seqlen_k=70, head_dim=96), "bfloat16", False),
    "head dim 128": (dict(seqlen_q=140, seqlen_k=70, head_dim=128, is_causal=True), "bfloat16", False),
    "head dim 192": (dict(seqlen_q=70, seqlen_k=70, head_dim=192), "float16", False),
    "head dim 256": (dict(seqlen_q=70, seqlen_k=70, head_dim=256), "bfloat16", False),
    "head dim 128, float32": (dict(seqlen_q=70, seqlen_k=40, head_dim=128), "float32", False),
    "head dim 256, float32": (dict(seqlen_q=40, seqlen_k=40, head_dim=256), "float32", False),
    "decode, head dim 256": (dict(seqlen_q=1, seqlen_k=600, head_dim=256), "float16", True),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_without_races(interpreter, shape):
    options, dtype, decodes = SHAPES[shape]
    interpreter(observers=[Races(), Publication()])
    check(Cuda(False, decodes), dtype, **{"batch": 1, "num_heads": 1, "num_kv_heads": 1, **options})


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("decodes", [True, False], ids=["", "without-decode"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_what_is_not_finite_without_races(interpreter, dtype, decodes, bias):
    """Rows that leave the products are handed from thread to thread."""
    interpreter(observers=[Races(), Publication()])
    length = 40 if decodes else 132
    options = {"bias": np.zeros((1, 1, 1, length), np.float32)} if bias else {}
    check(Cuda(False, decodes), dtype, inputs=launching.nonfinite_inputs(dtype, length), is_causal=True, **options)


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_table_by_distance(interpreter, dtype):
    """Of more distances than a block has threads, and of fewer than a tile has keys; in parts."""
    kernels = interpreter(observers=[Races(), Publication()])
    for distances in (141, 5):
        table = np.random.default_rng(3).standard_normal((distances, 1)).astype(np.float32)
        check(Cuda(False, False), dtype, seqlen_q=90, seqlen_k=90, num_heads=1, num_kv_heads=1, relative_bias=table)
    assert {"attn_ops_dtable_sum_f32"} < {launch.kernel for launch in kernels.launches}


def test_blocks_and_segments(interpreter):
    interpreter(observers=[Races()])
    shown = np.random.default_rng(1).random((5, 7)) < 0.4
    ids = np.random.default_rng(2).integers(0, 3, (2, 140))
    mask = masks.block_sparse(shown, 30, 20) & masks.segments(ids, ids)
    check(
        Cuda(False, False), "bfloat16", seqlen_q=140, seqlen_k=140, num_heads=1, num_kv_heads=1, head_dim=64, mask=mask
    )


# --- Rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.wide(2)
@pytest.mark.parametrize("model", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy_with_the_rounding_of_tensor_cores(interpreter, dtype, model):
    """Where products are cut off."""
    interpreter(model=model)
    query, key, value, d_out, _ = make_inputs(dtype, 1, 66, 160, 1, 1, 64)
    found = Cuda(False, False)(query, key, value, d_out)
    expected = specification(query, key, value, d_out)
    assert_as_accurate_as_plain(found, expected, (query, key, value, d_out))


def test_models_differ(interpreter):
    """What is cut off can be seen: else the test above would say nothing."""
    inputs = make_inputs("float32", 1, 17, 70, 1, 1, 64)
    outputs = {}
    for model in ("exact", "sm_80", "sm_90"):
        interpreter(model=model)
        outputs[model] = Cuda(False, False)(*inputs).out
    assert len({output.tobytes() for output in outputs.values()}) == 3


# --- Banks of shared memory -----------------------------------------------------------------------------------------

# Of the passes of a kernel, the share that conflicts may cost. Where there are any, it is what is told of rows, 16 bytes
# apart (dkdv, not plain), or pairs of the table that are written as single numbers (dbias).
CONFLICTS = {
    "attn_ops_forward_bf16_64_plain": 0,
    "attn_ops_dq_bf16_64_plain": 0,
    "attn_ops_dkdv_bf16_64_plain": 0,
    "attn_ops_decode_bf16_64": 0,
    "attn_ops_dq_bf16_64": 0,
    "attn_ops_dkdv_bf16_64": 0.015,
    "attn_ops_dbias_bf16_64": 0.015,
}


def test_bank_conflicts(interpreter):
    banks = Banks()
    kernels = interpreter(observers=[banks])
    shape = dict(batch=1, num_heads=1, num_kv_heads=1, head_dim=64)
    bias = np.zeros((1, 1, 128, 192), np.float32)
    for decodes, options in (
        (False, dict(seqlen_q=128)),
        (True, dict(seqlen_q=4)),
        (False, dict(seqlen_q=128, bias=bias)),
    ):
        check(Cuda(False, decodes), "bfloat16", seqlen_k=192, **shape, **options)
    assert set(CONFLICTS) <= {launch.kernel for launch in kernels.launches}
    for kernel, most in CONFLICTS.items():
        extra = sum(count.passes - count.least for count in banks.conflicts().get(kernel, ()))
        assert extra <= most * banks.passes(kernel), (
            kernel,
            extra,
            banks.passes(kernel),
            banks.conflicts().get(kernel),
        )


@pytest.mark.parametrize("head_dim, forward, dq, dkdv", [(64, 0.0938, 0.2188, 0.2221), (128, 0.2188, 0.4375, 0.6025)])
def test_passes_for_each_score(interpreter, head_dim, forward, dq, dkdv):
    """What the tiles that pass cost: of dq with its operands in registers, keys are read twice and values once. Each of
    two kernels takes less than FlashAttention-2's one."""
    found = wavefronts.per_score("bfloat16", head_dim)
    assert found == pytest.approx({"forward": forward, "dq": dq, "dkdv": dkdv}, rel=0.01)
    assert max(dq, dkdv) < wavefronts.flash_attention_2(head_dim)


def test_passes_of_flash_attention_2():
    """Of its tile of 64 x 128 scores, 144 ldmatrix for each of the 8 warps, counted in its code."""
    written = 2 * (64 * 128 + 64 * 128) * 2 / 128
    assert wavefronts.flash_attention_2(128) == (8 * 144 * 4 + written) / (64 * 128)
