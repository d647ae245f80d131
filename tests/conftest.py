"""Fixtures of the whole suite."""

import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cuda_run
import pytest
import shares

from device_runs import missing_packages
from implementations import Cuda, all_implementations
from optional_packages import keras_hub  # noqa: F401  a fixture

IMPLEMENTATIONS = []


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run all cases of the tests marked `wide`, not a share of them")
    parser.addoption("--models", choices=["share", "all"], default="share", help="all: all cases of tests/models")


def pytest_configure(config):
    IMPLEMENTATIONS.extend(all_implementations(cuda_run.on_device(config)))


def pytest_report_header(config):
    lines = ["implementations: " + ", ".join(map(repr, IMPLEMENTATIONS))]
    if cuda_run.on_device(config):
        tests = config.rootpath / "tests"
        needed = {path.relative_to(tests): missing_packages(path) for path in sorted(tests.rglob("test_*.py"))}
        for name, missing in needed.items():
            lines += [f"left out: {name}, for want of {', '.join(sorted(missing))}"] if missing else []
    return lines


def pytest_ignore_collect(collection_path, config):
    """See device_runs.py; of a folder its conftest.py tells. (None: as pytest thinks.)"""
    module = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    is_module = module.suffix == ".py" and module.is_file()
    return True if is_module and cuda_run.on_device(config) and missing_packages(module) else None


def pytest_generate_tests(metafunc):
    """`implementation`: each implementation of attention, in turn; `implementation, dtype`: each in its dtypes."""
    if "implementation" in metafunc.fixturenames:
        if "dtype" in metafunc.fixturenames:
            pairs = [(i, dtype) for i in IMPLEMENTATIONS for dtype in i.dtypes]
            parameters = [pytest.param(*pair, marks=marks(pair[0]), id=f"{pair[0]}-{pair[1]}") for pair in pairs]
            metafunc.parametrize("implementation, dtype", parameters)
        else:
            parameters = [pytest.param(i, marks=marks(i), id=repr(i)) for i in IMPLEMENTATIONS]
            metafunc.parametrize("implementation", parameters)


def marks(implementation):
    """Of the tests of the CUDA kernels: `gpu` where they are for a device, and why they cannot run."""
    if not isinstance(implementation, Cuda):
        return ()
    reason = cuda_run.skip_reason(implementation.on_device)
    gpu = [pytest.mark.gpu] * implementation.on_device
    return [*gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.fixture
def cuda(on_device):
    """The driver of this run: of the device, or the stand-in."""
    reason = cuda_run.skip_reason(on_device)
    if reason is not None:
        pytest.skip(reason)
    cuda_run.start(on_device)


@pytest.fixture
def on_device(request):
    """Whether this run is for the device."""
    return cuda_run.on_device(request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before `-m` chooses: with a device, what takes the fixture `cuda` is `gpu` too."""
    for item in items:
        if cuda_run.on_device(config) and "cuda" in item.fixturenames:
            item.add_marker("gpu")
    if not config.getoption("whole"):
        whole = [config.rootpath / "tests" / "models"] if config.getoption("models") == "all" else []
        shares.leave_out(config, items, whole)


@pytest.fixture(autouse=True)
def _the_same_weights_in_each_run():
    """Initialisers and dropout without a seed take theirs from Python's numbers (`keras.src.random.make_default_seed`)."""
    random.seed(0)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)
