"""`attn_ops._core.probe`: the limits of the machine. What it measures is the machine's affair; that it measures, ours."""

import math

import pytest
from attn_ops import kernels

core = kernels.core()
MIB = 1 << 20
SHORT = {"seconds": 0.001, "bytes": 4 * MIB}


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("what", ("fma_float32", "fma_float64", "exp_float32", "exp_float64", "read"))
def test_every_rate_is_positive(what, threads, isa):
    rate = core.probe(what, isa=isa, num_threads=threads, **SHORT)
    assert math.isfinite(rate) and rate > 0


def test_pages_of_either_size_can_be_asked_for():
    assert all(core.probe("read", huge_pages=huge, num_threads=1, **SHORT) > 0 for huge in (False, True))


@pytest.mark.parametrize(
    "error, message, what, options",
    [
        (ValueError, r"what \('flops'\) must be one of exp_float32, .*, read", "flops", {}),
        (ValueError, r"what \(3\) must be one of", 3, {}),
        (ValueError, r"isa \('sse9'\) must be one of those usable here: .*generic", "read", {"isa": "sse9"}),
        (ValueError, r"num_threads \(-1\) must be from 0 \(all CPUs\) to 1024", "read", {"num_threads": -1}),
        (ValueError, r"seconds \(0\.0+\) must be above 0 and at most 60", "fma_float32", {"seconds": 0}),
        (ValueError, r"seconds \(nan\) must be above 0", "fma_float32", {"seconds": math.nan}),
        (ValueError, r"seconds \(61\.0+\) must be above 0", "fma_float32", {"seconds": 61}),
        (TypeError, r"seconds \('long'\) must be a number", "fma_float32", {"seconds": "long"}),
        (ValueError, r"bytes \(4096\) must be 0 .* or at least 1048576", "read", {"bytes": 4096}),
        (ValueError, r"bytes \(-1\) must be 0", "read", {"bytes": -1}),
        (TypeError, r"unknown keyword 'byte'", "read", {"byte": MIB}),
    ],
)
def test_bad_arguments(error, message, what, options):
    with pytest.raises(error, match=r"attn_ops\._core\.probe: " + message):
        core.probe(what, **options)


def test_more_memory_than_there_is():
    with pytest.raises(MemoryError):
        core.probe("read", bytes=1 << 62)
