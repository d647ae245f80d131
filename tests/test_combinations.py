"""Random combinations of all options in every implementation, with all gradients, against the specification."""

import pytest

from cases import assert_close
from implementations import Cuda, specification
from option_combinations import draw

EACH = 40  # combinations for an implementation; slow ones take a share (`Implementation.thin`)


def test_combinations(implementation):
    if isinstance(implementation, Cuda):
        pytest.skip("the CUDA kernels leave float64 to the composite")
    for number in implementation.thin(range(EACH))[: 3 if implementation.is_slow else EACH]:
        case = draw(number)
        arguments = (*case.inputs.values(), case.d_out, case.d_lse)
        result = implementation(*arguments, **case.options)
        assert_close(result, specification(*arguments, **case.options), 1e-10, f"{case.name} {case.options}")
