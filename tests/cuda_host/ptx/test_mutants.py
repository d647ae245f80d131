"""The tests of PTX can fail: mistakes in it are found, as a wrong result, an error or a race."""

from functools import cache

import pytest
from attn_ops.kernels.cuda import CudaError
from cases import TOLERANCES, make_inputs
from implementations import specification

from cuda_host.ptx import launching, mutants
from cuda_host.ptx.mutants import Mutant
from cuda_host.ptx.publication import Publication
from cuda_host.ptx.races import Races

FORWARD, DQ, DKDV = (f"attn_ops_{role}_bf16_64_plain" for role in ("forward", "dq", "dkdv"))
KEPT = "attn_ops_dkdv_bf16_128_plain"  # its warps keep their operands
DECODE, FLOAT32 = "attn_ops_decode_bf16_64", "attn_ops_forward_f32_64_plain"

OPERANDS = ("SWAPPED_A", "SWAPPED_B", "SWAPPED_SUMS", "SWAPPED_PAIR")
OPERANDS += ("NO_TRANSPOSE", "TRANSPOSED", "EVERYTHING_COPIED", "WRONG_SHUFFLE")
WHOLE = [(kernel, name, None) for kernel in (FORWARD, DQ, DKDV, KEPT, DECODE, FLOAT32) for name in OPERANDS]
for missing in ((DKDV, "WRONG_SHUFFLE"), (KEPT, "WRONG_SHUFFLE"), (FLOAT32, "SWAPPED_PAIR"), (FLOAT32, "NO_TRANSPOSE")):
    WHOLE.remove((*missing, None))
WHOLE += [(DQ, name, None) for name in ("NO_ROUNDED_SUMS", "WRONG_SHARE")]
# Which of the instructions are needed. Of those that are left out no test can tell: another barrier stands between, or
# nothing is under way.
SINGLE = [(FORWARD, "NO_BARRIER", n) for n in range(5)]
SINGLE += [(DQ, "NO_BARRIER", n) for n in range(7)]
SINGLE += [(DKDV, "NO_BARRIER", n) for n in range(8)]
SINGLE += [(KEPT, "NO_BARRIER", n) for n in range(10)]
SINGLE += [(DECODE, "NO_BARRIER", n) for n in range(7)]
SINGLE += [(DECODE, "NO_WARP_BARRIER", n) for n in range(7) if n != 2]
SINGLE += [(DECODE, "NO_FENCE", n) for n in range(2)]
SINGLE += [(FORWARD, "WEAK_WAIT", n) for n in range(2)] + [(kernel, "WEAKER_WAIT", 0) for kernel in (DQ, DKDV, KEPT)]
SINGLE += [(kernel, "WEAK_WAIT", 0) for kernel in (DQ, KEPT)]
SINGLE += [(DECODE, "WEAK_WAIT", 1), (FORWARD, "NO_COMMIT", 0), (DQ, "NO_COMMIT", 1), (DECODE, "NO_COMMIT", 2)]


@cache
def problems(kernel):
    """Inputs, options and right results for a kernel."""
    dtype = "float32" if kernel == FLOAT32 else "bfloat16"
    shape = (40 if kernel == DECODE else 132, 128 if kernel == KEPT else 64)
    problems = [(launching.nonfinite_inputs(dtype, *shape), {"is_causal": True})]
    if kernel == DECODE:
        # Parts of the keys, which several threads add; one step of a warp, whose table lies where its values were.
        problems.insert(0, (make_inputs(dtype, 1, 2, 300, 1, 1, 64), {}))
    if kernel == DQ:
        # A channel that all keys have in common, and so cancels, as d_lse is zero.
        query, key, value, d_out, _ = make_inputs(dtype, 1, 70, 132, 1, 1, 64)
        key[..., 3] = -30000
        problems.append(((query, key, value, d_out), {}))
    return [(inputs, options, specification(*inputs, **options)) for inputs, options in problems], dtype


@pytest.fixture
def attend(on_device):
    launching.start(on_device)

    def attend(kernel, mutant):
        cases, dtype = problems(kernel)
        observers = [Races(), Publication()]
        return launching.attend(kernel, mutant, cases, TOLERANCES[dtype], observers, kernel == DECODE)

    return attend


@pytest.mark.parametrize("kernel", [FORWARD, DQ, DKDV, KEPT, DECODE, FLOAT32])
def test_kernels_without_mistakes_pass(attend, kernel):
    assert kernel in {launch.kernel for launch in attend(kernel, None).launches}


@pytest.mark.wide(5)
@pytest.mark.parametrize("kernel, name, nth", WHOLE + SINGLE, ids=lambda x: str(x).removeprefix("attn_ops_"))
def test_mistakes_are_found(attend, kernel, name, nth):
    mutant = Mutant(kernel, *getattr(mutants, name), nth)
    mutant.program()  # is one
    with pytest.raises((AssertionError, CudaError)):
        attend(kernel, mutant)
