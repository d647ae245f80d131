"""The interpreter by itself, on PTX written here: control, memory, and what it must find. No compiler is needed.

Instructions on numbers and fragments are compared with NumPy in ../test_layer.py, where there is a compiler.
"""

import numpy as np
import pytest

from cuda_host.ptx.banks import Banks
from cuda_host.ptx.machine import Machine
from cuda_host.ptx.program import PtxError, parse
from cuda_host.ptx.races import Races

HEAD = """
.visible .entry test(
	.param .u64 test_param_0[8]
)
.maxntid {threads}, 1, 1
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<99>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;

	ld.param.u64 	%rd1, [test_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, {threads}, %r1;
	mul.wide.s32 	%rd2, %r3, 4;
	add.s64 	%rd3, %rd1, %rd2;
	mul.lo.s32 	%r4, %r1, 4;
{body}
	st.global.u32 	[%rd3], %r9;
	ret;

}}
"""


def run(body, out=64, threads=64, blocks=1, shared_bytes=1024, observers=()):
    """What the threads leave in %r9, by a kernel in which %r1 is the thread, %r3 the number of it in the grid, %r4
    four times %r1.
    """
    program = parse(HEAD.format(threads=threads, body=body), "test")
    machine = Machine(program, blocks, shared_bytes)
    values = np.zeros(out, np.int32)
    address = values.ctypes.data
    machine.run(0, blocks, address.to_bytes(8, "little"), [(address, values.nbytes)], observers=observers)
    return values


# --- Control ------------------------------------------------------------------------------------------------------


def test_ways_part_and_meet():
    body = """
	and.b32 %r5, %r1, 3;
	mov.u32 %r9, 0;
	setp.eq.s32 %p1, %r5, 0;
	@%p1 bra 	$L_end;
$L_loop:
	add.s32 %r9, %r9, %r5;
	add.s32 %r5, %r5, -1;
	setp.ne.s32 %p2, %r5, 0;
	@%p2 bra $L_loop;
	shl.b32 %r9, %r9, 1;
	bra.uni $L_end;
	mov.u32 %r9, 77;
$L_end:
	add.s32 %r9, %r9, 1;
"""
    lane = np.arange(128) % 4
    np.testing.assert_array_equal(run(body, out=128, blocks=2), lane * (lane + 1) + 1)


def test_registers_of_an_inner_scope_are_others():
    body = """
	setp.eq.s32 	%p1, %r1, 5;
	{
	.reg .pred 	%p1;
	setp.ge.s32 	%p1, %r1, 0;
	}
	selp.b32 	%r9, 3, 4, %p1;
"""
    np.testing.assert_array_equal(run(body), np.where(np.arange(64) == 5, 3, 4))


def test_lanes_of_a_warp_wait_for_each_other():
    """Half of them take a longer way to the shuffle, by which lane l hears of lane l ^ 1."""
    body = """
	and.b32 %r5, %r1, 1;
	mov.u32 %r6, %r1;
	setp.eq.s32 %p1, %r5, 0;
	@%p1 bra $L_meet;
	add.s32 %r6, %r6, 1000;
$L_meet:
	shfl.sync.bfly.b32 %r9|%p2, %r6, 1, 31, -1;
"""
    other = np.arange(64) ^ 1
    np.testing.assert_array_equal(run(body), other + 1000 * (other & 1))


def test_barriers_are_of_a_block():
    """Blocks come to their barriers a different number of times."""
    body = """
	add.s32 %r5, %r2, 1;
	mov.u32 %r9, 0;
$L_loop:
	st.shared.u32 [%r4], %r9;
	bar.sync 0;
	xor.b32 %r6, %r4, 128;
	ld.shared.u32 %r7, [%r6];
	bar.sync 0;
	add.s32 %r9, %r7, 1;
	add.s32 %r5, %r5, -1;
	setp.ne.s32 %p1, %r5, 0;
	@%p1 bra $L_loop;
"""
    expected = np.repeat(np.arange(1, 6), 64)
    np.testing.assert_array_equal(run(body, out=320, blocks=5, observers=[Races()]), expected)


ERRORS = {
    "left": (
        "setp.eq.s32 %p1, %r1, 40; @%p1 bra $L; bra.uni $M; $L: ret; $M: bar.sync 0;",
        "thread 40 has left the kernel",
    ),
    "divergent shuffle": (
        "setp.eq.s32 %p1, %r1, 40; @%p1 bra $L; shfl.sync.bfly.b32 %r9|%p2, %r1, 1, 31, -1; bra.uni $M;"
        "$L: bar.warp.sync -1; $M:",
        "is at `bar.warp.sync|is at `shfl",
    ),
    "two kinds of barrier": (
        "setp.lt.s32 %p1, %r1, 32; @%p1 bra $L; bar.sync 0; bra.uni $M; $L: bar.red.or.pred %p2, 0, %p1; $M:",
        "barriers of two kinds",
    ),
    "outside": ("ld.global.u32 %r9, [%rd3+4];", "256 bytes into an allocation of 256"),
    "before": ("ld.global.u32 %r9, [%rd3+-4];", "outside all allocations"),
    "odd": ("ld.global.u32 %r9, [%rd3+2];", "that is not aligned"),
    "odd vector": ("ld.global.v2.u32 {%r8, %r9}, [%rd3];", "that is not aligned"),
    "outside shared": ("ld.shared.u32 %r9, [%r4+800];", "outside the block's 1024"),
    "copy": (
        "cp.async.cg.shared.global [%r4], [%rd3], 16, 16;",
        "16 bytes of shared memory at an address that is not aligned",
    ),
    "copy from": (
        "shl.b32 %r5, %r1, 4; cp.async.cg.shared.global [%r5], [%rd1+248], 16, 16;",
        "not aligned|outside all",
    ),
    "parameter": ("ld.param.u32 %r9, [test_param_0+8];", "outside the 8 bytes"),
    "unknown": ("sin.approx.f32 %f1, %f2;", "the interpreter has no sin"),
    "unknown form": ("shfl.sync.up.b32 %r9|%p2, %r1, 1, 31, -1;", "does not know this form"),
    "guard": ("@%p1 add.s32 %r9, %r1, 1;", "only branches have guards"),
    "no such register": ("add.s32 %q1, %r1, 1;", "%q1 is not declared"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_found(what):
    body, message = ERRORS[what]
    with pytest.raises(PtxError, match=message):
        run(body)


# --- Copies and races -----------------------------------------------------------------------------------------------

COPY = """
	shl.b32 %r5, %r1, 2;
	cp.async.ca.shared.global [%r5], [%rd3], 4, 4;
	cp.async.commit_group;
	cp.async.ca.shared.global [%r5+256], [%rd3], 4, 0;
	cp.async.commit_group;
"""


@pytest.mark.parametrize("pending, expected", [(0, (0, 0)), (1, (0, -1)), (2, (-1, -1))])
def test_copies_arrive_when_waited_for(pending, expected):
    for offset, value in zip((0, 256), expected):
        body = f"{COPY} cp.async.wait_group {pending}; ld.shared.u32 %r9, [%r5+{offset}];"
        np.testing.assert_array_equal(run(body), value)


def exchange(first="bar.sync 0;", second="bar.sync 0;", distance=128):
    """Twice: every thread stores, and loads what the thread `distance` / 4 further on has stored."""
    once = f"st.shared.u32 [%r4], %r1; {first} xor.b32 %r6, %r4, {distance}; ld.shared.u32 %r9, [%r6]; {second}"
    return once + once.replace("%r1;", "%r9;")


RACES = {
    "right": (exchange(), None),
    "no barrier after stores": (exchange(first=""), "race: `ld.shared.u32"),
    "no barrier before stores": (exchange(second=""), "race: `st.shared.u32"),
    "a barrier of the warp alone": (exchange(first="bar.warp.sync -1;"), "race: `ld.shared.u32"),
    "within a warp": (exchange("bar.warp.sync -1;", "bar.warp.sync -1;", distance=64), None),
    "within a warp, no barrier": (exchange("", "bar.warp.sync -1;", distance=64), "race: `ld.shared.u32"),
    "of a thread's own": ("st.shared.u32 [%r4], %r1; ld.shared.u32 %r9, [%r4]; st.shared.u32 [%r4], %r9;", None),
    "two in one instruction": ("mov.u32 %r5, 0; st.shared.u32 [%r5], %r1;", "race: `st.shared.u32"),
    "the same value": ("mov.u32 %r5, 0; st.shared.u32 [%r5], %r2; st.shared.u32 [%r5], %r2;", None),
    "copies": (f"{COPY} cp.async.wait_group 0; bar.sync 0; xor.b32 %r5, %r5, 64; ld.shared.u32 %r9, [%r5];", None),
    "copies without a barrier": (
        f"{COPY} cp.async.wait_group 0; xor.b32 %r5, %r5, 64; ld.shared.u32 %r9, [%r5];",
        "race: `ld.shared.u32.*cp.async.wait_group",
    ),
    "copies not waited for": (
        f"{COPY} cp.async.wait_group 1; bar.sync 0; ld.shared.u32 %r9, [%r5+256];",
        "not been waited for",
    ),
    "copies over what is read": (f"ld.shared.u32 %r9, [%r4+128]; {COPY}", "race: `cp.async.ca"),
}


@pytest.mark.parametrize("what", RACES)
def test_races(what):
    body, message = RACES[what]
    if message is None:
        run(body, observers=[Races()])
        return
    with pytest.raises(PtxError, match=message):
        run(body, observers=[Races()])


# --- Banks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load, passes, least",
    [
        ("ld.shared.u32 %r9, [%r4];", 2, 2),
        ("shl.b32 %r5, %r1, 3; ld.shared.u32 %r9, [%r5];", 4, 2),  # two lanes on each bank
        ("and.b32 %r5, %r4, 64; ld.shared.u32 %r9, [%r5];", 2, 2),  # many lanes on one word
        ("shl.b32 %r5, %r1, 7; ld.shared.u32 %r9, [%r5];", 64, 2),  # all lanes on one bank
        ("shl.b32 %r5, %r1, 4; ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];", 8, 8),
        ("shl.b32 %r5, %r1, 5; ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];", 16, 8),
    ],
    ids=["words", "every other", "the same", "a column", "16 bytes", "every other 16"],
)
def test_passes_are_counted(load, passes, least):
    banks = Banks()
    run(load, shared_bytes=8192, observers=[banks])
    [count] = banks.counts.values()
    assert (count.passes, count.least) == (passes, least)
