"""What the compiled files ask of the machine they run on, and what they show to the process they are loaded into.

Object files are read where the build left them (build/, of pip or of CMake), libraries where they were installed.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attn_ops import kernels
from elftools.elf.elffile import ELFFile

from wheel_rules import LIBRARY_RULES, cuda_broken, exports_broken, libraries_broken, symbols, tensorflow_broken

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(kernels.__file__).parents[1]
LIBRARY = PACKAGE / "libattn_ops.so"
CORE = Path(kernels.core().__file__)


def machine(path):
    with open(path, "rb") as file:
        return ELFFile(file)["e_machine"]


# Builds below build/ that are not what users get: with planted defects, emulated, with sanitizers (CMakePresets.json).
APART = {"mutation", "avx512", "asan-ubsan", "tsan", "fuzz"}


def newest_object(isa):
    objects = ROOT.glob(f"build/**/attn_ops_{isa}.dir/csrc/cpu/kernels.cc.o")
    objects = [path for path in objects if path.relative_to(ROOT / "build").parts[0] not in APART]
    objects = [path for path in objects if machine(path) == machine(CORE)]  # not what tests/aarch64 built
    return max(objects, key=lambda path: path.stat().st_mtime, default=None)


def isa_list():
    """Of csrc/cpu/isas.inc: the names, best first, that are compiled for this processor, and what they need of it."""
    text = (ROOT / "csrc" / "cpu" / "isas.inc").read_text()
    entries = re.findall(r"^ISA\((\w+), (\w+),\s+([^,]*),", text, re.MULTILINE)
    here = [(name, needs) for name, processor, needs in entries if processor in (platform.machine(), "any")]
    return {name: set(re.findall(r"(?:NEEDS|ASKS)\((\w+)\)", needs)) for name, needs in here}


def test_isas_are_those_of_the_list_that_the_processor_has():
    has = {feature for feature, there in kernels.core().cpu_features().items() if there}
    assert set(kernels.core().cpu_features()) == set().union(*isa_list().values())
    assert kernels.core().isas() == [name for name, needs in isa_list().items() if needs <= has]


@pytest.mark.parametrize("isa", isa_list())
def test_no_code_of_an_isa_leaks(isa):
    """A function that several objects define is linked once, from whichever comes first. Were that one compiled for
    AVX-512, an older machine would run it and die. So all that an object for one ISA shows must carry its name."""
    path = newest_object(isa)
    assert path is not None, "no objects in build/: build in this checkout (./dev setup, or pip install -e .)"
    shown = [name for name, _, defined in symbols(path, ".symtab") if defined]
    assert [name for name in shown if isa not in name] == []
    assert any(name.endswith(f"kernels_{isa}E") for name in shown)


@pytest.mark.parametrize("broken", LIBRARY_RULES, ids=lambda rule: rule.__name__.removesuffix("_broken"))
@pytest.mark.parametrize("path", [LIBRARY, CORE], ids=("operators", "core"))
def test_library(path, broken):
    assert broken(path) == set()


BREAKS = """
void TF_NotListed(void); void cuInit(void);
void shown(void) { TF_NotListed(); cuInit(); }
"""


@pytest.mark.parametrize("name", [LIBRARY.name, CORE.name])
def test_the_rules_see_a_library_that_breaks_them(tmp_path, name):
    """One that exports, needs and looks for what ours must not, under the names of ours."""
    path = tmp_path / name
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-x", "c", "-", "-Wl,-rpath,/nowhere", "-o", path]
    subprocess.run(command, input=BREAKS, text=True, check=True)
    assert "shown" in exports_broken(path)
    assert ("TF_NotListed", "STB_GLOBAL") in tensorflow_broken(path)
    assert cuda_broken(path) == {"cuInit"}
    assert libraries_broken(path) & {"DT_RPATH", "DT_RUNPATH"}


def test_one_version_everywhere():
    built = re.search(r"project\(attn_ops VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    assert built == kernels.core().__version__ == __import__("attn_ops").__version__


def test_a_build_with_other_headers_says_what_to_do(tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"]
    # cmake and ninja of the environment that runs the tests, which need not be the activated one
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run = subprocess.run(
        [*command, "-DATTN_OPS_TF_INCLUDE_DIR=/none"], env=environment, capture_output=True, text=True, timeout=120
    )
    message = " ".join(run.stderr.split())
    assert run.returncode != 0
    assert "attn_ops needs TensorFlow's C headers (tensorflow/c/kernels.h)" in message
    assert "looked for them in '/none'" in message
    assert "Leave ATTN_OPS_TF_INCLUDE_DIR empty to take those of this checkout" in message
    assert "-DATTN_OPS_TF_INCLUDE_DIR=<directory>" in message
