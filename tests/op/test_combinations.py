"""Random combinations of all options in every implementation, with all gradients, against the specification."""

from cases import TOLERANCES, assert_close
from implementations import Cuda, specification
from option_combinations import draw

EACH = 40  # combinations for an implementation; slow ones take a share (`Implementation.thin`)


def test_combinations(implementation):
    for number in implementation.thin(range(EACH))[: 3 if implementation.is_slow else EACH]:
        case = draw(number)
        arguments, options, tolerance = (*case.inputs.values(), case.d_out, case.d_lse), case.options, 1e-10
        if isinstance(implementation, Cuda):  # which leaves float64 to the composite
            arguments, tolerance = [x.astype("float32") for x in arguments], TOLERANCES["float32"]
        result = implementation(*arguments, **options)
        assert_close(result, specification(*arguments, **options), tolerance, f"{case.name} {options}")
