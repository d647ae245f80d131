"""The two ways by which CUDA kernels run on a CPU, the layer and nvcc's PTX: their instructions against NumPy, the
errors they find.
"""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from cuda_host import build
from cuda_host.driver import Driver, DriverError
from cuda_host.ptx import compiled
from cuda_host.ptx.device import Interpreter

pytestmark = pytest.mark.skipif(not shutil.which(build.CXX), reason=f"no {build.CXX}")

GARBAGE = 0xFF  # what memory holds that nothing has been written to
SEEDS = range(8)


class LayerArgs(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("mode", ctypes.c_int32),
    ]


@pytest.fixture(scope="module")
def loaded():
    return Driver(build.layer_library())


@pytest.fixture
def layer(loaded):
    """The driver with the kernels of the layer."""
    loaded.reset()
    return loaded


@pytest.fixture(params=["layer", "ptx"])
def driver(layer, request):
    """The same, and with the PTX of these kernels."""
    if request.param == "layer":
        yield layer
    elif compiled.missing_reason():
        pytest.skip(compiled.missing_reason())
    else:
        with Interpreter(layer):
            yield layer


def run(driver, kernel, out, a=None, b=None, n=0, mode=0, blocks=1, threads=32, shared_bytes=0):
    """Runs a kernel of layer_kernels.cu on NumPy arrays; what `out` is then."""
    a, b, out = (None if x is None else driver.array(x) for x in (a, b, out))
    args = LayerArgs(a and a.pointer, b and b.pointer, out.pointer, n, mode)
    driver.launch(driver.kernel(b"image", kernel), args, blocks, threads, shared_bytes)
    return out.numpy()


# --- Matrix products ------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -2.0, np.inf, -np.inf, np.nan, 6e-8, 1e-7]


def truncated_to_tf32(x):
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32)


@pytest.mark.parametrize("special", [False, True], ids=["random", "special"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_matrix_products(driver, rng, kind, special):
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32}[kind]
    blocks, k = 200, 8 if kind == "tf32" else 16
    shapes = [(blocks, 16, k), (blocks, k, 8), (blocks, 16, 8)]
    a, b, d = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    if special:
        for x in (a, b):
            chosen = rng.random(x.shape) < 0.03
            x[chosen] = rng.choice(SPECIAL, chosen.sum())
    a, b = a.astype(dtype), b.astype(dtype)
    bits = np.uint32 if kind == "tf32" else np.uint16
    got = run(driver, f"layer_mma_{kind}", d, a.view(bits), b.view(bits), blocks=blocks)
    if kind == "tf32":
        a, b = truncated_to_tf32(a), truncated_to_tf32(b)
    with np.errstate(invalid="ignore"):
        expected = d + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# --- Within a warp --------------------------------------------------------------------------------


def test_matrices_from_shared_memory(driver, rng):
    rows = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = run(driver, "layer_load_matrices", np.zeros((2, 32, 4), np.uint32), rows, shared_bytes=512)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i, m in enumerate(rows.astype(np.uint32)):
            assert out[0, lane, i] == m[g, 2 * t] | m[g, 2 * t + 1] << 16
            assert out[1, lane, i] == m[2 * t, g] | m[2 * t + 1, g] << 16


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffles(driver, rng, mask):
    values = rng.standard_normal(64).astype(np.float32)
    lanes = rng.integers(0, 32, 64).astype(np.int32)
    values[3], values[32:] = 2.5, np.minimum(values[32:], 2.0)
    out = run(driver, "layer_shuffle", np.zeros((3, 64), np.float32), values, lanes, n=mask, threads=64)
    i = np.arange(64)
    np.testing.assert_array_equal(out[0], values[i // 32 * 32 + lanes])
    np.testing.assert_array_equal(out[1], values[i ^ mask])
    np.testing.assert_array_equal(out[2], i < 32)


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, arrived", [(0, 2), (1, 1), (2, 0), (3, 0)], ids=["all", "one", "none", "uncommitted"])
def test_copies_arrive_when_waited_for(driver, rng, mode, arrived):
    source = rng.integers(0, GARBAGE, (2, 64, 16)).astype(np.uint8)
    exists = rng.integers(0, 2, 64).astype(np.int32)
    out = np.zeros((2, 64, 16), np.uint8)
    out = run(driver, "layer_copy", out, source, exists, mode=mode, threads=64, shared_bytes=2048)
    expected = np.where(exists[:, None], source, 0)
    expected[arrived:] = GARBAGE
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("mode", [0, 1], ids=["waits", "does not wait"])
def test_copies_of_few_bytes(driver, rng, mode):
    source = rng.integers(0, GARBAGE, 768).astype(np.uint8)
    exists = rng.integers(0, 2, 64).astype(np.int32)
    out = run(
        driver, "layer_copy_few", np.zeros(768, np.uint8), source, exists, mode=mode, threads=64, shared_bytes=768
    )
    expected = np.where(np.concatenate([exists.repeat(8), exists.repeat(4)]), source, 0)
    np.testing.assert_array_equal(out, expected if mode == 0 else GARBAGE)


def test_what_does_not_exist_is_not_read(driver, rng):
    """The last of the sources lies in a page that cannot be read."""
    source = rng.integers(0, 255, (127, 16)).astype(np.uint8)
    exists = np.ones(64, np.int32)
    exists[63] = 0
    out = run(driver, "layer_copy", np.zeros((2, 64, 16), np.uint8), source, exists, threads=64, shared_bytes=2048)
    np.testing.assert_array_equal(out[:, :63], [source[:63], source[64:]])
    assert not out[:, 63].any()


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["right", "no barrier after", "no barrier before"])
def test_copies_of_other_lanes_need_a_barrier(layer, monkeypatch, rng, mode):
    rows = rng.integers(0, 2**16, (32, 8)).astype(np.uint16)
    matrices = np.roll(rows, -1, axis=0).reshape(4, 8, 4, 2).transpose(1, 2, 0, 3)
    expected = np.ascontiguousarray(matrices).view(np.uint32).reshape(32, 4)
    for seed in SEEDS:
        monkeypatch.setenv("ATTN_OPS_HOST_LAYER_SEED", str(seed))
        out = run(layer, "layer_copy_and_load", np.zeros((32, 4), np.uint32), rows, mode=mode, shared_bytes=512)
        assert (out == expected).all() == (mode == 0)


# --- Barriers -------------------------------------------------------------------------------------


def sums_of_neighbours(rounds):
    values = np.arange(128, dtype=np.float32)
    for _ in range(rounds):
        values = values + np.roll(values, -32)
    return values


def test_barriers(driver, monkeypatch):
    for seed in SEEDS:
        monkeypatch.setenv("ATTN_OPS_HOST_LAYER_SEED", str(seed))
        out = np.zeros((5, 128), np.float32)
        out = run(driver, "layer_barriers", out, n=6, blocks=5, threads=128, shared_bytes=512)
        np.testing.assert_array_equal(out, np.tile(sums_of_neighbours(6), (5, 1)))


def test_a_missing_barrier_shows(layer, monkeypatch):
    for seed in SEEDS:
        monkeypatch.setenv("ATTN_OPS_HOST_LAYER_SEED", str(seed))
        out = run(layer, "layer_barriers", np.zeros(128, np.float32), n=6, mode=1, threads=128, shared_bytes=512)
        assert (out != sums_of_neighbours(6)).any()


def test_barriers_that_tell_whether_any(driver):
    who = np.array([0, 127, 64, 31, 128, -1], np.int32)
    out = run(driver, "layer_barrier_or", np.zeros((6, 128), np.uint8), who, blocks=6, threads=128)
    np.testing.assert_array_equal(out, np.repeat([[1], [1], [1], [1], [0], [0]], 128, axis=1))


def test_host_threads_run_blocks_of_their_own(driver):
    def rounds(n):
        out = np.zeros((20, 128), np.float32)
        return run(Driver(build.layer_library()), "layer_barriers", out, n=n, blocks=20, threads=128, shared_bytes=512)

    with ThreadPoolExecutor(4) as threads:
        for n, out in enumerate(threads.map(rounds, range(20))):
            np.testing.assert_array_equal(out, np.tile(sums_of_neighbours(n), (20, 1)))


@pytest.mark.parametrize("seed", [0, 1])
def test_compare_and_swap_across_blocks(layer, monkeypatch, seed):
    monkeypatch.setenv("ATTN_OPS_HOST_LAYER_SEED", str(seed))
    out = run(layer, "layer_tickets", np.zeros(101, np.uint64), blocks=100)
    assert out[0] == 100
    np.testing.assert_array_equal(np.sort(out[1:]), np.arange(100))
    assert (out[1:] == np.arange(100)).all() == (seed == 0)  # blocks come in an order of the seed


# --- Numbers --------------------------------------------------------------------------------------


def convert(driver, values, mode, out):
    return run(driver, "layer_convert", out, values, n=out.size, mode=mode, threads=64)


def test_every_half(driver):
    bits = np.arange(2**16, dtype=np.uint16)
    got = convert(driver, bits, 0, np.zeros(2**16, np.float32))
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(got), bits >> 15 == 1)


@pytest.mark.parametrize("mode, dtype", [(1, np.float16), (2, ml_dtypes.bfloat16)], ids=["half", "bfloat16"])
def test_rounding_to_16_bits(driver, rng, mode, dtype):
    """All numbers of the type, all ties between them, what is next to those, and any other float."""
    with np.errstate(all="ignore"):
        exact = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
        # The middle of two neighbours of the type, in double: Inf stands for the next power of two.
        after = np.roll(exact, -1)
        ties = ((exact.astype(np.float64) + after.astype(np.float64)) / 2).astype(np.float32)
        close = [np.nextafter(ties, np.float32(to)) for to in (np.inf, -np.inf)]
        limits = np.float32([65519.996, 65520, 65520.004, 3.3895314e38, 3.3961775e38, -65520, 2.0**-25, 2.0**-24 * 1.5])
        random = rng.integers(0, 2**32, 2**18).astype(np.uint32).view(np.float32)
        values = np.concatenate([exact, ties, *close, limits, random])
        expected = values.astype(dtype)
    got = convert(driver, values, mode, np.zeros(values.size // 2, np.uint32)).view(dtype)
    nan = np.isnan(expected.astype(np.float32))
    assert (got.view(np.uint16)[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def test_rounding_to_tf32(driver, rng):
    """All ties, what is next to them, and the ends of the range, against the sum in float64 that leaves 11 bits."""
    random = rng.integers(0, 2**32, 2**14).astype(np.uint32)
    ties = random & 0xFFFFE000 | 0x1000
    limits = np.uint32([0, 0x80000000, 1, 0x7F7FEFFF, 0x7F7FF000, 0x7F800000, 0xFF800000])
    values = np.concatenate([random, ties, ties - 1, ties + 1, limits]).view(np.float32)
    got = convert(driver, values, 4, np.zeros(values.size, np.uint32)).view(np.float32)
    nan = np.isnan(values)
    _, exponent = np.frexp(np.abs(values[~nan]).astype(np.float64))
    exponent = np.maximum(exponent, -125)  # denormals have the spacing of the smallest normal number
    step = np.ldexp(1.0, exponent - 11)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.floor(np.abs(values[~nan]).astype(np.float64) / step + 0.5) * step
        expected = np.where(np.isinf(values[~nan]), np.inf, rounded).astype(np.float32)
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(got[~nan], np.copysign(expected, values[~nan]))


def test_exp2(driver, rng):
    x = np.concatenate([rng.uniform(-130, 128, 10000), [0, -126, -126.01, -149, -1e30, 128, 1e-40, 126.5]])
    x = x.astype(np.float32)
    got = convert(driver, x, 3, np.zeros_like(x))
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    expected[expected < 2.0**-126] = 0
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=0)
    edges = convert(driver, np.float32([-np.inf, np.inf, np.nan]), 3, np.zeros(3, np.float32))
    np.testing.assert_array_equal(edges, np.float32([0, np.inf, np.nan]))
    assert not np.signbit(edges[0])


# --- Errors ---------------------------------------------------------------------------------------

ERRORS = {
    0: "thread 5: has left the kernel, while thread .* is at shuffle",
    1: "is at (shuffle_xor|sync_warp), while thread .* is at (shuffle_xor|sync_warp)",
    2: "warp 0 is at sync_block, while warp 1 has left the kernel",
    3: "thread (40: has left|.* while thread 40 of its warp has left)",
    4: "copy_async to 992 bytes into shared memory, which has 1000",
    5: "copy_async to an address that is not aligned",
    6: "copy_async from an address that is not aligned",
    7: "an address that is not aligned",
    8: "load_matrices of an address that is not aligned",
    9: "load_matrices of an address outside shared memory",
    10: "1016 bytes into an allocation of 1000",
    11: "wrote behind an allocation of 1000 bytes",
    12: "wrote behind its 1000 bytes of shared memory",
    13: "2000 bytes into shared memory, which has 1000",
    14: "the end of a thread's stack",
    15: "an address that is not aligned|a null pointer",
    16: "is at sync_block(_or)?, while warp 1 is at sync_block(_or)?",
    17: "copy_async to an address that is not aligned",
    18: "copy_async from an address that is not aligned",
    19: "copy_async to 1000 bytes into shared memory, which has 1000",
}


@pytest.mark.parametrize("mode, text", ERRORS.items(), ids=map(str, ERRORS))
def test_errors_are_found(layer, monkeypatch, mode, text):
    out = np.zeros(1000, np.uint8)
    for seed in SEEDS:
        monkeypatch.setenv("ATTN_OPS_HOST_LAYER_SEED", str(seed))
        with pytest.raises(DriverError, match=f"cuLaunchKernel: 719 .*kernel layer_errors.*{text}"):
            run(layer, "layer_errors", out, n=1000, mode=mode, blocks=3, threads=64, shared_bytes=1000)
        assert "layer_errors" in layer.log()["error"]
        # And the next launch is as good as ever.
        assert run(layer, "layer_errors", out, mode=99, threads=64, shared_bytes=1000)[0] == 1
        layer.reset()


# --- The driver -----------------------------------------------------------------------------------


def code_of(call, *arguments):
    with pytest.raises(DriverError) as error:
        call(*arguments)
    return error.value.code


def test_launches_that_the_driver_refuses(layer):
    kernel, out = layer.kernel(b"image", "layer_repeat"), layer.empty(128)
    args = LayerArgs(None, None, out.pointer, 1, 0)
    assert code_of(layer.launch, kernel, args, 1, 64) == 1  # not the kernel's number of threads
    assert code_of(layer.launch, kernel, args, 0, 32) == 1
    assert code_of(layer.launch, kernel, args, 1, 32, 50000) == 1  # shared memory not allowed before
    assert code_of(layer.cuKernelSetAttribute, 8, 200000, kernel, 0) == 1  # more than there is
    layer.cuKernelSetAttribute(8, 50000, kernel, 0)
    layer.launch(kernel, args, 1, 32, 50000)
    assert code_of(layer.kernel, b"image", "no_such_kernel") == 500


def test_the_environment_says_what_device_it_is(layer, monkeypatch):
    value = ctypes.c_int()

    def attribute(number, device=0):
        layer.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    assert (attribute(75), attribute(76), attribute(16), attribute(97)) == (8, 0, 16, 163 * 1024)
    monkeypatch.setenv("ATTN_OPS_STANDIN_CAPABILITY", "12.0")
    assert (attribute(75), attribute(76), attribute(97)) == (12, 0, 99 * 1024)
    assert code_of(attribute, 16, 1) == 101
    monkeypatch.setenv("ATTN_OPS_STANDIN_DEVICES", "2")
    assert attribute(16, 1) == 16
    monkeypatch.setenv("ATTN_OPS_STANDIN_DRIVER_VERSION", "11080")
    layer.cuDriverGetVersion(ctypes.byref(value))
    assert value.value == 11080


def test_calls_fail_when_told(layer, monkeypatch):
    monkeypatch.setenv("ATTN_OPS_STANDIN_FAIL", "cuLaunchKernel:2:701,cuMemAlloc_v2:4:2")
    out = np.zeros(32, np.float32)
    run(layer, "layer_repeat", out)
    assert code_of(run, layer, "layer_repeat", out) == 701
    run(layer, "layer_repeat", out)
    assert code_of(layer.empty, 10) == 2
    layer.reset()
    run(layer, "layer_repeat", out)


def test_the_log(layer):
    run(layer, "layer_repeat", np.zeros(32, np.float32), blocks=3, shared_bytes=512)
    log = layer.log()
    assert log["calls"]["cuLaunchKernel"] == 1 and log["calls"]["cuLibraryLoadData"] == 1
    assert log["error"] == ""
    (launch,) = log["launches"]
    image = launch.pop("image")
    expected = dict(kernel="layer_repeat", grid=[3, 1, 1], block=[32, 1, 1], shared_bytes=512, stream=0, device=0)
    assert launch == expected
    assert log["images"][image] == dict(bytes=5, head=b"image".hex())


def test_copies_outside_allocations_are_refused(layer):
    array, host = layer.empty(100), (ctypes.c_char * 200)()
    assert code_of(layer.cuMemcpyDtoH_v2, host, array.pointer, ctypes.c_size_t(101)) == 1
    assert code_of(layer.cuMemcpyHtoD_v2, ctypes.c_void_p(array.pointer.value + 90), host, ctypes.c_size_t(20)) == 1
    assert (array.numpy() == GARBAGE).all()
