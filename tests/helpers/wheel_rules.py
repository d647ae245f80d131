"""What the libraries of a wheel may ask of the machine they run on, and may show to the process they are loaded into.

One set of rules, for the installed libraries (package/test_compiled_files.py) and for a wheel that was built
(compat/check_wheel.py). The functions take a library's path; those that end in `_broken` return what breaks their rule.
"""

import re
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
C_API = SOURCES / "bindings/tf_capi_symbols.txt"
CUDA_INTERFACE = SOURCES / "cuda/library.h"
# Beyond the C API. Weak: without the pool the operators make threads of their own (eigen_pool.h), and without the stream
# they do not run on GPUs (eigen_stream.h).
INTRA_OP_POOL = "_ZNK10tensorflow15OpKernelContext12eigen_deviceIN5Eigen16ThreadPoolDeviceEEERKT_v"
CUDA_STREAM = "_ZNK10tensorflow15OpKernelContext12eigen_deviceIN5Eigen9GpuDeviceEEERKT_v"
# The floor of manylinux_2_28.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SYSTEM = r"(libc|libm|libdl|libstdc\+\+|libgcc_s|libpthread|ld-linux[-\w]*)\.so"


def symbols(path, section):
    """(name, binding, is_defined) of a symbol table, local ones left out."""
    with open(path, "rb") as file:
        table = ELFFile(file).get_section_by_name(section)
        assert isinstance(table, SymbolTableSection), f"{path} has no {section}"
        entries = [(s.name, s["st_info"]["bind"], s["st_shndx"] != "SHN_UNDEF") for s in table.iter_symbols()]
    return [entry for entry in entries if entry[0] and entry[1] != "STB_LOCAL"]


def is_operators(path):
    """Whether this is the library of the operators, the others being the Python module and the CUDA kernels."""
    return Path(path).name == "libattn_ops.so"


def is_cuda(path):
    return Path(path).name == "libattn_ops_cuda.so"


def cuda_interface():
    """The functions that csrc/cuda/library.h declares."""
    return set(re.findall(r"\b(attn_ops_cuda_\w+)\(", CUDA_INTERFACE.read_text()))


def exports_broken(path):
    shown = {name for name, _, defined in symbols(path, ".dynsym") if defined}
    if is_cuda(path):
        return shown ^ cuda_interface()
    return shown ^ {"attn_ops_xla_unavailable_reason" if is_operators(path) else "PyInit__core"}


def tensorflow_broken(path):
    """Of TensorFlow: the listed part of its C API and, weak, the pool and the stream; nothing in the others."""
    needed = {name: binding for name, binding, defined in symbols(path, ".dynsym") if not defined}
    pattern = r"TF_|tensorflow|tsl|xla|absl|Eigen"
    if is_operators(path):
        pattern += "|^_?Py"
        allowed = dict.fromkeys(C_API.read_text().split(), "STB_GLOBAL")
        allowed |= dict.fromkeys((INTRA_OP_POOL, CUDA_STREAM), "STB_WEAK")
    else:
        allowed = {}
    found = {(name, binding) for name, binding in needed.items() if re.search(pattern, name)}
    return found ^ set(allowed.items())


def cuda_broken(path):
    return {name for name, _, defined in symbols(path, ".dynsym") if not defined and re.match("cuda|cu[A-Z]", name)}


def libraries_broken(path):
    """Libraries needed beyond the system's and TensorFlow's, and directories to search (RPATH)."""
    with open(path, "rb") as file:
        tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    wanted = {"libtensorflow_framework.so.2"} if is_operators(path) else set()
    searched = {tag.entry.d_tag for tag in tags} & {"DT_RPATH", "DT_RUNPATH"}
    return {name for name in needed if not re.match(SYSTEM, name)} ^ wanted | searched


def age_broken(path):
    """Symbol versions newer than manylinux_2_28's."""
    with open(path, "rb") as file:
        versions = [
            version.name
            for section in ELFFile(file).iter_sections()
            if isinstance(section, GNUVerNeedSection)
            for _, entries in section.iter_versions()
            for version in entries
        ]
    assert versions, f"{path} names no symbol versions"
    parted = [(version, *version.rpartition("_")) for version in versions]
    return {v for v, family, _, number in parted if tuple(map(int, number.split("."))) > NEWEST[family]}


LIBRARY_RULES = (exports_broken, tensorflow_broken, cuda_broken, libraries_broken, age_broken)
