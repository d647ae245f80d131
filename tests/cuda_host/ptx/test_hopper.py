"""Hopper's kernels (csrc/cuda/hopper) as nvcc compiles them, against float64: shapes, orders, races, accuracy."""

import cuda_run
import numpy as np
import pytest
from attn_ops import masks, reference
from cases import TOLERANCES, check, make_inputs
from implementations import Cuda, specification
from kernel_options import core_options

from cuda_host.ptx import launching
from cuda_host.ptx.accuracy import assert_as_accurate_as_plain, errors
from cuda_host.ptx.banks import Banks
from cuda_host.ptx.proxies import Proxies
from cuda_host.ptx.races import Races

pytestmark = pytest.mark.usefixtures("hopper")


def names(kernels):
    return {launch.kernel.removeprefix("attn_ops_hopper_") for launch in kernels.launches}


def expected_names(dtype, dim):
    math = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    return {f"{role}_{math}_{dim}" for role in ("forward", "dq", "dkdv")}


# More than one tile each way, with a rest; (options, dtype, padded head dim).
SHAPES = {
    "plain": (dict(seqlen_q=150, seqlen_k=300), "bfloat16", 64),
    "causal": (dict(seqlen_q=300, seqlen_k=300, is_causal=True), "float16", 64),
    "whole tiles": (dict(seqlen_q=128, seqlen_k=384, with_d_lse=False), "bfloat16", 64),
    "groups": (dict(seqlen_q=70, seqlen_k=150, num_heads=6, num_kv_heads=2, is_causal=True), "float16", 64),
    "heads first": (dict(seqlen_q=90, seqlen_k=70, num_heads=4, num_kv_heads=2, layout="BHSD"), "bfloat16", 64),
    "window": (dict(seqlen_q=290, seqlen_k=290, window=(60, 9)), "bfloat16", 64),
    "rows that see nothing": (
        dict(seqlen_q=200, seqlen_k=130, is_causal=True, causal_alignment="bottom_right"),
        "bfloat16",
        64,
    ),
    "lengths": (
        dict(
            batch=2,
            seqlen_q=140,
            seqlen_k=200,
            query_seq_lengths=np.array([140, 3]),
            key_value_seq_lengths=np.array([0, 150]),
            is_causal=True,
        ),
        "float16",
        64,
    ),
    "narrow": (dict(seqlen_q=140, seqlen_k=140, head_dim=40, value_dim=24), "bfloat16", 64),
    "narrow keys": (dict(seqlen_q=70, seqlen_k=140, head_dim=24, value_dim=128), "float16", 128),
    "128": (dict(seqlen_q=150, seqlen_k=300), "bfloat16", 128),
    "128, causal": (dict(seqlen_q=280, seqlen_k=280, is_causal=True), "float16", 128),
    "128, groups, window": (
        dict(seqlen_q=70, seqlen_k=150, num_heads=4, num_kv_heads=1, window=(40, 0)),
        "bfloat16",
        128,
    ),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_without_races(interpreter, shape):
    options, dtype, dim = SHAPES[shape]
    kernels = interpreter(observers=[Races(), Proxies()])
    check(Cuda(False, False), dtype, **{"batch": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": dim, **options})
    assert names(kernels) == expected_names(dtype, dim)


def intervals(batch, seed=0):
    """Ends that never move back, anywhere; some rows see nothing."""
    begin, end = np.sort(np.random.default_rng(seed).integers(0, 291, (2, batch, 290)).astype(np.int32))
    return masks.intervals(begin, end)


STRUCTURES = {
    "intervals": {"mask": intervals(2)},
    "intervals of all, window": {"mask": intervals(1) & masks.window(left=20, right=5)},
    "intervals, lengths": {"mask": intervals(2) & masks.padding(np.array([120, 7]), np.array([0, 130]))},
    "prefix": {"mask": masks.prefix(np.array([40, 0]))},
    "chunked": {"mask": masks.chunked(130)},
    "packed": {"mask": masks.packed([0, 3, 70, 290])},
    "offsets": {"is_causal": True, "query_offset": np.array([7, 60]), "seqlen_k": 400},
    "offsets beyond the keys": {"is_causal": True, "window": (30, None), "query_offset": np.array([310, 200])},
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_rows_see_without_races(interpreter, structure):
    kernels = interpreter(observers=[Races(), Proxies()])
    options = {"batch": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "seqlen_q": 290, "seqlen_k": 290}
    check(Cuda(False, False), "bfloat16", **{**options, **STRUCTURES[structure]})
    assert names(kernels) == expected_names("bfloat16", 64)


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (100, 20), "seqlen_q": 200}], ids=["plain", "causal", "window"]
)
def test_forward_of_256(interpreter, options, dtype):
    """Which has no backward there."""
    kernels = interpreter(observers=[Races(), Proxies()])
    options = dict(options)
    query, key, value, d_out, _ = make_inputs(dtype, 1, options.pop("seqlen_q", 150), 150, 1, 1, 256)
    arguments, kept = cuda_run.launch_options(core_options(query, key, options))
    found = cuda_run.call_forward(query, key, value, d_out.shape, arguments)
    out, lse = reference.attention(query, key, value, **options)
    for name, wanted in (("out", out), ("lse", lse)):
        error = np.abs(found[name].numpy().astype(np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= TOLERANCES[dtype], name
    assert names(kernels) == {f"forward_{'bf16' if dtype == 'bfloat16' else 'f16'}_256"}


@pytest.mark.wide(2)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_not_finite_without_races(interpreter, dtype, dim):
    """Rows that leave the products are handed from thread to thread."""
    kernels = interpreter(observers=[Races(), Proxies()])
    inputs = launching.nonfinite_inputs(dtype, 200, dim)
    check(Cuda(False, False), dtype, inputs=inputs, is_causal=True)
    assert names(kernels) == expected_names(dtype, dim)


def test_large_scores(interpreter):
    """Beyond what the scale may be fused into; some rows are not."""
    interpreter(observers=[Races(), Proxies()])
    query, key, value, d_out, d_lse = make_inputs("bfloat16", 1, 140, 200, 1, 1, 64)
    query[:, 100:] *= 400
    found, expected = check(Cuda(False, False), "bfloat16", inputs=(query, key, value, d_out, d_lse))
    assert np.abs(expected.lse).max() > 1024


@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (40, 24), (128, 128)])
def test_delta_of_large_outputs(interpreter, head_dim, value_dim):
    """dq forgives a wrong rowsum(d_out * out), up to the rounding of what that makes of ds: 0.1 of dq, where all values
    are far from zero. Right, it is a fiftieth of that.
    """
    interpreter()
    inputs = make_inputs("bfloat16", 1, 70, 150, 2, 1, head_dim, value_dim)[:4]
    inputs = (*inputs[:2], (inputs[2] + 100).astype(inputs[2].dtype), inputs[3])
    found, expected = Cuda(False, False)(*inputs), specification(*inputs)
    assert errors(found.dq, expected.dq)[0] < 0.02


class Stores:
    """An observer (machine.py): how many bytes a lane stores at a time, by kernel."""

    def __init__(self):
        self.sizes = {}

    def begin(self, machine):
        self.kernel = self.sizes.setdefault(machine.program.name, set())

    def global_write(self, step, lanes, addresses, size):
        self.kernel.add(size)


@pytest.mark.parametrize("dim", [64, 128])
def test_results_are_stored_by_rows(interpreter, dim):
    """And not one element of 16 bits after the other, which is as right, and slow."""
    stores = Stores()
    interpreter(observers=[stores])
    Cuda(False, False)(*make_inputs("bfloat16", 1, 70, 70, 2, 1, dim))
    assert len(stores.sizes) == 3
    assert all(16 in sizes and 2 not in sizes for sizes in stores.sizes.values()), stores.sizes


@pytest.mark.parametrize("dim", [64, 128])
def test_no_bank_conflicts(interpreter, dim):
    """Of what threads load and store themselves, where tiles are looked through too."""
    banks = Banks()
    interpreter(observers=[banks])
    Cuda(False, False)(*make_inputs("bfloat16", 1, 150, 150, 1, 1, dim), is_causal=True)
    assert banks.counts and not banks.conflicts()


def of_warpgroups(*ranks):
    return [rank for rank in ranks for _ in range(4)]


# Which warps go on as long as they can, before the others: the first warpgroup copies.
ORDERS = {
    "copies first": of_warpgroups(0, 1, 1),
    "copies last": of_warpgroups(1, 0, 0),
    "one after the other": of_warpgroups(0, 1, 2),
    "the other way": of_warpgroups(2, 1, 0),
    "second consumer first": of_warpgroups(1, 2, 0),
    "each warp by itself": range(12),
    "each warp, the last first": range(11, -1, -1),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_warps(interpreter, order):
    """The results are the same to the last bit. Rings go round more than once."""
    inputs = launching.nonfinite_inputs("bfloat16", 420)
    results = []
    for ranks in (None, ORDERS[order]):
        interpreter(ranks=ranks)
        results.append(Cuda(False, False)(*inputs, is_causal=True))
    for (name, one), (_, other) in zip(*(result.items() for result in results), strict=True):
        assert one.tobytes() == other.tobytes(), name


@pytest.mark.wide(2)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accuracy_with_the_rounding_of_tensor_cores(interpreter, dtype, dim):
    interpreter(model="sm_90")
    inputs = make_inputs(dtype, 1, 66, 160, 1, 1, dim)[:4]
    assert_as_accurate_as_plain(Cuda(False, False)(*inputs), specification(*inputs), inputs)
