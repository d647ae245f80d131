"""libattn_ops_cuda.so around its kernels: the driver it finds or not, the cards it takes, what it launches, and its build.

The driver is the stand-in of cuda_host/, in processes of their own, since the library looks for a driver once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attn_ops import _native

import wheel_rules
from cuda_host import build

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(_native.__file__).with_name("libattn_ops_cuda.so")
COMPILE = ROOT / "csrc/cuda/compile.py"

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="libattn_ops_cuda.so was not built: no CUDA compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None and "CUDACXX" not in os.environ, reason="no nvcc")

# Forward and backward of one call through the stand-in; prints what was launched, or the exception.
CALL = """
import ctypes, json, sys
import numpy as np
sys.path.insert(0, "tests")
import cuda_run
from cuda_arrays import driver
shapes, dtype, options = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
q, k, v, d = [rng.normal(size=shape).astype(dtype) for shape in shapes]
try:
    results = cuda_run.run(q, k, v, d, None, {"layout": "BSHD", **options})
    driver().standin_log.restype = ctypes.c_char_p
    log = json.loads(driver().standin_log())
    finite = all(np.isfinite(x).all() for x in results.values() if x is not None)
    print(json.dumps({**log, "finite": bool(finite)}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def in_a_process(code, *arguments, **environment):
    environment = {"ATTN_OPS_CUDA_DRIVER": str(build.library()), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def call(shapes=None, dtype="float16", options=None, **environment):
    shapes = shapes or [(1, 80, 2, 64), (1, 90, 1, 64), (1, 90, 1, 64), (1, 80, 2, 64)]
    return json.loads(in_a_process(CALL, json.dumps([shapes, dtype, options or {}]), **environment).splitlines()[-1])


@pytest.mark.parametrize("broken", wheel_rules.LIBRARY_RULES, ids=lambda rule: rule.__name__.removesuffix("_broken"))
def test_rules_of_shipped_libraries(broken):
    assert broken(LIBRARY) == set()


REASON = "from attn_ops import _cuda; print(_cuda.unavailable_reason(0))"


def test_without_a_driver_there_is_a_reason():
    reason = in_a_process(REASON, ATTN_OPS_CUDA_DRIVER="/nowhere/libcuda.so.1")
    assert "there is no CUDA driver" in reason and "/nowhere/libcuda.so.1" in reason


def test_a_library_that_is_no_driver_is_a_reason():
    [libc] = [line.split()[-1] for line in open("/proc/self/maps") if "libc.so.6" in line][:1]
    assert "has no cuInit" in in_a_process(REASON, ATTN_OPS_CUDA_DRIVER=libc)


def test_a_driver_that_fails_is_a_reason():
    reason = in_a_process(REASON, ATTN_OPS_STANDIN_FAIL="cuInit:1:100")
    assert "the CUDA driver cannot be used" in reason and "CUresult 100" in reason


@pytest.mark.parametrize("capability", ["6.1", "7.0", "7.5"])
def test_cards_before_ampere_are_a_reason(capability):
    reason = in_a_process(REASON, ATTN_OPS_STANDIN_CAPABILITY=capability)
    assert f"compute capability {capability}" in reason and "8.0 or newer" in reason


@pytest.mark.parametrize(
    "capability, image",
    # Cubins run on cards of the same major version; PTX is for what comes.
    [("8.0", "sm_80"), ("8.6", "sm_80"), ("8.9", "sm_80"), ("9.0", "sm_90a"), ("10.0", "sm_100"), ("10.3", "sm_100"),
     ("11.0", "compute_80"), ("12.0", "sm_120"), ("12.1", "sm_120"), ("13.0", "compute_80")],
)  # fmt: skip
def test_each_card_gets_its_kernels(capability, image):
    result = call(ATTN_OPS_STANDIN_CAPABILITY=capability)
    [loaded] = result["images"]
    # A cubin tells its architecture in the flags of its ELF header, at byte 48; bits 8 to 15 since CUDA 13, 0 to 7 before.
    head = bytes.fromhex(loaded["head"])
    if image == "compute_80":
        assert head.startswith(b"//")
    else:
        assert head.startswith(b"\x7fELF") and int(image.strip("sm_a")) in head[48:50]
    assert result["finite"]


def test_launches_of_the_fast_kernels():
    result = call()
    launches = [(x["kernel"], x["grid"][0], x["block"][0]) for x in result["launches"]]
    # 160 rows of one key/value head: 2 tiles of 128 forward and for dq; 90 keys are one tile.
    assert launches == [
        ("attn_ops_forward_f16_64_plain", 2, 128),
        ("attn_ops_delta_f16", 20, 256),
        ("attn_ops_dq_f16_64_plain", 2, 128),
        ("attn_ops_dkdv_f16_64_plain", 1, 128),
    ]


@pytest.mark.parametrize(
    "options, dtype, kernel",
    [
        ({}, "float32", "f32_64"),
        ({"dropout_rate": 0.5, "dropout_seed": 3}, "float16", "f16_64"),
        ({"scale": -1.0}, "float16", "f16_64"),
        ({"scale": 0.0}, "float16", "f16_64"),
    ],
)
def test_what_the_fast_kernels_do_not_take(options, dtype, kernel):
    names = [x["kernel"] for x in call(dtype=dtype, options=options)["launches"]]
    assert [name for name in names if "delta" not in name] == [
        f"attn_ops_{what}_{kernel}" for what in ("forward", "dq", "dkdv")
    ]


def test_few_rows_are_decoded_in_parts_as_many_as_the_card_can_use():
    shapes = [(1, 1, 8, 128), (1, 2000, 1, 128), (1, 2000, 1, 128), (1, 1, 8, 128)]
    forward = call(shapes)["launches"][0]
    assert forward["kernel"] == "attn_ops_decode_f16_128" and forward["grid"][0] > 4
    many = [(64, 1, 8, 128), (64, 200, 8, 128), (64, 200, 8, 128), (64, 1, 8, 128)]
    assert call(many)["launches"][0]["grid"][0] == 64 * 8  # enough without


@pytest.mark.parametrize(
    "function, code, text",
    [
        ("cuLibraryLoadData", 200, "loading the kernels for sm_80"),
        ("cuLibraryGetKernel", 500, "looking for the kernel attn_ops_forward_f16_64_plain"),
        ("cuKernelSetAttribute", 1, "giving shared memory to attn_ops_forward_f16_64_plain"),
        ("cuLaunchKernel", 701, "launching attn_ops_forward_f16_64_plain (2 blocks of 128 threads"),
    ],
)
def test_errors_of_the_driver_name_what_was_done(function, code, text):
    error = call(ATTN_OPS_STANDIN_FAIL=f"{function}:1:{code}")["error"]
    assert text in error and f"CUresult {code}" in error


def test_every_order_of_the_warps_gives_the_same():
    """A barrier that is missing shows when other warps come first."""
    for dtype in ("float16", "float32"):
        for seed in ("1", "2", "3"):
            result = call(dtype=dtype, ATTN_OPS_HOST_LAYER_SEED=seed)
            assert result["finite"] and not result["error"], result


@needs_nvcc
def test_the_build_refuses_a_kernel_that_spills(tmp_path):
    """Far more numbers than there are registers, all needed at the end."""
    source = tmp_path / "spills.cu"
    source.write_text(
        """
        extern "C" __global__ void spills(const float* in, float* out) {
          float x[300];
          #pragma unroll
          for (int i = 0; i < 300; ++i) x[i] = in[i * 32 + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 300; ++i) out[i * 32 + threadIdx.x] = x[i] * x[(i * 7 + 150) % 300];
        }
        extern "C" __global__ void indexes(const float* in, float* out, int j) {
          float x[8];
          for (int i = 0; i < 8; ++i) x[i] = in[i];
          out[0] = x[j];
        }"""
    )
    target = tmp_path / "spills.cubin"
    done = subprocess.run([sys.executable, COMPILE, "sm_80", source, "-o", target], capture_output=True, text=True)
    assert done.returncode != 0 and not target.exists()
    assert "spills: " in done.stderr and "indexes: " in done.stderr and "bytes of stack" in done.stderr


def test_the_host_divides_as_the_kernels_do():
    """The multiplier of every group size, against division, at the edges and at random."""
    code = """
#include <cstdio>
#include "csrc/cuda/plan.h"
int main() {
  unsigned long long state = 1;
  for (unsigned d = 2; d < 70000; d = d < 300 ? d + 1 : d * 2 - 1) {
    const auto divisor = attn_ops::cuda::make_divisor(d);
    for (int i = 0; i < 4000; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      unsigned x = i < 8 ? 0x7fffffffu - i : i < 16 ? i : i < 100 ? (i / 2) * d - i % 2 : static_cast<unsigned>(state >> 33);
      x &= 0x7fffffffu;
      const unsigned quotient = static_cast<unsigned>(static_cast<unsigned long long>(x) * divisor.multiplier >> 32) >> divisor.shift;
      if (quotient != x / d) return std::printf("%u / %u is not %u\\n", x, d, quotient), 1;
    }
  }
}
"""
    program = build.BUILD / f"divisor-{os.getpid()}"
    program.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["g++", "-std=c++17", "-x", "c++", "-", f"-I{ROOT}", "-o", program], input=code, text=True, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    program.unlink()
    assert done.returncode == 0, done.stdout
