"""What the interpreter has for warpgroups, on PTX written here, against NumPy. No compiler is needed."""

import struct

import numpy as np
import pytest

from cuda_host.ptx.machine import Machine
from cuda_host.ptx.program import PtxError, parse
from cuda_host.ptx.proxies import Proxies
from cuda_host.ptx.races import Races

HEAD = """
.visible .entry test(
	.param .align 64 .b8 test_param_0[192]
)
.maxntid {threads}, 1, 1
{{
	.reg .pred 	%p<9>;
	.reg .f32 	%f<99>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;

	ld.param.u64 	%rd1, [test_param_0];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shr.u32 	%r3, %r1, 5;
	mov.u32 	%r9, 0;
{body}
	ret;

}}
"""


def run(body, memory, tensor_map=b"", also=(), threads=64, ranks=None):
    """With `memory` in %rd1 and at %rd3 the thread's word of it; %r1 is the thread, %r2 four times that, %r3 its warp.
    Arrays that may be read `also`; the tensor map is 64 bytes behind the parameter's beginning.
    """
    machine = Machine(parse(HEAD.format(threads=threads, body=body), "test"), 1, 65536)
    parameters = memory.ctypes.data.to_bytes(8, "little").ljust(64, b"\0") + tensor_map.ljust(128, b"\0")
    allocations = [(x.ctypes.data, x.nbytes) for x in (memory, *also)]
    machine.run(0, 1, parameters, allocations, observers=[Races(), Proxies()], ranks=ranks)
    return memory


# --- Barriers by number, and in shared memory -------------------------------------------------------------------------

# The second warp hands words to the first, which doubles them.
HAND = """
	setp.eq.s32 	%p1, %r3, 0;
	@%p1 bra $L_takes;
	st.shared.u32 	[%r2], %r1;
	{said}
	bra.uni $L_end;
$L_takes:
	{heard}
	ld.shared.u32 	%r4, [%r2+128];
	add.s32 	%r9, %r4, %r4;
	st.global.u32 	[%rd3], %r9;
$L_end:
"""
BY_NUMBER = "bar.arrive 3, 64;", "bar.sync 3, 64;"
PREPARED = """
	mov.u32 %r5, 1024;
	mov.u32 %r6, 32;
	setp.ne.s32 %p2, %r1, 0;
	@%p2 bra $L_made;
	mbarrier.init.shared::cta.b64 [%r5], %r6;
	fence.mbarrier_init.release.cluster;
$L_made:
	bar.sync 0;
	mov.u32 %r7, {parity};
"""
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r5];"
WAIT = "$L_again: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], %r7; @!%p3 bra $L_again;"
ORDERS = (None, [0, 1], [1, 0])


@pytest.mark.parametrize("ranks", ORDERS)
@pytest.mark.parametrize(
    "body",
    [
        HAND.format(said=BY_NUMBER[0], heard=BY_NUMBER[1]),
        PREPARED.format(parity=0) + HAND.format(said=ARRIVE, heard=WAIT),
    ],
    ids=["by number", "in shared memory"],
)
def test_one_warp_hands_to_another(body, ranks):
    found = run(body, np.zeros(32, np.int32), ranks=ranks)
    np.testing.assert_array_equal(found, 2 * np.arange(32, 64))


MISTAKES = {
    "nobody waits": (HAND.format(said=BY_NUMBER[0], heard=""), "race: `"),
    "nobody says": (HAND.format(said="", heard=BY_NUMBER[1]), "has left the kernel, while thread 0 is at `bar.sync 3"),
    "said before": (
        HAND.format(said="", heard=BY_NUMBER[1]).replace("st.shared", f"{BY_NUMBER[0]} st.shared"),
        "race: `",
    ),
    "different numbers": (HAND.format(said="bar.arrive 3, 96;", heard=BY_NUMBER[1]), "different numbers of threads"),
    "the phase before": (
        PREPARED.format(parity=1) + HAND.format(said=ARRIVE, heard=WAIT),
        "race: `|has left the kernel, while thread 0 is at `mbarrier",
    ),
    "no arrival": (PREPARED.format(parity=0) + HAND.format(said="", heard=WAIT), "has left the kernel, while thread 0"),
    "an arrival for what is on its way": (
        PREPARED.format(parity=0).replace("%r6, 32;", "%r6, 1;")
        + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], %r6;",
        "comes to a barrier .byte 1024. that all have come to",
    ),
    "no init": ("mov.u32 %r5, 1024; " + ARRIVE, "no barrier at byte 1024"),
    "init behind the barrier": (
        PREPARED.format(parity=0).replace("bar.sync 0;", "") + HAND.format(said=ARRIVE, heard=WAIT),
        "no barrier at byte 1024|race: `mbarrier",
    ),
    "fewer registers than there are": ("setmaxnreg.dec.sync.aligned.u32 20;", "does not know this form"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_with_barriers(what):
    body, message = MISTAKES[what]
    with pytest.raises(PtxError, match=message):
        for ranks in ORDERS:
            run(body, np.zeros(32, np.int32), ranks=ranks)


# --- The copy engine --------------------------------------------------------------------------------------------------

ARRAY = np.arange(2 * 5 * 3 * 40, dtype=np.uint16).reshape(2, 5, 3, 40)  # batch, rows, heads, dim
BOX = (64, 2, 4, 1)


def tensor_map():
    """Of ARRAY, as the stand-in makes them."""
    return struct.pack("=8sQ4Q3Q4I", b"standin4", ARRAY.ctypes.data, *ARRAY.shape[::-1], *ARRAY.strides[-2::-1], *BOX)


def box_at(x, y, z, w):
    """[8 rows, 64] of ARRAY from there on, zeros outside."""
    wide = np.pad(ARRAY, ((9, 9), (9, 9), (9, 9), (64, 64)))
    part = wide[w + 9 : w + 10, z + 9 : z + 13, y + 9 : y + 11, x + 64 : x + 128]
    return part.reshape(8, 64)


COPY = """
	setp.ne.s32 %p4, %r1, 0;
	@%p4 bra $L_copied;
	mov.u32 %r10, {x}; mov.u32 %r11, {y}; mov.u32 %r12, {z}; mov.u32 %r13, {w};
	mov.u32 %r14, {bytes};
	mov.b64 %rd4, test_param_0;
	add.s64 %rd5, %rd4, 64;
	cvta.param.u64 %rd6, %rd5;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], %r14;
	cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes
		[%r15], [%rd6, {{%r10, %r11, %r12, %r13}}], [%r5];
$L_copied:
"""
# 256 threads: each a word of the 8 rows of 128 bytes.
TAKE = "add.s32 %r16, %r15, %r2; ld.shared.u32 %r9, [%r16]; st.global.u32 [%rd3], %r9;"
ONE = PREPARED.format(parity=0).replace("%r6, 32;", "%r6, 1;") + "mov.u32 %r15, 2048;"


def copied(*parts, at=(0, 0, 0, 0), bytes_=1024):
    """What the parts leave in 256 words."""
    named = dict(zip("xyzw", at), bytes=bytes_)
    body = "".join(part.format(**named) if part is COPY else part for part in parts)
    found = run(body, np.zeros(256, np.uint32), tensor_map(), (ARRAY,), threads=256)
    return found.view(np.uint16).reshape(8, 8, 8)  # row, chunk as it lies, element


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (0, 1, 3, 1), (16, 2, -2, 1), (32, -1, 4, 2)], ids=str)
def test_boxes_are_swizzled_and_zero_outside(at):
    found = copied(ONE, COPY, WAIT, TAKE, at=at)
    rows, chunks = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    np.testing.assert_array_equal(found[rows, chunks ^ rows].reshape(8, 64), box_at(*at))


@pytest.mark.parametrize(
    "parts, bytes_, message",
    [
        ((ONE, COPY, TAKE), 1024, "copy has not been waited for"),
        ((ONE, COPY, WAIT, TAKE), 2048, "try_wait"),  # for ever
        ((ONE, COPY, WAIT, TAKE), 512, "1024 bytes come to a barrier .* of 512"),
        ((ONE.replace("2048", "2064"), COPY, WAIT, TAKE), 1024, "no multiple of 128"),
    ],
    ids=["not waited for", "more expected", "less expected", "not aligned"],
)
def test_mistakes_with_boxes(parts, bytes_, message):
    with pytest.raises(PtxError, match=message):
        copied(*parts, bytes_=bytes_)


def test_a_map_of_nobody():
    with pytest.raises(PtxError, match="that the driver has not made"):
        run(ONE + COPY.format(x=0, y=0, z=0, w=0, bytes=1024), np.zeros(64, np.int32))


# --- Products of warpgroups -------------------------------------------------------------------------------------------

COLUMNS = 128
RNG = np.random.default_rng(0)
LEFT = RNG.standard_normal((64, 64)).astype(np.float16)
ALONG = RNG.standard_normal((COLUMNS, 64)).astype(np.float16)  # rows of summed indices
ACROSS = RNG.standard_normal((32, COLUMNS)).astype(np.float16)  # summed indices one after the other
LEFT_AT, RIGHT_AT = 0, 8192


def panels(matrix):
    """As the copy engine would write it: panels of 64 columns, one behind the other, swizzled."""
    rows, columns = matrix.shape
    chunks = matrix.reshape(rows, columns // 64, 8, 8).transpose(1, 0, 2, 3)
    row, chunk = np.meshgrid(np.arange(rows), np.arange(8), indexing="ij")
    swizzled = np.empty_like(chunks)
    swizzled[:, row, chunk ^ row % 8] = chunks
    return swizzled.tobytes()


def descriptor(address, lead, stride, swizzle=1):
    return swizzle << 62 | (stride >> 4) << 32 | (lead >> 4) << 16 | address >> 4


SUMS = ", ".join(f"%f{n + 1}" for n in range(COLUMNS // 2))
BEGIN = "wgmma.fence.sync.aligned;"
FINISH = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"


def products(first, fence=FENCE, begin=BEGIN, finish=FINISH, right=ALONG):
    """[64, COLUMNS] that `first` (instructions) leaves in %f1 to %f64, of operands in shared memory."""
    content = np.frombuffer(panels(LEFT).ljust(RIGHT_AT, b"\0") + panels(right), np.uint32)
    memory = np.concatenate([content, np.zeros(64 * COLUMNS, np.uint32)])
    words = len(content) // 128
    load = "".join(f"ld.global.u32 %r20, [%rd3+{512 * n}]; st.shared.u32 [%r2+{512 * n}], %r20;" for n in range(words))
    zero = "".join(f"mov.f32 %f{n + 1}, 0f3F800000;" for n in range(COLUMNS // 2))  # 1
    out = f"mul.lo.s32 %r21, %r1, {2 * COLUMNS}; cvt.u64.u32 %rd7, %r21; add.s64 %rd8, %rd1, %rd7;"
    out += "".join(f"st.global.f32 [%rd8+{content.nbytes + 4 * n}], %f{n + 1};" for n in range(COLUMNS // 2))
    run(load + zero + fence + begin + first + finish + out, memory, threads=128)
    fragments = memory[len(content) :].view(np.float32).reshape(4, 8, 4, COLUMNS // 8, 2, 2)  # warp, g, t, n, half, i
    return fragments.transpose(0, 4, 1, 3, 2, 5).reshape(64, COLUMNS)


def multiply(k, adds, swizzle=1):
    left = descriptor(LEFT_AT + 32 * k, 16, 1024, swizzle)
    right = descriptor(RIGHT_AT + 32 * k, 16, 1024)
    return f"""
	mov.b64 %rd4, {left}; mov.b64 %rd5, {right}; mov.pred %p5, {adds};
	wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.f16.f16 {{{SUMS}}}, %rd4, %rd5, %p5, 1, 1, 0, 0;
"""


def own_words():
    """Of rows g and g + 8, columns 2 t and 2 t + 8 of LEFT's first 16, from where they lie in global memory."""
    text = """
	and.b32 %r30, %r1, 3; shr.u32 %r31, %r1, 2; and.b32 %r32, %r31, 7; shr.u32 %r33, %r1, 5; shl.b32 %r34, %r33, 4;
	add.s32 %r35, %r34, %r32; shl.b32 %r36, %r35, 7; shl.b32 %r37, %r30, 2;
"""
    for i, (row, chunk) in enumerate([(0, 0), (8, 0), (0, 1), (8, 1)]):
        text += f"""
	xor.b32 %r38, %r32, {chunk}; shl.b32 %r39, %r38, 4; add.s32 %r40, %r36, %r39; add.s32 %r41, %r40, %r37;
	cvt.u64.u32 %rd9, %r41; add.s64 %rd10, %rd1, %rd9; ld.global.u32 %r{50 + i}, [%rd10+{128 * row}];
"""
    return text


def multiply_registers(lead=32 * 128, stride=1024):
    right = descriptor(RIGHT_AT + 2048, lead, stride)  # summed indices 16 to 32 of two panels
    return f"""{own_words()}
	mov.b64 %rd5, {right};
	wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.f16.f16 {{{SUMS}}}, {{%r50, %r51, %r52, %r53}}, %rd5, 1, 1, 1, 1;
"""


def product(left, right):
    return left.astype(np.float64) @ right.astype(np.float64)


def test_products_of_shared_memory():
    found = products(multiply(0, 0) + multiply(1, -1) + multiply(3, -1))
    summed = np.r_[0:32, 48:64]
    np.testing.assert_allclose(found, product(LEFT[:, summed], ALONG[:, summed].T), rtol=1e-5, atol=1e-5)


def test_products_of_registers_with_what_lies_across():
    found = products(multiply_registers(), right=ACROSS)
    np.testing.assert_allclose(found, 1 + product(LEFT[:, :16], ACROSS[16:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"finish": "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"},
        {"finish": "wgmma.wait_group.sync.aligned 0;"},
    ],
    ids=["a weak wait", "no commit"],
)
def test_products_that_are_not_waited_for_are_nan(options):
    assert np.isnan(products(multiply(0, 0), **options)).all()


def test_operands_are_read_as_late_as_can_be():
    changed = "mov.b32 %r50, 0; mov.b32 %r51, 0; mov.b32 %r52, 0; mov.b32 %r53, 0;"
    found = products(multiply_registers() + changed, right=ACROSS)
    np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize(
    "first, options, message",
    [
        (multiply(0, 0), {"begin": ""}, "no wgmma.fence"),
        (multiply(0, 0), {"fence": "bar.sync 0;"}, "no fence.proxy.async"),
        (multiply(0, 0), {"fence": "fence.proxy.async.shared::cta;"}, "race: `wgmma"),
        (multiply(0, 0) + "st.shared.u32 [%r2], %r1;", {}, "race: `st.shared.u32"),
        (multiply(0, 0, swizzle=2), {}, "128-byte swizzle"),
        (multiply(0, 0) + multiply(1, 0).replace("%f1, %f2", "%f2, %f1"), {}, "another product under way"),
    ],
    ids=[
        "no fence",
        "no proxy fence",
        "no barrier",
        "written before it is waited for",
        "no swizzle",
        "parts of another",
    ],
)
def test_mistakes_with_products(first, options, message):
    with pytest.raises(PtxError, match=message):
        products(first, **options)
