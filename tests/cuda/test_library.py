"""libattn_ops_cuda.so around its kernels: the driver it finds or not, the cards it takes, what it launches, its build.

The driver is the stand-in of cuda_host/, in processes of their own, since the library looks for a driver once. The
library is the installed one; where there was no compiler for its kernels, the one that the build made without them: the
stand-in has kernels of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_run
import wheel_rules
from cuda_host import build

ROOT = Path(__file__).resolve().parents[2]
COMPILE = ROOT / "csrc/cuda/compile.py"


LIBRARY = cuda_run.library()
needs_images = pytest.mark.skipif(cuda_run.library_without_kernels() is None, reason="build in this checkout")
needs_library = pytest.mark.skipif(LIBRARY is None, reason="no libattn_ops_cuda*.so here: build in this checkout")


def compiler(*options):
    command = [sys.executable, COMPILE, "--find", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Forward and backward of one call through the stand-in; prints what was launched, or the exception.
CALL = """
import json, sys
import numpy as np
sys.path[:0] = ["tests", "tests/helpers"]
import cuda_run  # after LIBRARY is set
from cuda_arrays import driver
shapes, dtype, options = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
q, k, v, d = [rng.normal(size=shape).astype(dtype) for shape in shapes]
try:
    results = cuda_run.run(q, k, v, d, None, {"layout": "BSHD", **options})
    finite = all(np.isfinite(x).all() for x in results.values() if x is not None)
    print(json.dumps({**driver().log(), "finite": bool(finite)}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


# Which library it is that attn_ops asks.
PREPARE = """
import pathlib
from attn_ops.kernels import cuda
cuda.LIBRARY = pathlib.Path({library!r})
"""


def in_a_process(code, *arguments, library=LIBRARY, **environment):
    code = PREPARE.format(library=str(library)) + code
    environment = {"ATTN_OPS_CUDA_DRIVER": str(build.library()), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def call(shapes=None, dtype="float16", options=None, **environment):
    shapes = shapes or [(1, 80, 2, 64), (1, 90, 1, 64), (1, 90, 1, 64), (1, 80, 2, 64)]
    return json.loads(in_a_process(CALL, json.dumps([shapes, dtype, options or {}]), **environment).splitlines()[-1])


@needs_library
@pytest.mark.parametrize("broken", wheel_rules.LIBRARY_RULES, ids=lambda rule: rule.__name__.removesuffix("_broken"))
def test_rules_of_shipped_libraries(tmp_path, broken):
    path = tmp_path / "libattn_ops_cuda.so"
    path.symlink_to(LIBRARY)
    assert broken(path) == set()


REASON = "print(cuda.unavailable_reason(0))"


@needs_library
def test_without_a_driver_there_is_a_reason():
    reason = in_a_process(REASON, ATTN_OPS_CUDA_DRIVER="/nowhere/libcuda.so.1")
    assert "there is no CUDA driver" in reason and "/nowhere/libcuda.so.1" in reason


@needs_library
def test_a_library_that_is_no_driver_is_a_reason():
    [libc] = [line.split()[-1] for line in open("/proc/self/maps") if "libc.so.6" in line][:1]
    assert "has no cuInit" in in_a_process(REASON, ATTN_OPS_CUDA_DRIVER=libc)


@needs_library
def test_a_driver_that_fails_is_a_reason():
    reason = in_a_process(REASON, ATTN_OPS_STANDIN_FAIL="cuInit:1:100")
    assert "the CUDA driver cannot be used" in reason and "CUresult 100" in reason


@needs_library
def test_a_driver_that_is_too_old_for_the_kernels_is_a_reason():
    old = {"ATTN_OPS_STANDIN_FAIL": "cuLibraryLoadData:1:222", "ATTN_OPS_STANDIN_DRIVER_VERSION": "12020"}
    reason = in_a_process(REASON, **old)
    assert "loading the kernels for sm_80, with a driver for CUDA 12.2: " in reason and "CUresult 222" in reason


@needs_library
def test_there_need_be_no_context_but_for_its_device():
    assert in_a_process(REASON) == "None"
    assert "there is no CUDA device 3" in in_a_process("print(cuda.unavailable_reason(3))")
    assert "no CUDA context is current" in in_a_process("print(cuda.unavailable_reason())")


# What the library says of a call that is described by nothing but its extents.
UNSUPPORTED = """
import ctypes, json, sys
from attn_ops.kernels.cuda_types import AttentionParams
p = AttentionParams()
for name, x in json.loads(sys.argv[1]).items():
    setattr(p, name, x)
print(cuda._loaded().attn_ops_cuda_unsupported_reason(ctypes.byref(p)).decode())
"""


@needs_library
@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, ""),
        ({"dtype": 1}, "float64"),
        ({"head_dim": 257}, "257"),
        ({"value_dim": 300}, "300"),
        ({"head_dim": 256, "value_dim": 256}, ""),
        ({"head_dim": 0, "value_dim": 0}, ""),
        ({"seqlen_q": 1 << 31}, "query rows"),
        ({"seqlen_q": 1 << 29, "num_heads": 8}, "query rows"),
        ({"seqlen_k": 1 << 31}, "keys"),
        ({"batch": 1 << 30}, "too large for one launch"),
        ({"batch": 0, "num_heads": 0, "num_kv_heads": 0, "seqlen_q": 0, "seqlen_k": 0}, ""),
    ],
)
def test_what_is_not_supported_has_a_reason(changed, reason):
    extents = dict(dtype=2, batch=2, seqlen_q=100, seqlen_k=100, num_heads=2, num_kv_heads=2, head_dim=64, value_dim=64)
    answer = in_a_process(UNSUPPORTED, json.dumps(extents | changed), ATTN_OPS_CUDA_DRIVER="/nowhere")
    assert reason in answer and bool(answer) == bool(reason)


@needs_library
@pytest.mark.parametrize("capability", ["6.1", "7.0", "7.5"])
def test_cards_before_ampere_are_a_reason(capability):
    reason = in_a_process(REASON, ATTN_OPS_STANDIN_CAPABILITY=capability)
    assert f"compute capability {capability}" in reason and "8.0 or newer" in reason


@needs_images
@pytest.mark.parametrize(
    "capability, image",
    # Cubins run on cards of the same major version, but not on Tegra's; PTX is for those and for what comes.
    [("8.0", "sm_80"), ("8.6", "sm_80"), ("8.7", "compute_80"), ("8.8", "compute_80"), ("8.9", "sm_80"),
     ("9.0", "sm_90a"), ("10.0", "sm_100"), ("10.1", "compute_80"), ("10.3", "sm_100"), ("11.0", "compute_80"),
     ("12.0", "sm_120"), ("12.1", "sm_120"), ("13.0", "compute_80")],
)  # fmt: skip
def test_each_card_gets_its_kernels(capability, image):
    """Of all architectures, which this machine's library need not have: the images are their names."""
    without = cuda_run.library_without_kernels()
    result = call(dtype="float32", library=without, ATTN_OPS_STANDIN_CAPABILITY=capability)
    [loaded] = result["images"]
    assert bytes.fromhex(loaded["head"]).startswith(f"// {image}: no kernels".encode())
    assert result["finite"]


def call_on_hopper(seqlen_q=300, seqlen_k=200, heads=4, kv_heads=2, dim=64, dtype="float16", options=None):
    """What is launched, and what the copy engine is told. What these kernels compute: ../cuda_host/ptx/test_hopper.py, and
    test_kernels.py with `-m gpu`."""
    query, key = (2, seqlen_q, heads, dim), (2, seqlen_k, kv_heads, dim)
    shapes = query, key, key, query
    return call(shapes, dtype, options, library=cuda_run.library_without_kernels(), ATTN_OPS_STANDIN_CAPABILITY="9.0")


@needs_images
def test_hopper_has_kernels_of_its_own():
    result = call_on_hopper()
    launches = [(x["kernel"], x["grid"][0], x["block"][0]) for x in result["launches"]]
    # 600 rows of each of 4 key/value heads: 5 tiles of 128; 200 keys: 2.
    assert launches == [
        ("attn_ops_hopper_forward_f16_64", 20, 384),
        ("attn_ops_hopper_dq_f16_64", 20, 384),
        ("attn_ops_hopper_dkdv_f16_64", 8, 384),
    ]
    [loaded] = result["images"]
    assert bytes.fromhex(loaded["head"]).startswith(b"// sm_90a_hopper: no kernels")
    key = {"extent": [64, 2, 200, 2], "stride": [128, 256, 256 * 200]}
    query = {"extent": [64, 4, 300, 2], "stride": [128, 512, 512 * 300]}
    # Forward has keys of 128 at a time; a box of rows is all heads of a group, 48 positions of 2.
    assert result["tensor_maps"] == [
        *[key | {"box": [64, 1, 128, 1]}] * 2,
        *[query | {"box": [64, 2, 48, 1]}] * 2,
        *[key | {"box": [64, 1, 96, 1]}] * 2,
        *[key | {"box": [64, 1, 64, 1]}] * 2,
    ]


@pytest.mark.wide(2)
@needs_images
@pytest.mark.parametrize(
    "what, hopper",
    [
        (dict(dim=256), ["forward"]),
        (dict(dim=40), ["forward", "dq", "dkdv"]),
        (dict(heads=5, kv_heads=1), ["forward"]),  # a tile of 96 rows is no whole number of positions
        (dict(dtype="float32"), []),
        (dict(dim=36), []),  # 72 bytes a row
        (dict(options={"scale": -1.0}), []),
        (dict(options={"logits_soft_cap": 5.0}), []),
        (dict(options={"sinks": [1.0, 2.0, 3.0, 4.0]}), []),
        (dict(options={"scale": 0.5, "window_left": 30, "window_right": 0}), ["forward", "dq", "dkdv"]),
    ],
    ids=lambda x: str(x),
)
def test_which_calls_hopper_s_kernels_take(what, hopper):
    launches = [x["kernel"] for x in call_on_hopper(**what)["launches"]]
    assert [x.split("_")[3] for x in launches if x.startswith("attn_ops_hopper_")] == hopper, launches


def test_a_build_for_this_machine_has_what_its_cards_run(tmp_path):
    pretended = tmp_path / "nvidia-smi"
    pretended.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    pretended.chmod(0o755)
    command = [sys.executable, COMPILE, "--native"]
    for path, wanted in (tmp_path, "sm_80;sm_90a;compute_80"), ("/nowhere", "sm_80;compute_80"):
        found = subprocess.run(command, env={**os.environ, "PATH": str(path)}, capture_output=True, text=True, check=True)
        assert found.stdout == wanted


@needs_library
def test_launches_of_the_fast_kernels():
    result = call()
    launches = [(x["kernel"], x["grid"][0], x["block"][0]) for x in result["launches"]]
    # 160 rows of one key/value head: 2 tiles of 128 forward, 3 of 64 for dq; 90 keys are one tile.
    assert launches == [
        ("attn_ops_forward_f16_64_plain", 2, 128),
        ("attn_ops_dq_f16_64_plain", 3, 128),
        ("attn_ops_dkdv_f16_64_plain", 1, 128),
    ]


# What is launched on a stream of device 1 while device 0 is current, then on the default stream; the current context after.
TWO_DEVICES = """
import ctypes, json, sys
import numpy as np
sys.path[:0] = ["tests", "tests/helpers"]
import cuda_run
from cuda_arrays import driver
keys = json.loads(sys.argv[1])
contexts, stream, current = [ctypes.c_void_p(), ctypes.c_void_p()], ctypes.c_void_p(), ctypes.c_void_p()
for device, context in enumerate(contexts):
    driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
driver().cuCtxSetCurrent(contexts[1])
driver().cuStreamCreate(ctypes.byref(stream), 0)
driver().cuCtxSetCurrent(contexts[0])
rng = np.random.default_rng(0)
rows = 1 if keys > 1000 else 80
q, k, v, d = [rng.normal(size=(1, n, 1, 64)).astype("float32") for n in (rows, keys, keys, rows)]
launch = cuda_run.launch
for chosen in stream.value, 0:
    cuda_run.launch = lambda call: launch(call, chosen)
    assert np.isfinite(cuda_run.run(q, k, v, d, None, {"layout": "BSHD"})["dk"]).all()
driver().cuCtxGetCurrent(ctypes.byref(current))
print(json.dumps({**driver().log(), "current": [context.value for context in contexts].index(current.value)}))
"""


@needs_images
@pytest.mark.parametrize("keys", [90, 2000])
def test_launches_go_to_the_device_of_their_stream(keys):
    """Of another generation than the current one, which has other images; decode among them, whose parts are as many as
    the card can use, and whose workspace is the same for both."""
    devices = {"ATTN_OPS_STANDIN_DEVICES": "2", "ATTN_OPS_STANDIN_CAPABILITY": "8.0,9.0"}
    library = cuda_run.library_without_kernels()
    printed = in_a_process(TWO_DEVICES, json.dumps(keys), library=library, **devices)
    result = json.loads(printed.splitlines()[-1])
    heads = [bytes.fromhex(image["head"]).decode() for image in result["images"]]
    places = [(x["device"], heads[x["image"]].split(":")[0].removeprefix("// ")) for x in result["launches"]]
    half = len(places) // 2
    assert {device for device, _ in places[:half]} == {1} and {device for device, _ in places[half:]} == {0}
    assert {image for _, image in places[half:]} == {"sm_80"}
    assert {image for _, image in places[:half]} == {"sm_90a"}
    assert result["current"] == 0 and not result["error"]


# Calls of every dtype and head dimension, for the kernels that plain calls have, for those of calls with everything, and for
# decoding; their launches.
EVERY_KERNEL = """
import json, sys
import ml_dtypes  # NumPy's bfloat16
import numpy as np
sys.path[:0] = ["tests", "tests/helpers"]
import cuda_run
from cuda_arrays import Array, driver
everything = {"bias": np.zeros((1, 2, 70, 70)), "relative_bias": np.zeros((5, 2)), "sinks": [0.0, 0.0]}
for dtype, allow_tf32 in ("float16", 0), ("bfloat16", 0), ("float32", 0), ("float32", 1):
    for dim in 64, 96, 128, 192, 256:
        # Few, and as many as all gradients are not made by one launch.
        many = [(40, 70, {}), (40, 70, everything)] if dtype == "float32" and dim == 64 else []
        for batch, rows, options in *many, (1, 70, {}), (1, 70, everything), (1, 1, {}):
            q, k, v, d = [np.zeros((batch, n, 2, dim), dtype) for n in (rows, 70, 70, rows)]
            cuda_run.run(q, k, v, d, None, {"layout": "BSHD", **options}, allow_tf32=bool(allow_tf32))
        if dtype == "float32":
            for kept in "float16", "bfloat16":
                narrow, statistics = Array(k.astype(kept)), Array(np.zeros((1, 2, 1, 2), "float32"))
                q_and_out = Array(q)
                arrays = q_and_out, narrow, narrow, q_and_out, statistics
                cuda_run.launch(cuda.Forward(*(x.view for x in arrays)))
print(json.dumps(driver().log()["launches"]))
"""


@needs_images
@pytest.mark.parametrize("capability, kilobytes", [("8.6", 99), ("12.0", 99), ("8.0", 163), ("9.0", 227)])
def test_every_kernel_fits_the_memory_of_the_card(capability, kilobytes):
    """The driver refuses what asks for more than it has; nothing is computed."""
    card = {"ATTN_OPS_STANDIN_CAPABILITY": capability, "ATTN_OPS_STANDIN_RUN": "0"}
    library = cuda_run.library_without_kernels()
    launches = json.loads(in_a_process(EVERY_KERNEL, library=library, **card).splitlines()[-1])
    assert max(x["shared_bytes"] for x in launches) <= kilobytes * 1024
    names = {x["kernel"] for x in launches}
    if capability == "9.0":
        assert {name.split("_")[3] for name in names if "hopper" in name} == {"forward", "dq", "dkdv"}
    else:  # all that there are
        table = (ROOT / "csrc/cuda/counts.csv").read_text().splitlines()
        assert names == {row.split(",")[0] for row in table if ",sm_80," in row}


@needs_images
def test_less_shared_memory_than_the_kernels_need_is_a_reason():
    library = cuda_run.library_without_kernels()
    few = {"ATTN_OPS_STANDIN_SHARED_BYTES": str(64 * 1024)}
    reason = in_a_process(REASON, library=library, **few)
    assert "lends a block 65536 bytes of shared memory: the kernels need up to" in reason
    # Of Hopper's own kernels, the others of this directory need less.
    card = {"ATTN_OPS_STANDIN_CAPABILITY": "9.0", "ATTN_OPS_STANDIN_SHARED_BYTES": str(163 * 1024)}
    launched = [x["kernel"] for x in call(library=library, **card)["launches"]]
    assert launched == [f"attn_ops_{name}_f16_64_plain" for name in ("forward", "dq", "dkdv")]


# The first launches of a process, decoding in parts and a backward, inside a capture; the graph is launched twice. Prints
# what went wrong.
CAPTURED = """
import ctypes, json, sys
import numpy as np
sys.path[:0] = ["tests", "tests/helpers"]
from attn_ops import reference
from cuda_arrays import Array, driver
from cuda_host.driver import DriverError
rng = np.random.default_rng(0)
arrays = [rng.normal(size=(1, n, 1, 64)).astype("float32") for n in (1, 2000, 2000, 1)]
q, k, v, d_out = map(Array, arrays)
out, dq = (Array.unwritten((1, 1, 1, 64), "float32") for _ in range(2))
dk, dv = (Array.unwritten((1, 2000, 1, 64), "float32") for _ in range(2))
statistics = Array.unwritten((1, 1, 1, 2), "float32")
given = [x.view for x in (q, k, v, out, statistics)]
calls = cuda.Forward(*given), cuda.Backward(*given, *(x.view for x in (d_out, dq, dk, dv)))
spaces = [Array.unwritten((call.workspace_bytes(),), np.uint8) for call in calls]
stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
driver().cuStreamCreate(ctypes.byref(stream), 0)
if "ask" in sys.argv:
    assert cuda.unavailable_reason() is None
driver().cuStreamBeginCapture_v2(stream, 0)
try:
    for call, space in zip(calls, spaces):
        call(space.view, stream.value)
    try:
        driver().cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(16))
        print("memory was allocated in a capture")
    except DriverError as error:
        assert error.code == 900
    driver().cuStreamEndCapture(stream, ctypes.byref(graph))
    driver().cuGraphInstantiateWithFlags(ctypes.byref(graph), graph, ctypes.c_uint64(0))
    found = []
    for _ in range(2):
        driver().cuGraphLaunch(graph, stream)
        found.append([x.numpy() for x in (out, dq, dk, dv)])
    wide = [x.astype("float64") for x in arrays]
    wanted = reference.attention(*wide[:3])[0], *reference.attention_gradients(*wide[:3], d_out=wide[3])[:3]
    for first, second, right in zip(*found, wanted):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, right, atol=1e-5)
    assert driver().log()["launches"][0]["grid"][0] > 4
except cuda.CudaError as error:
    print(error)
"""


@needs_library
@pytest.mark.parametrize(
    "version, asked, wrong",
    [
        ("12080", False, ""),
        ("12020", True, ""),
        ("12020", False, "launching attn_ops_decode_f32_64"),  # such drivers load no kernel in a capture
    ],
)
def test_first_launches_may_be_captured(version, asked, wrong):
    """Nothing is called that a capture forbids: the stand-in fails what would wait, allocate or load."""
    printed = in_a_process(CAPTURED, *["ask"] * asked, ATTN_OPS_STANDIN_DRIVER_VERSION=version)
    assert wrong in printed and bool(printed) == bool(wrong)


@needs_library
@pytest.mark.parametrize(
    "options, dtype, kernel",
    [
        ({}, "float32", "f32_64_plain"),  # which they do
        ({"scale": 2.0}, "float32", "f32_64"),
        ({"dropout_rate": 0.5, "dropout_seed": 3}, "float16", "f16_64"),
        ({"scale": -1.0}, "float16", "f16_64"),
        ({"scale": 0.0}, "float16", "f16_64"),
        ({"scale": 1e30}, "float16", "f16_64"),
        ({"logits_soft_cap": 5.0}, "float16", "f16_64"),
        ({"alibi_slopes": [0.5, 0.2]}, "float16", "f16_64"),
    ],
)
def test_what_the_fast_kernels_do_not_take(options, dtype, kernel):
    names = [x["kernel"] for x in call(dtype=dtype, options=options)["launches"]]
    gradients = ["dqkv"] if dtype == "float32" else ["dq", "dkdv"]
    delta = ["attn_ops_delta_f32"] if dtype == "float32" else []
    assert names == [f"attn_ops_forward_{kernel}", *delta, *(f"attn_ops_{name}_{kernel}" for name in gradients)]


@needs_library
@pytest.mark.parametrize(
    "capability, heads, length, launches",
    [  # Of 64 rows, and of 64 keys, is a block of the stand-in's 16 multiprocessors.
        ("8.0", 8, 100, [("dqkv", 32)]),  # all run at a time, two on each
        ("8.0", 17, 60, [("dq", 17), ("dkdv", 17)]),  # two waves either way
        ("8.0", 33, 60, [("dqkv", 66)]),  # three instead of four
        ("8.0", 70, 60, [("dq", 70), ("dkdv", 70)]),  # five instead of six
        ("8.6", 9, 60, [("dq", 9), ("dkdv", 9)]),  # one on each
    ],
)
def test_one_launch_for_all_gradients_of_small_calls(capability, heads, length, launches):
    shapes = [(1, length, heads, 64)] * 4
    card = {"ATTN_OPS_STANDIN_CAPABILITY": capability, "ATTN_OPS_STANDIN_RUN": "0"}
    found = call(shapes, "float32", library=cuda_run.library_without_kernels(), **card)["launches"]
    kernels = [(x["kernel"].split("_")[2], x["grid"][0]) for x in found]
    assert [(role, blocks) for role, blocks in kernels if role in ("dq", "dkdv", "dqkv")] == launches


@needs_library
def test_sinks_leave_a_call_to_the_fast_kernels():
    launches = [(x["kernel"], x["grid"][0]) for x in call(options={"sinks": [0.5, 2.0]})["launches"]]
    plain = [(f"attn_ops_{name}_f16_64_plain", n) for name, n in (("forward", 2), ("dq", 3), ("dkdv", 1))]
    assert launches == [*plain, ("attn_ops_dsinks_f32", 2)]


@needs_library
def test_few_rows_are_decoded_in_parts_as_many_as_the_card_can_use():
    shapes = [(1, 1, 8, 128), (1, 2000, 1, 128), (1, 2000, 1, 128), (1, 1, 8, 128)]
    forward = call(shapes)["launches"][0]
    assert forward["kernel"] == "attn_ops_decode_f16_128" and forward["grid"][0] > 4
    many = [(8, 1, 8, 128), (8, 200, 8, 128), (8, 200, 8, 128), (8, 1, 8, 128)]  # for the 16 multiprocessors of the stand-in
    assert call(many)["launches"][0]["grid"][0] == 8 * 8  # enough without


@needs_library
@pytest.mark.parametrize(
    "function, code, text",
    [
        ("cuLibraryGetKernel", 500, "looking for the kernel attn_ops_forward_f32_64"),
        ("cuKernelSetAttribute", 1, "giving shared memory to attn_ops_forward_f32_64_plain (49216 bytes)"),
        ("cuLaunchKernel", 701, "launching attn_ops_forward_f32_64_plain (3 blocks of 128 threads, 49216 bytes"),
    ],
)
def test_errors_of_the_driver_name_what_was_done(function, code, text):
    error = call(dtype="float32", ATTN_OPS_STANDIN_FAIL=f"{function}:1:{code}")["error"]
    assert text in error and f"CUresult {code}" in error


@needs_library
def test_every_order_of_the_warps_gives_the_same():
    """A barrier that is missing shows when other warps come first."""
    for dtype in ("float16", "float32"):
        for seed in ("1", "2", "3"):
            result = call(dtype=dtype, ATTN_OPS_HOST_LAYER_SEED=seed)
            assert result["finite"] and not result["error"], result


@pytest.mark.parametrize("way", ["nvcc", "nvcc by way of PTX", "nvrtc"])
def test_the_build_refuses_a_kernel_that_spills(tmp_path, way):
    """Far more numbers than there are registers, all needed at the end."""
    options = ["--nvrtc"] if way == "nvrtc" else []
    if not compiler(*options):
        pytest.skip("this compiler is not installed")
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
          float x[32];
          for (int i = 0; i < 32; ++i) x[i] = in[i];
          for (int i = 0; i < j; ++i) x[(int)in[i] & 31] += in[i];
          for (int i = 0; i < 32; ++i) out[i] = x[i];
        }"""
    )
    if way == "nvcc by way of PTX":
        ptx = tmp_path / "compute_80.ptx"
        subprocess.run([sys.executable, COMPILE, "compute_80", source, "-o", ptx], check=True)
        source = ptx
    target = tmp_path / "spills.image"
    command = [sys.executable, COMPILE, "sm_80", source, "-o", target, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and not target.exists()
    assert "spills: " in done.stderr and "indexes: " in done.stderr and "bytes of stack" in done.stderr
    done = subprocess.run([*command, "--spills", "100000"], capture_output=True, text=True)
    assert done.returncode != 0 and "spills: " not in done.stderr and "indexes: " in done.stderr


def test_wheels_get_the_kernels_of_every_architecture():
    """pyproject.toml compiles them before cibuildwheel's wheels; CMake embeds them."""
    cmake, pyproject = ((ROOT / name).read_text() for name in ("cmake/cuda.cmake", "pyproject.toml"))
    embedded = re.search(r"set\(every_architecture ([\w ]+)\)", cmake).group(1)
    assert f"printf '%s\\n' {embedded} | xargs" in pyproject


def test_the_host_divides_as_the_kernels_do():
    """The multiplier of every group size, against division, at the edges and at random."""
    code = """
#include <cstdio>
#include "csrc/cuda/plan.h"
int main() {
  unsigned long long state = 1;
  for (unsigned d = 2; d < 1u << 30; d = d < 300 ? d + 1 : d * 2 - 1) {
    const auto divisor = attn_ops::cuda::make_divisor(d);
    for (int i = 0; i < 4000; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      unsigned x = i < 8 ? 0x7fffffffu - i : i < 16 ? i : i < 100 ? (i / 2) * d - i % 2 : unsigned(state >> 33);
      x &= 0x7fffffffu;
      const unsigned quotient = unsigned((unsigned long long)x * divisor.multiplier >> 32) >> divisor.shift;
      if (quotient != x / d) return std::printf("%u / %u is not %u\\n", x, d, quotient), 1;
    }
  }
}
"""
    program = build.BUILD / f"divisor-{os.getpid()}"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [build.CXX, "-std=c++17", "-x", "c++", "-", f"-I{ROOT}", "-o", program]
    subprocess.run(command, input=code, text=True, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    program.unlink()
    assert done.returncode == 0, done.stdout
