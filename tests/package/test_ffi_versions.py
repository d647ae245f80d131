"""Which XLAs the custom calls are registered with: the version of the interface (FFI) is asked for when the library is loaded.
A stand-in for TensorFlow (ffi_stub.c) has each version; the real ones are in tests/compat."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attn_ops import kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ASK = """
import ctypes, sys
tensorflow = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(sys.argv[2])
library.attn_ops_xla_unavailable_reason.restype = ctypes.c_char_p
print(tensorflow.ffi_stub_registered(), library.attn_ops_xla_unavailable_reason().decode())
"""


def reason(tmp_path, major, minor, refuses=False):
    """How many calls were registered, and why not all."""
    names = (ROOT / "csrc/bindings/tf_capi_symbols.txt").read_text().split()
    more = tmp_path / "names.c"
    more.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in names if name != "TF_Version"))
    stub = tmp_path / "libtensorflow_framework.so.2"
    flags = [f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DREFUSES={int(refuses)}"]
    headers = [f"-I{ROOT / 'third_party/tensorflow/include'}", "-fno-builtin", f"-Wl,-soname,{stub.name}"]
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", *flags, *headers, HERE / "ffi_stub.c", more, "-o", stub]
    subprocess.run(command, check=True)
    told = subprocess.run([sys.executable, "-c", ASK, stub, kernels.library_path()], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    count, _, text = told.stdout.strip().partition(" ")
    return int(count), text


@pytest.mark.parametrize("minor", [1, 4, 9])
def test_later_minor_versions_are_taken(tmp_path, minor):
    # Forward and backward, of the CPU and of CUDA, with memory that is asked for and that is lent; and rows of caches.
    assert reason(tmp_path, 0, minor) == (9, "")


@pytest.mark.parametrize("version", [(0, 0), (1, 0), (2, 1)])
def test_others_are_not(tmp_path, version):
    count, text = reason(tmp_path, *version)
    assert count == 0
    assert re.fullmatch(r"XLA of TensorFlow 2.99.0 takes custom calls of FFI {}.{}, and ours are of FFI 0.1".format(*version), text)


@pytest.mark.parametrize("minor", [1, 4])
def test_why_it_refuses(tmp_path, minor):
    count, text = reason(tmp_path, 0, minor, refuses=True)
    assert (count, text) == (0, f"XLA of TensorFlow 2.99.0 (FFI 0.{minor}) refuses the custom call: not today")
