"""What a wheel holds: setup.py with a stand-in for CMake, and compat/check_wheel.py on a wheel of the installed libraries.
Building a real one takes minutes."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from attn_ops import kernels

from compat.check_wheel import MAX_BYTES, modules, problems

LIBRARIES = [Path(kernels.library_path()), Path(kernels.core().__file__)]


ROOT = Path(__file__).resolve().parents[2]


def wheel(directory, platform="manylinux_2_28_x86_64", libraries=LIBRARIES, filling=0, more=(), fewer=()):
    path = directory / f"attn_ops-0.1.0-cp311-cp311-{platform}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for library in libraries:
            archive.write(library, f"attn_ops/{library.name}")
        for module in (modules() | set(more)) - set(fewer):
            archive.writestr(module, "")
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
        ({"more": ["attn_ops/old.py"]}, "it has modules that are not in this checkout: ['attn_ops/old.py']"),
        ({"fewer": ["attn_ops/namespaces.py"]}, "it lacks modules of this checkout: ['attn_ops/namespaces.py']"),
    ],
    ids=("platform", "size", "libraries", "a module too many", "a module too few"),
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


def test_whether_the_cuda_kernels_must_be_there(tmp_path):
    """A library of that name is there, or is not; what is in it, the other rules say."""
    cuda = tmp_path / "libattn_ops_cuda.so"
    shutil.copyfile(LIBRARIES[0], cuda)
    lacks, has = "it lacks the CUDA kernels", "it has CUDA kernels"
    without = wheel(tmp_path, libraries=[])
    assert [lacks in problems(without, required) for required in (None, False, True)] == [False, False, True]
    fat = wheel(tmp_path, libraries=[cuda])
    assert [has in problems(fat, required) for required in (True, False)] == [False, True]


CMAKE = f"""#!{sys.executable}
import pathlib, sys
if "--install" in sys.argv:
    package = pathlib.Path(sys.argv[sys.argv.index("--prefix") + 1])
    package.mkdir(parents=True, exist_ok=True)
    for name in ("libattn_ops.so", "_core{sysconfig.get_config_var("EXT_SUFFIX")}"):
        (package / name).write_text("new")
"""


@pytest.fixture
def project(tmp_path):
    """setup.py with one module, and a cmake that only installs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").write_text(CMAKE)
    (tmp_path / "bin" / "cmake").chmod(0o755)
    shutil.copyfile(ROOT / "setup.py", tmp_path / "setup.py")
    project = "[project]\nname = 'attn_ops'\nversion = '0.1'\n[tool.setuptools]\npackages = ['attn_ops']\n"
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "attn_ops").mkdir()
    (tmp_path / "attn_ops" / "__init__.py").touch()
    return tmp_path


def setup(project, *arguments):
    environment = {**os.environ, "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=project, env=environment, check=True)


def test_a_build_takes_nothing_of_an_earlier_one(project):
    pytest.importorskip("setuptools")
    setup(project, "build")
    [package] = project.glob("build/lib*/attn_ops")
    wanted = sorted(path.name for path in package.iterdir())
    assert len(wanted) == 3
    for old in ("libattn_ops_cuda.so", "removed_last_month.py", "_core.so", "layers/old.py"):
        (package / old).parent.mkdir(exist_ok=True)
        (package / old).write_text("old")
    setup(project, "build")
    assert sorted(path.name for path in package.iterdir()) == wanted
    assert (package / "libattn_ops.so").read_text() == "new"


def test_a_build_in_place_leaves_no_library_of_an_earlier_one(project):
    pytest.importorskip("setuptools")
    package = project / "attn_ops"
    for name in ("libattn_ops_cuda.so", "libattn_ops.so", "_core.another-python.so"):
        (package / name).write_text("old")
    setup(project, "build_ext", "--inplace")
    left = {path.name: path.read_text() for path in package.glob("*.so")}
    core = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert left == {"libattn_ops.so": "new", core: "new", "_core.another-python.so": "old"}


def test_an_sdist_has_what_its_readme_points_to():
    filelist = pytest.importorskip("setuptools._distutils.filelist")
    before = Path.cwd()
    files = filelist.FileList()
    try:
        os.chdir(ROOT)
        for line in (ROOT / "MANIFEST.in").read_text().splitlines():
            files.process_template_line(line)
    finally:
        os.chdir(before)
    taken = {Path(path).parts[0] for path in files.files}
    assert {"dev", "CMakeLists.txt", "csrc", "cmake", "tests", "examples"} <= taken
    linked = re.findall(r"\]\(([\w.]+)", (ROOT / "README.md").read_text())
    assert {"docs", "CHANGELOG.md", "CITATION.cff"} <= set(linked) <= taken
