"""The benchmark suite of GPUs where there is none: all but the device itself, with PyTorch on the CPU in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_modules import bench_modules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    with bench_modules(
        "rows", "gpu.command", "gpu.device", "gpu.measure",
        "gpu.peers", "gpu.tables", "gpu.workloads", "report.comparison",
    ) as modules:  # fmt: skip
        yield modules


def a_row(bench, seconds=1e-3, peer="attn_ops_cuda", which="forward", **changes):
    workload, mode = bench.workloads.section(which)[0]
    values = {"rounds": 3, "wall_median": seconds, "wall_min": seconds, "gflops_per_second": 5e5, "error": 1e-3}
    values |= {"limit": "copy" if workload.is_decode else "matmul", "limit_per_second": 8e14, "percent_of_limit": 50.0}
    return bench.rows.Row(workload.name, mode, 1, peer, workload.shape, workload.options, **{**values, **changes})


# ------------------------------------------------------------------------------------------------ without PyTorch


def test_work_is_counted_as_publications_do(bench):
    shapes = {workload.name: (workload, mode) for workload, mode in bench.workloads.section("forward")}
    workload, mode = shapes["d128_4096"]
    assert (workload.batch * workload.seqlen_q, workload.num_heads * workload.head_dim) == (16384, 2048)
    assert bench.workloads.flops(workload, mode) == 4 * 4 * 16 * 4096**2 * 128
    causal, _ = shapes["d128_4096_causal"]
    assert bench.workloads.flops(causal, "backward") == 2.5 * bench.workloads.flops(workload, mode) / 2


def test_sections_have_the_shapes_that_matter(bench):
    for name in bench.workloads.TITLES:
        found = [f"{workload} {mode}" for workload, mode in bench.workloads.section(name)]
        assert len(set(found)) == len(found) > 3
        assert 1 < len(bench.workloads.section(name, quick=True)) <= 6
    assert {workload.num_kv_heads for workload, _ in bench.workloads.section("decode")} == {8}
    assert {workload.head_dim for workload, _ in bench.workloads.section("backward")} == {64, 128, 256}


def test_the_default_plan_measures_for_half_of_eight_minutes(bench):
    """The other half is for inputs, and for what peers take to start."""
    chosen = bench.command._parser().parse_args([])
    plan = [work for name in chosen.sections for work in bench.workloads.section(name)]
    assert len(plan) * chosen.seconds <= 4 * 60


def test_tables_give_the_rate_that_bounds(bench):
    rows = [a_row(bench), a_row(bench, 2e-3, "torch_cudnn"), a_row(bench, which="decode", limit_per_second=4e12)]
    text = bench.tables.details(rows)
    assert "| peer | us: median | min | TFLOP/s | % of matmul | x | error |" in text
    assert "| torch_cudnn | 2000 | 2000 | 500 | 50 | 2.00 | 1e-03 |" in text
    assert "| GB/s | % of copy |" in text and "| 2000 | 50 | 1.00 |" in text
    limits = bench.tables.limits(rows)
    assert "TFLOP/s | 800 | 800 |" in limits and "copy, GB/s | 4000 | 4000 |" in limits


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sections", "speed"], "--sections (speed) must be among forward, backward, decode, float32"),
        (["--peers", "numpy"], "--peers (numpy) must be among attn_ops_cuda,"),
        (["--rounds", "0"], "--rounds (0) must be at least 1"),
        (["--seconds", "nan"], "--seconds (nan) must be above 0"),
        (["--fail-if-slower", "1.1"], "--fail-if-slower needs --compare OLD.csv"),
        (["--triton-tutorial", "/none.py"], "--triton-tutorial (/none.py) must be a file"),
    ],
)
def test_bad_options(bench, capsys, options, message):
    assert bench.command.main(options) == 2
    assert message in capsys.readouterr().err


def test_no_device_is_said_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "attn_ops", "bench", "--device", "cuda", "--quick"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.startswith("bench: --device cuda needs a GPU: PyTorch"), done.stderr
    assert "Traceback" not in done.stderr


def test_the_suite_never_imports_tensorflow():
    code = "import sys, gpu.command, gpu.charts; gpu.command.all_peers(); assert 'tensorflow' not in sys.modules"
    path = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)


# --------------------------------------------------------------------------------------- with PyTorch, on the CPU


@pytest.fixture
def peers(bench):
    """PyTorch's own formula as ours and as a peer, and one that is wrong."""
    pytest.importorskip("torch")
    half = ("bfloat16", "float32")

    class Wrong(bench.peers.TorchSdpa):
        def attend(self, workload, q, k, v):
            return 1.5 * super().attend(workload, q, k, v)

    found = (
        bench.peers.TorchSdpa("attn_ops_cuda", "MATH", half),
        bench.peers.TorchSdpa("torch_math", "MATH", half),
        Wrong("wrong", "MATH", half),
    )
    return {peer.name: peer for peer in found}


def test_from_end_to_end(bench, capsys, peers, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    cpu = bench.device.Cpu()
    first = ["--quick", "--report", str(tmp_path)]
    assert bench.command.main(first, cpu, peers) == 0
    said = capsys.readouterr().out
    assert "These figures are not to be quoted" in said and "## Not measured" in said
    rows = bench.rows.read(tmp_path / "gpu_results.csv")
    assert {row.peer for row in rows} == {"attn_ops_cuda", "torch_math"}
    assert {row.mode for row in rows} == {"forward", "backward"} and {row.limit for row in rows} == {"matmul", "copy"}
    assert all(row.wall_median > 0 and row.percent_of_limit > 0 and row.error < 0.05 for row in rows)
    report = (tmp_path / "gpu_report.md").read_text()
    assert "- wrong, d64_512-quick" in report and "AssertionError: error" in report
    assert (tmp_path / "gpu_decode.png").exists() and "](gpu_decode.png)" in report

    for row in rows:  # an earlier run that took no time at all
        row.wall_median = 1e-12
    bench.rows.write(tmp_path / "old.csv", rows)
    again = ["--quick", "--sections", "decode", "--compare", str(tmp_path / "old.csv"), "--fail-if-slower", "1.1"]
    assert bench.command.main(again, cpu, peers) == 3
    assert "slower: attn_ops_cuda, decode_b1_1024-quick" in capsys.readouterr().err


def test_ours_must_be_there(bench, capsys):
    pytest.importorskip("torch")
    assert bench.command.main(["--quick"], bench.device.Cpu()) == 2
    assert "attn_ops_cuda cannot be measured: there is no CUDA device" in capsys.readouterr().err


def test_inputs_rotate_through_more_than_the_cache(bench, peers):
    prepared = []

    class Counting(bench.device.Cpu):
        cache_bytes = 1 << 20

    class Peer(bench.peers.TorchSdpa):
        def prepare(self, device, workload, mode, inputs):
            prepared.append(inputs["key"].data_ptr())
            return lambda inputs=inputs: [inputs["query"]]

    workload, mode = bench.workloads.section("decode", quick=True)[0]
    bench.measure._rotating(Counting(), Peer("p", "MATH", ("bfloat16",)), workload, mode)
    assert len(set(prepared)) * bench.workloads.input_bytes(workload) >= 2 << 20
