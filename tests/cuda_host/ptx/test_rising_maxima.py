"""Forward multiplies what it has summed up when a row's maximum has risen by more than a slack, and only then."""

from functools import cache

import numpy as np
import pytest
from attn_ops.kernels.cuda import CudaError
from cases import TOLERANCES, assert_close, make_inputs
from implementations import Cuda, specification

from cuda_host.ptx import compiled, launching, mutants
from cuda_host.ptx.mutants import Mutant

NAMES = ("NEVER_RISES", "WRONG_WAY", "WRONG_SLACK", "SWAPPED_RISE", "SWAPPED_FINISH", "UNSCALED_SUM")
KINDS = {"float16": "attn_ops_forward_f16_64_plain", "bfloat16": "attn_ops_forward_bf16_64_plain"}
KEYS = 192


def rising_inputs(dtype, rises, values=1.0):
    """Scores of row i are rises[i % len(rises)] times the number of the key, in natural units."""
    query, key, value, d_out, _ = make_inputs(dtype, 1, 96, KEYS, 1, 1, 64)
    query[:], key[:] = 0, 0
    query[..., 0] = np.resize(rises, 96)[None, :, None]
    key[..., 0] = np.arange(KEYS)[None, :, None]
    return query, key, (value * value.dtype.type(values)), d_out


@cache
def problems(dtype):
    """Inputs, options and right results: rows of a warp that rise otherwise; values that leave no room above."""
    problems = [(rising_inputs(dtype, [0.04, 3, 0, -0.1]), {"scale": 1.0, "is_causal": causal}) for causal in (0, 1)]
    if dtype == "bfloat16":
        problems.append((rising_inputs(dtype, [0.04], 3e35), {"scale": 1.0}))
    return [(inputs, options, specification(*inputs, **options)) for inputs, options in problems]


@pytest.fixture
def judge(on_device):
    """Raises where a mutant (None: the kernel itself) gives wrong results, or works more than it should."""
    launching.start(on_device)

    def judge(dtype, mutant):
        def program(name):
            return mutant.program() if mutant is not None and name == KINDS[dtype] else compiled.program(name)

        with launching.interpreter(program=program) as interpreter:
            for inputs, options, expected in problems(dtype):
                found = Cuda(False, False)(*inputs, **options)
                assert_close(found, expected, TOLERANCES[dtype], KINDS[dtype])
                np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-6, atol=1e-6)
            executed = {}
            for rise in (0.005, 0.02, 1.0):  # by 3.8 in all, where 5.5 may pass
                Cuda(False, False)(*rising_inputs(dtype, [rise]), scale=1.0)
                [executed[rise]] = (x.executed for x in interpreter.launches[-3:] if x.kernel == KINDS[dtype])
            assert executed[0.005] == executed[0.02] < executed[1.0], executed

    return judge


@pytest.mark.parametrize("dtype", KINDS)
def test_results_are_multiplied_when_they_must_be(judge, dtype):
    judge(dtype, None)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_found(judge, dtype, name):
    mutant = Mutant(KINDS[dtype], *getattr(mutants, name))
    assert mutant.count() > 0
    with pytest.raises((AssertionError, CudaError)):
        judge(dtype, mutant)
