"""Kernels that are interpreted, for the tests of this folder."""

import pytest

from cuda_host.ptx import launching


@pytest.fixture
def interpreter(on_device):
    """Interprets launches, with the given options of an Interpreter, until the test ends."""
    launching.start(on_device)
    entered = []

    def enter(**options):
        entered.append(launching.interpreter(**options))
        return entered[-1].__enter__()

    yield enter
    for one in entered:
        one.__exit__()


@pytest.fixture(scope="module")
def hopper(request, tmp_path_factory):
    """Calls find a card of compute capability 9.0, in all tests of a module."""
    from cuda_run import on_device

    launching.start(on_device(request.config))
    with launching.as_hopper(tmp_path_factory.mktemp("hopper")):
        yield
