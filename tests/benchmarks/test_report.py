"""The report of the benchmark suite (`bench --report`): its CSV, its comparison with an earlier one, its targets and
its options, on made-up rows; and one section for real. No test asserts a time."""

import dataclasses
import math
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
        "rows", "workloads", "report.command", "report.comparison",
        "report.progress", "report.sections", "report.tables", "report.targets",
    ) as modules:  # fmt: skip
        yield modules


def a_row(bench, workload="long_2048", mode="forward", threads=1, peer="attn_ops", seconds=0.1, **changes):
    what = bench.workloads.WORKLOADS[workload]
    changes = {"limit": "fma_float32", "limit_per_second": 1e11, "rounds": 3, "version": "lib 1.0", **changes}
    times = {name: seconds for name in ("wall_median", "wall_min", "cpu_median", "cpu_min")}
    rest = {"gflops_per_second": 1.0, "percent_of_limit": 50.0, "error": 1e-7}
    return bench.rows.Row(what.name, mode, threads, peer, what.shape, what.options, **{**times, **rest, **changes})


# --------------------------------------------------------------------------------------------------------------- rows


def test_rows_survive_the_csv_file(bench, tmp_path):
    rows = [
        a_row(bench),
        a_row(bench, "bert_base_512_float16", threads=2, version="keras 3, tensorflow 2", error=None),
        bench.rows.Row("w", "forward", 1, "p", "(1,32/8,1x9,64)", "", memory_growth_bytes=7),
    ]
    bench.rows.write(tmp_path / "x.csv", rows)
    assert bench.rows.read(tmp_path / "x.csv") == rows


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "must be a readable results.csv: .*No such file"),
        ("", "must have the columns workload,mode,threads,.*; it has nothing"),
        ("a,b\n1,2\n", "must have the columns workload,mode,threads,.*; it has a,b"),
    ],
)
def test_other_files_are_refused(bench, tmp_path, content, message):
    path = tmp_path / "old.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        bench.rows.read(path)


def test_a_value_that_is_none_is_named(bench, tmp_path):
    path = tmp_path / "old.csv"
    bench.rows.write(path, [a_row(bench, threads=77)])
    path.write_text(path.read_text().replace(",77,", ",many,"))
    with pytest.raises(ValueError, match=r"old.csv, line 2: threads \('many'\) must be a int"):
        bench.rows.read(path)


def test_time_and_memory_of_one_key_become_one_row(bench):
    time, memory = a_row(bench), a_row(bench, seconds=None, memory_growth_bytes=5, version="", rounds=0)
    (row,) = bench.rows.merge([time, memory])
    assert row == dataclasses.replace(time, memory_growth_bytes=5)
    assert time.memory_growth_bytes is None
    assert len(bench.rows.merge([time, a_row(bench, threads=2), a_row(bench, peer="jax")])) == 3


# --------------------------------------------------------------------------------------------------------- comparison


def test_changes_are_those_of_rows_in_both(bench):
    old = [a_row(bench, seconds=0.1), a_row(bench, peer="jax", seconds=1.0), a_row(bench, threads=2)]
    new = [a_row(bench, seconds=0.2), a_row(bench, peer="jax", seconds=3.0), a_row(bench, "bert_base_512")]
    found = bench.comparison.changes(old, new)
    assert [(change.row.peer, round(change.ratio, 6)) for change in found] == [("jax", 3), ("attn_ops", 2)]
    assert bench.comparison.changes([], new) == []


@pytest.mark.parametrize("factor, expected", [(1.1, ["attn_ops", "attn_ops_core"]), (1.2, ["attn_ops"]), (2.0, [])])
def test_only_our_rows_beyond_the_factor_count_as_slower(bench, factor, expected):
    peers = {"attn_ops": 2.0, "attn_ops_core": 1.15, "attn_ops_eager": 0.9, "torch_sdpa": 9.0}
    old = [a_row(bench, peer=peer, seconds=1.0) for peer in peers]
    new = [a_row(bench, peer=peer, seconds=seconds) for peer, seconds in peers.items()]
    worse = bench.comparison.slower(bench.comparison.changes(old, new), factor)
    assert [change.row.peer for change in worse] == expected
    if worse:
        assert str(worse[0]) == "attn_ops, long_2048 (1,12,2048,64), forward, 1 thread: 1e+03 -> 2e+03 ms (2.00x)"


def test_another_machine_shows_in_the_limits(bench):
    old, new = [a_row(bench, limit_per_second=1e9)], [a_row(bench, limit_per_second=3e9)]
    assert bench.comparison.limit_ratio(old, new) == 3
    assert bench.comparison.limit_ratio([], new) is None


# ------------------------------------------------------------------------------------------------------------ targets


def verdict_of(bench, rows, section, work, threads=1):
    wanted = (bench.sections.TITLES[section], work, threads)
    (verdict,) = [v for v in bench.targets.evaluate(rows) if (v.section, v.work, v.threads) == wanted]
    return verdict


def test_a_part_of_the_limit_is_judged_by_its_worst_workload(bench):
    rows = [a_row(bench, name, percent_of_limit=90 + i) for i, name in enumerate(bench.sections.FULL)]
    work = "full, N >= 512: part of the FMA peak"
    assert verdict_of(bench, rows, "forward", work).met is True
    rows[1].percent_of_limit = 84.9
    missed = verdict_of(bench, rows, "forward", work)
    assert missed.met is False and missed.value == "85 % (long_2048), best 92 %" and missed.target == ">= 85 %"


def test_a_target_is_met_only_when_all_of_it_was_measured(bench):
    work = "full, N >= 512: part of the FMA peak"
    some = verdict_of(bench, [a_row(bench, percent_of_limit=99)], "forward", work)
    assert some.met is None and "2 not measured" in some.value
    assert verdict_of(bench, [a_row(bench, percent_of_limit=9)], "forward", work).met is False
    none = verdict_of(bench, [a_row(bench, peer="jax")], "forward", work)
    assert none.met is None and none.value == "not measured"


@pytest.mark.parametrize(
    "threads, fastest, met", [(1, 1.16, True), (1, 1.14, False), (2, 1.24, False), (2, 1.26, True)]
)
def test_the_fastest_rival_counts(bench, threads, fastest, met):
    rows = []
    for name in bench.sections.FULL:
        rows += [a_row(bench, name, threads=threads, seconds=1.0)]
        rows += [a_row(bench, name, threads=threads, peer="ort_mha", seconds=fastest)]
        rows += [a_row(bench, name, threads=threads, peer="torch_sdpa", seconds=5.0)]
        rows += [a_row(bench, name, threads=threads, peer="keras_graph", seconds=0.1)]  # no rival in this target
    work = "full, N >= 512: the best of torch, onnxruntime, OpenVINO takes"
    assert verdict_of(bench, rows, "forward", work, threads).met is met


def test_times_that_must_be_short(bench):
    base, (padded, window, segments) = bench.sections.MASKS_BASE, bench.sections.MASKS
    times = {base: 1.0, padded: 0.59, window: 0.1, segments: 0.31}
    rows = [a_row(bench, name, seconds=seconds) for name, seconds in times.items()]
    assert verdict_of(bench, rows, "masks", "50 % padding: of the full time").met is True
    left = verdict_of(bench, rows, "masks", "window, segments: of the full time's part that is left")
    assert left.met is False and left.value.startswith("1.24x (long_2048_segments)")


def test_scaling_compares_one_process(bench):
    rows = []
    for name in bench.sections.SCALING:
        rows.append(a_row(bench, name, threads=2, peer="attn_ops_core", seconds=1.0))
        rows.append(a_row(bench, name, threads=2, peer="attn_ops_core_1_thread", seconds=1.91))
    verdict = verdict_of(bench, rows, "threads", "kernel, forward: 1 thread takes", threads=2)
    assert verdict.met is True and verdict.target == ">= 1.9x"


@pytest.mark.parametrize("extra, met", [(99e6, True), (101e6, False)])
def test_memory_is_counted_beyond_the_outputs(bench, extra, met):
    name = bench.sections.MEMORY
    outputs = bench.targets.output_bytes(bench.workloads.WORKLOADS[name])
    assert outputs == 4 * 4 * 8 * 16384 * 64
    rows = [a_row(bench, name, "forward_backward", seconds=None, memory_growth_bytes=int(outputs + extra))]
    assert verdict_of(bench, rows, "memory", "forward + backward grows beyond inputs and outputs by").met is met


def test_every_target_is_about_what_its_section_measures(bench):
    peers = {name: set() for name in bench.sections.TITLES}
    for section in bench.sections.TITLES:
        for group in bench.sections.groups(section, 2, 2, None, quick=False):
            peers[section] |= {entry.workload.name for entry in group.entries}
    peers["memory"] = {name for name, _ in bench.sections.memory_runs(None, quick=False)}
    for target in bench.targets.TARGETS:
        assert set(target.workloads) <= peers[target.section], target.work


def test_tables_show_every_row(bench):
    rows = [a_row(bench), a_row(bench, peer="jax", seconds=0.3), a_row(bench, mode="forward_backward", threads=2)]
    text = bench.tables.details(rows)
    assert "**long_2048 (1,12,2048,64), forward, 1 thread** (3 rounds)" in text
    assert "**long_2048 (1,12,2048,64), forward + backward, 2 threads** (3 rounds)" in text
    assert "| jax | 300 | 300 | 300 | 300 | 1.0 | 50 | 3.00 | 3.00 | 1e-07 |" in text
    table = bench.tables.verdicts(bench.targets.evaluate(rows))
    assert table.count("\n") == 1 + len(bench.targets.evaluate(rows))


# ---------------------------------------------------------------------------------------------- workloads and progress


def test_work_left(bench):
    workload = bench.workloads.WORKLOADS["long_2048"]
    variant = lambda **changes: dataclasses.replace(workload, **changes)
    assert workload.work_left() == 1 and variant(is_causal=True).work_left() == 0.5
    assert variant(mask="padding").work_left() == 0.5 and variant(mask="segments").work_left() == 0.25
    for window in ((256, 0), (5, 3), (0, 0), (5000, 5000)):
        windowed = variant(window=window)
        mask = bench.workloads.dense_mask(windowed, {})
        assert math.isclose(windowed.work_left(), mask.mean())


def test_quick_lengths_stay_apart(bench):
    quick = [bench.workloads.WORKLOADS[name].quick() for name in bench.sections.LENGTHS]
    assert [workload.seqlen_k for workload in quick] == [16, 64, 128, 256, 512]
    assert bench.workloads.WORKLOADS["llama8b_decode_1k"].quick().is_decode


def test_plain_lines_where_there_is_no_terminal(bench, capsys):
    with bench.progress.Progress(2) as progress:
        for title, done in (("one", 0), ("one", 0.5), ("two", 1)):
            progress.advance(title, done)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "[1/2] one" and second.startswith("[2/2] two, about ") and second.endswith(" left")


# ------------------------------------------------------------------------------------------------------------ command


def run(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "attn_ops", "bench", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--compare", "/none.csv"], "/none.csv must be a readable results.csv"),
        (["--fail-if-slower", "0"], "--fail-if-slower (0.0) must be above 0"),
        (["--fail-if-slower", "1.1"], "--fail-if-slower needs --compare OLD.csv"),
        (["--threads", "0"], "--threads (0) must be from 1 to the"),
        (["--sections", "speed"], "--sections (speed) must be among forward, short,"),
        (["--rounds", "0"], "--rounds (0) must be at least 1"),
        (["--seconds", "nan"], "--seconds (nan) must be above 0"),
        (["--peers", "numpy"], "--peers (numpy) must be among attn_ops,"),
    ],
)
def test_bad_options(bench, capsys, tmp_path, options, message):
    assert bench.command.main(["--report", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_cannot_be_written(bench, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert bench.command.main(["--report", str(tmp_path / "file")]) == 2
    assert "must be a directory that can be written" in capsys.readouterr().err


def test_nothing_to_compare_with_is_no_success(bench, capsys, tmp_path):
    arguments = bench.command._parser().parse_args(
        ["--report", str(tmp_path), "--compare", "old.csv", "--fail-if-slower", "2", "--sections", "overhead"]
    )
    surveyed = {"fma_float32": {("generic", 1): 1e9}}
    old, new = [a_row(bench, threads=2)], [a_row(bench)]
    assert bench.command._tell(arguments, tmp_path, new, ["a note"], surveyed, old) == 2
    assert "no row of attn_ops is in both this report and old.csv" in capsys.readouterr().err
    report = (tmp_path / "report.md").read_text()
    assert "- a note" in report and "| FMA float32, GFLOP/s | 1.0 |" in report


def test_what_is_missing_is_named(bench, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.command._NEEDED, "no_such_module", "no-such-package")
    assert bench.command.main(["--report", str(tmp_path)]) == 2
    assert "pip install no-such-package" in capsys.readouterr().err


def test_one_section_from_end_to_end(bench, tmp_path):
    # An earlier report in which one of the two rows took no time at all, and the other for ever.
    quick = bench.workloads.WORKLOADS["one_token"].quick()
    old = [a_row(bench, "one_token", peer=peer) for peer in ("attn_ops_eager", "attn_ops_core")]
    for row, seconds in zip(old, (1e-12, 1e12)):
        row.workload, row.wall_median = quick.name, seconds
    bench.rows.write(tmp_path / "old.csv", old)

    options = ["--quick", "--sections", "overhead", "--peers", "attn_ops", "--threads", 1]
    options += ["--compare", tmp_path / "old.csv", "--fail-if-slower", 1.1]
    done = run("--report", tmp_path / "new", *options)
    assert done.returncode == 3, done.stderr
    assert "These figures are not to be quoted" in done.stdout
    assert "| one_token-quick (1,1,1,64) | forward | 1 | " in done.stdout and "met" not in done.stdout
    assert "1 of 2 rows of attn_ops take more than 1.1x their time" in done.stdout
    assert done.stderr.startswith("[1/1] overhead: one_token")
    assert "slower: attn_ops_eager, one_token-quick (1,1,1,64), forward, 1 thread" in done.stderr

    report = (tmp_path / "new" / "report.md").read_text()
    titles = ("Times", "Compared with old.csv", "Limits of the machine", "All rows")
    assert all(f"## {title}" in report for title in titles)
    rows = bench.rows.read(tmp_path / "new" / "results.csv")
    assert {row.peer for row in rows} == {"attn_ops_eager", "attn_ops_core"}
    assert all(row.wall_median > 0 and row.limit_per_second > 0 and row.error < 1e-5 for row in rows)
