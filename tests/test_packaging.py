"""What the compiled files ask of the machine they run on, and what they show to the process they are loaded into.

Object files are read where the build left them (build/, of pip or of CMake), libraries where they were installed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attn_ops import _native
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_native.__file__).parent
LIBRARY = PACKAGE / "libattn_ops.so"
CORE = Path(_native.core().__file__)
INTRA_OP_POOL = "_ZNK10tensorflow15OpKernelContext12eigen_deviceIN5Eigen16ThreadPoolDeviceEEERKT_v"
# What linkers and start-up code always leave weak.
BOILERPLATE = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
# The floor of manylinux_2_28.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def symbols(path, section):
    """(name, binding, is_defined) of a symbol table, local ones left out."""
    with open(path, "rb") as file:
        table = ELFFile(file).get_section_by_name(section)
        assert isinstance(table, SymbolTableSection), f"{path} has no {section}"
        entries = [(s.name, s["st_info"]["bind"], s["st_shndx"] != "SHN_UNDEF") for s in table.iter_symbols()]
    return [entry for entry in entries if entry[0] and entry[1] != "STB_LOCAL"]


def machine(path):
    with open(path, "rb") as file:
        return ELFFile(file)["e_machine"]


def newest_object(isa):
    objects = ROOT.glob(f"build/**/attn_ops_{isa}.dir/csrc/cpu/kernels.cc.o")
    objects = [path for path in objects if machine(path) == machine(CORE)]  # not what tests/aarch64 built
    return max(objects, key=lambda path: path.stat().st_mtime, default=None)


@pytest.mark.parametrize("isa", _native.core().isas())
def test_no_code_of_an_isa_leaks(isa):
    """A function that several objects define is linked once, from whichever comes first. Were that one compiled for
    AVX-512, an older machine would run it and die. So all that an object for one ISA shows must carry its name."""
    path = newest_object(isa)
    assert path is not None, "no objects in build/: build in this checkout (./dev setup, or pip install -e .)"
    shown = [name for name, _, defined in symbols(path, ".symtab") if defined]
    assert [name for name in shown if isa not in name] == []
    assert any(name.endswith(f"kernels_{isa}E") for name in shown)


@pytest.mark.parametrize("path, wanted", [(LIBRARY, set()), (CORE, {"PyInit__core"})], ids=("operators", "core"))
def test_exports(path, wanted):
    assert {name for name, _, defined in symbols(path, ".dynsym") if defined} == wanted


def test_the_operators_need_the_c_api_and_nothing_else_of_tensorflow():
    needed = {(name, binding) for name, binding, defined in symbols(LIBRARY, ".dynsym") if not defined}
    of_tensorflow = {name for name, _ in needed if re.search(r"TF_|tensorflow|tsl|absl|Eigen", name)}
    listed = set((ROOT / "csrc/bindings/tf_capi_symbols.txt").read_text().split())
    assert of_tensorflow == listed | {INTRA_OP_POOL}
    assert {name for name, binding in needed if binding == "STB_WEAK"} - BOILERPLATE == {INTRA_OP_POOL}
    assert not [name for name, _ in needed if re.match(r"_?Py|cuda|cu[A-Z]", name)]


@pytest.mark.parametrize(
    "path, wanted", [(LIBRARY, {"libtensorflow_framework.so.2"}), (CORE, set())], ids=("operators", "core")
)
def test_needed_libraries(path, wanted):
    with open(path, "rb") as file:
        tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    system = r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|ld-linux[-\w]*)\.so"
    assert {name for name in needed if not re.match(system, name)} == wanted
    assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


@pytest.mark.parametrize("path", [LIBRARY, CORE], ids=("operators", "core"))
def test_runs_on_systems_as_old_as_manylinux_2_28(path):
    with open(path, "rb") as file:
        versions = [
            version.name
            for section in ELFFile(file).iter_sections()
            if isinstance(section, GNUVerNeedSection)
            for _, entries in section.iter_versions()
            for version in entries
        ]
    assert versions
    for version in versions:
        family, _, number = version.rpartition("_")
        assert tuple(map(int, number.split("."))) <= NEWEST[family], version


def test_one_version_everywhere():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    built = re.search(r"project\(attn_ops VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    assert declared == built == _native.core().__version__ == __import__("attn_ops").__version__


def test_a_build_without_tensorflows_headers_says_what_to_do(tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"]
    # cmake and ninja of the environment that runs the tests, which need not be the activated one
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run = subprocess.run(
        [*command, "-DATTN_OPS_TF_INCLUDE_DIR=/none"], env=environment, capture_output=True, text=True, timeout=120
    )
    message = " ".join(run.stderr.split())
    assert run.returncode != 0
    assert "attn_ops needs TensorFlow's C headers (tensorflow/c/kernels.h) to build" in message
    assert "looked for them in '/none'" in message
    assert "Install tensorflow-cpu 2.20" in message and "-DATTN_OPS_TF_INCLUDE_DIR=<directory>" in message
