"""What the kernels are made of has not changed by more than 5 %: csrc/cuda/counts.csv, which csrc/cuda/count.py writes.

Where nvcc is the one that the table was made with; without NVIDIA's disassembler, only the registers are looked at.
"""

import sys

import pytest

from cuda_host.ptx import compiled

sys.path.insert(0, str(compiled.CUDA))
import count  # noqa: E402

KERNELS = [
    *("forward_bf16_64_plain", "dq_bf16_64_plain", "dkdv_bf16_64_plain", "forward_f32_64_plain", "decode_bf16_64"),
    *("forward_bf16_128_plain", "dq_bf16_128_plain", "dkdv_bf16_128_plain", "decode_f16_128", "dqkv_f32_64"),
]
ALLOWED = 0.05


def test_the_table_has_every_kernel():
    _, rows = count.read_table()
    names = {name for name in count.shapes() if "tf32" not in name or "decode" not in name}
    assert {kernel for kernel, _ in rows} <= names
    assert {(kernel, architecture) for kernel in {k for k, _ in rows} for architecture in count.ARCHITECTURES} == set(
        rows
    )
    assert all(f"attn_ops_{kernel}" in {k for k, _ in rows} for kernel in KERNELS)
    assert not any(row["spilled"] for row in rows.values())


def test_two_blocks_of_the_backward_share_a_multiprocessor_with_100_kb():
    """As many as there are registers for."""
    kernels = [f"attn_ops_{role}_bf16_{dim}_plain" for role in ("dq", "dkdv") for dim in (64, 96, 128)]
    shapes = count.shapes()
    assert {count.blocks("sm_120", *shapes[kernel], 255) for kernel in kernels} == {2}


@pytest.mark.wide(5)
@pytest.mark.parametrize("kernel", KERNELS)
def test_counts(kernel):
    if compiled.missing_reason():
        pytest.skip(compiled.missing_reason())
    release, rows = count.read_table()
    if f"nvcc {count.nvcc_release()}" != release:
        pytest.skip(f"the table is of {release}")
    ptx = compiled.compiled((f"attn_ops_{kernel}",))
    changes = []
    for architecture in count.ARCHITECTURES:
        [found] = count.count(ptx, architecture)
        for name, was in rows[found["kernel"], architecture].items():
            if isinstance(was, int) and abs(found.get(name, was) - was) > ALLOWED * was:
                changes.append(f"{architecture} {name}: {was} → {found[name]}")
    assert not changes, f"{kernel}: {', '.join(changes)}. If that is meant: python csrc/cuda/count.py"


LOOPS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R21], [R22.64], !P1 ;
.L_x_2:
        /*0040*/               @P1 BRA `(.L_x_4) ;
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0080*/               @P2 CALL.REL.NOINC `(.L_x_5) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00c0*/                   STS [R1], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   NOP;
"""


def test_the_way_once_around_a_loop():
    """With the copy, which not every turn makes, and by the shorter of two ways, which lies behind the loop."""
    code = count.blocks_of_code(LOOPS)["kernel"]
    assert sum(block.counts["instructions"] for _, block in code) == 14
    expected = {"instructions": 9, "hmma": 1, "ldsm": 1, "ldgsts": 1, "lds": 0, "sts": 0}
    assert count.around_the_loop(code) == expected


@pytest.mark.parametrize(
    "architecture, threads, shared_bytes, registers, expected",
    [
        ("sm_80", 128, 32832, 214, 2),  # 216 registers: 4 warps 27,648 of 65,536
        ("sm_80", 128, 68608, 134, 2),  # 2 (67 + 1) KB of 164
        ("sm_90a", 128, 68608, 136, 3),  # of 228
        ("sm_80", 256, 0, 32, 8),  # 2,048 threads
    ],
)
def test_blocks_of_a_multiprocessor(architecture, threads, shared_bytes, registers, expected):
    assert count.blocks(architecture, threads, shared_bytes, registers) == expected
