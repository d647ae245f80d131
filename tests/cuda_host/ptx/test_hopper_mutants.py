"""The tests of Hopper's kernels can fail: mistakes in their PTX are found, as a wrong result, an error or a race."""

from functools import cache

import numpy as np
import pytest
from attn_ops.kernels.cuda import CudaError
from cases import TOLERANCES, make_inputs
from implementations import specification

from cuda_host.ptx import launching, mutants
from cuda_host.ptx.mutants import Mutant
from cuda_host.ptx.proxies import Proxies
from cuda_host.ptx.races import Races

pytestmark = pytest.mark.usefixtures("hopper")

FORWARD, DQ, DKDV = KERNELS = tuple(f"attn_ops_hopper_{role}_bf16_64" for role in ("forward", "dq", "dkdv"))

OPERANDS = ("SWAPPED_DESCRIPTORS", "SWAPPED_LEFT", "ALONG_FOR_ACROSS", "ACROSS_FOR_ALONG", "NOTHING_ADDED")
OPERANDS += ("WRONG_STRIDE", "SWAPPED_PAIR")
WHOLE = [(kernel, name, None) for kernel in KERNELS for name in OPERANDS]
WHOLE += [(FORWARD, "EVERYTHING_COPIED", None), (FORWARD, "WRONG_SHUFFLE", None), (DQ, "WRONG_SHUFFLE", None)]
# How many of each there are, and which no test can tell of, because another stands beside, nobody waits for the last
# arrivals, or it is only a matter of speed whose turn it is.
SINGLE = {
    FORWARD: {
        "NO_PRODUCT_FENCE": (4, [2]),
        "NO_PRODUCT_COMMIT": (4, []),
        "WEAK_PRODUCT_WAIT": (3, []),
        "WEAKER_PRODUCT_WAIT": (1, []),
        "NO_ARRIVAL": (4, [3]),
        "NOTHING_EXPECTED": (3, []),
        "NO_PHASE_WAIT": (9, [1]),
        "WRONG_PHASE": (9, []),
        "NO_PROXY_FENCE": (3, []),
        "NO_NAMED_BARRIER": (10, [0, 1, 5]),
        "NO_TURN": (3, []),
        "NO_BARRIER": (1, []),
        "NO_WARP_BARRIER": (5, [3]),
    },
    DQ: {
        "NO_PRODUCT_FENCE": (2, []),
        "NO_PRODUCT_COMMIT": (4, [2]),
        "WEAK_PRODUCT_WAIT": (2, []),
        "WEAKER_PRODUCT_WAIT": (1, []),
        "NO_ARRIVAL": (1, []),
        "NOTHING_EXPECTED": (1, []),
        "NO_PHASE_WAIT": (2, []),
        "WRONG_PHASE": (2, []),
        "NO_PROXY_FENCE": (2, []),
        "NO_NAMED_BARRIER": (5, []),
        "NO_BARRIER": (1, []),
        "NO_WARP_BARRIER": (2, []),
    },
    DKDV: {
        "NO_PRODUCT_FENCE": (2, []),
        "NO_PRODUCT_COMMIT": (4, [2]),
        "WEAK_PRODUCT_WAIT": (2, []),
        "WEAKER_PRODUCT_WAIT": (1, []),
        "NO_ARRIVAL": (2, []),
        "NOTHING_EXPECTED": (2, []),
        "NO_PHASE_WAIT": (4, []),
        "WRONG_PHASE": (4, []),
        "NO_PROXY_FENCE": (2, []),
        "NO_NAMED_BARRIER": (7, [2]),
        "NO_BARRIER": (1, []),
        "NO_WARP_BARRIER": (4, []),
    },
}
ONE_BY_ONE = [
    (kernel, name, n)
    for kernel, mistakes in SINGLE.items()
    for name, (count, harmless) in mistakes.items()
    for n in range(count)
    if n not in harmless
]


def hidden(inputs, **rows):
    """Makes NaN of some rows of some arrays."""
    for x, name in zip(inputs, ("query", "key", "value", "d_out")):
        x[:, rows.get(name, [])] = np.nan
    return inputs


@cache
def problems(kernel):
    """Inputs, options and right results: of keys, or for dkdv rows, that go round a ring more than once. Some tiles are
    seen by all and some in part, at both ends there is NaN that nobody sees; or all see all.
    """

    def inputs(rows, keys):
        return make_inputs("bfloat16", 1, rows, keys, 1, 1, 64)

    if kernel == DKDV:
        options = {"window": (300, 0), "query_seq_lengths": np.array([418])}
        cases = [(hidden(inputs(421, 130), **{name: [418, 420]}), options) for name in ("query", "d_out")]
        cases.append((inputs(384, 128), {}))
    else:
        options = {
            "window": (270, 0),
            "causal_alignment": "bottom_right",
            "key_value_seq_lengths": np.array([420]),
        }
        cases = [(hidden(inputs(130, 421), key=[0, 19, 420], value=[0, 19, 420]), options), (inputs(128, 384), {})]
    return [(arrays, options, specification(*arrays, **options)) for arrays, options in cases]


def attend(kernel, mutant=None):
    return launching.attend(kernel, mutant, problems(kernel), TOLERANCES["bfloat16"], [Races(), Proxies()])


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_without_mistakes_pass(kernel):
    assert kernel in {launch.kernel for launch in attend(kernel).launches}


@pytest.mark.parametrize("kernel", KERNELS)
def test_how_many_there_are(kernel):
    counts = {name: Mutant(kernel, *getattr(mutants, name)).count() for name in SINGLE[kernel]}
    assert counts == {name: count for name, (count, _) in SINGLE[kernel].items()}


@pytest.mark.wide(8)
@pytest.mark.parametrize("kernel, name, nth", WHOLE + ONE_BY_ONE, ids=lambda x: str(x).removeprefix("attn_ops_hopper_"))
def test_mistakes_are_found(kernel, name, nth):
    mutant = Mutant(kernel, *getattr(mutants, name), nth)
    mutant.program()  # is one
    with pytest.raises((AssertionError, CudaError)):
        attend(kernel, mutant)
