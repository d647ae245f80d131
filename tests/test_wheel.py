"""compat/check_wheel.py, on a wheel of the installed libraries: building one takes minutes."""

import zipfile
from pathlib import Path

import pytest
from attn_ops import _native

from compat.check_wheel import MAX_BYTES, problems

LIBRARIES = [Path(_native.__file__).with_name("libattn_ops.so"), Path(_native.core().__file__)]


def wheel(directory, platform="manylinux_2_28_x86_64", libraries=LIBRARIES, filling=0):
    path = directory / f"attn_ops-0.1.0-cp311-cp311-{platform}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for library in libraries:
            archive.write(library, f"attn_ops/{library.name}")
        archive.writestr("filling", bytes(filling), zipfile.ZIP_STORED)
    return path


def test_a_good_wheel_passes(tmp_path):
    assert problems(wheel(tmp_path)) == []


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"platform": "linux_x86_64"}, "its platform is linux_x86_64, not manylinux_2_28"),
        ({"filling": MAX_BYTES}, f"bytes, not less than {MAX_BYTES}"),
        ({"libraries": LIBRARIES[:1]}, "it has the libraries ['libattn_ops.so'], not the operators and the Python"),
    ],
    ids=("platform", "size", "libraries"),
)
def test_a_bad_wheel_does_not(tmp_path, options, problem):
    [found] = problems(wheel(tmp_path, **options))
    assert problem in found


def test_a_library_that_breaks_the_rules_is_named(tmp_path):
    swapped = tmp_path / "libattn_ops.so"
    swapped.symlink_to(LIBRARIES[1])
    found = problems(wheel(tmp_path, libraries=[swapped, LIBRARIES[1]]))
    assert "libattn_ops.so, exports_broken: PyInit__core" in found
    assert "libattn_ops.so, libraries_broken: libtensorflow_framework.so.2" in found
    assert any(problem.startswith("libattn_ops.so, tensorflow_broken: ('TF_") for problem in found)
