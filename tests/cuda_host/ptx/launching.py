"""Calls of the shipped library whose kernels are interpreted."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import cuda_run
import pytest
from attn_ops.kernels import cuda
from cases import assert_close, make_inputs
from cuda_arrays import driver
from implementations import Cuda

from . import compiled
from .device import Interpreter


def start(on_device):
    """Skips where there is nothing to interpret; else the stand-in is the driver of this process."""
    reason = "for the CPU alone" if on_device else compiled.missing_reason() or cuda_run.skip_reason(False)
    if reason:
        pytest.skip(reason)
    cuda_run.start(False)


@contextmanager
def as_hopper(folder):
    """Calls go to a library that finds a card of compute capability 9.0: one of its own, as what is known of a card is
    kept. Skips where none was built with Hopper's kernels.
    """
    library = cuda_run.library_without_kernels() or cuda_run.library()
    if b"sm_90a_hopper" not in library.read_bytes():
        pytest.skip(f"{library.name} is built for other cards, and none beside it without kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTN_OPS_STANDIN_CAPABILITY", "9.0")
        patch.setattr(cuda, "LIBRARY", Path(shutil.copy(library, folder / library.name)))
        cuda._library.cache_clear()
        yield
    cuda._library.cache_clear()


def interpreter(**options) -> Interpreter:
    return Interpreter(driver(), **options)


def attend(kernel, mutant, cases, tolerance, observers, decodes=False) -> Interpreter:
    """Runs all `cases` (inputs, options, right results) with a mutant in the place of a kernel, or without one (None).

    Raises:
        AssertionError, CudaError: the kernel is not right.
    """

    def program(name):
        return mutant.program() if mutant is not None and name == kernel else compiled.program(name)

    with interpreter(program=program, observers=observers, observed=kernel) as entered:
        for inputs, options, expected in cases:
            assert_close(Cuda(False, decodes)(*inputs, **options), expected, tolerance, kernel)
    return entered


def nonfinite_inputs(dtype, seqlen, head_dim=64):
    """For a causal mask: the last key, which no row sees, and the first query, which sees only the first key, are
    NaN.
    """
    query, key, value, d_out, d_lse = make_inputs(dtype, 1, seqlen - 1, seqlen, 1, 1, head_dim)
    key[:, -1], value[:, -1], query[:, 0], d_out[:, 0] = (float("nan"),) * 4
    return query, key, value, d_out, d_lse
