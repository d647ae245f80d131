"""The inputs that the fuzzer kept, without it: validation and all that is between it and the kernels are compiled on the spot with
AddressSanitizer and UndefinedBehaviorSanitizer, kernels are those that the build left, and every array lies between pages that
cannot be touched. Kernels with sanitizers, the operators and XLA: run.py, by hand."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from package.test_compiled_files import isa_list, newest_object
from sanitize import fuzz, reports

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """The program that runs inputs."""
    objects = [newest_object(isa) for isa in isa_list()]
    if platform.system() != "Linux" or None in objects:
        pytest.skip("needs the objects of the kernels, which a build in this checkout leaves in build/")
    program = tmp_path_factory.mktemp("sanitize") / "replay"
    flags = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
    sources = [HERE / "fuzz_target.cc", ROOT / "csrc/cpu/dispatch.cc"]
    command = [os.environ.get("CXX", "g++"), *flags, "-DATTN_OPS_REPLAY", f"-I{ROOT / 'csrc'}", *sources, *objects, "-o", program]
    subprocess.run([str(part) for part in command], check=True)
    return program


def run(program, *paths, **variables):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", **variables}
    return subprocess.run([program, *paths], capture_output=True, text=True, env=environment)


def test_kept_inputs(replay, tmp_path):
    paths = fuzz.unpacked(tmp_path)
    ended = run(replay, *paths)
    assert ended.returncode == 0, ended.stderr[-3000:]
    ran, refused, _ = (int(part.split()[0]) for part in ended.stdout.split(", "))
    assert ran > 30 and refused > 5, ended.stdout


def test_the_pages_behind_arrays_are_watched(tmp_path):
    """That the replay would see a kernel that goes on: one byte further ends the process."""
    source = (HERE / "fuzz_target.cc").read_text().partition("enum class End")[0]
    main = "}\nint main() { Block b(100, 1); b.data()[99] = 2; b.data()[100] = 3; }\n"
    program = tmp_path / "watched"
    flags = ["-std=c++17", "-O0", "-DATTN_OPS_REPLAY", f"-I{ROOT / 'csrc'}", "-w", "-fsyntax-only"]
    block = source[: source.index("// What the node should look like")]
    command = [os.environ.get("CXX", "g++"), *[flag for flag in flags if flag != "-fsyntax-only"], "-x", "c++", "-", "-o", program]
    subprocess.run([str(part) for part in command], input=block + main, text=True, check=True)
    assert run(program).returncode == -11


ADDRESS = """==12==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60
WRITE of size 64 at 0x60 thread T0
    #0 0x1 in {frame} {file}:40
    #1 0x2 in tensorflow::Executor::Run() (/libtensorflow_cc.so.2+0x1)
"""
RACE = """==================
WARNING: ThreadSanitizer: data race (pid=1)
  Write of size 4 at 0x1 by thread T1:
    #0 {one} a.cc:1

  Previous read of size 4 at 0x1 by thread T2:
    #0 {other} b.cc:1

  Location is heap block of size 9
"""


@pytest.mark.parametrize(
    "report, ours",
    [
        (ADDRESS.format(frame="attn_ops::cpu::forward", file="csrc/cpu/forward.h"), True),
        (ADDRESS.format(frame="Eigen::Tensor", file="eigen.h"), False),
        ("/x/csrc/cpu/pack.h:26:5: runtime error: signed integer overflow\n    #0 0x1 in f\n", True),
        ("/x/eigen/pack.h:26:5: runtime error: signed integer overflow\n    #0 0x1 in f\n", False),
        (RACE.format(one="attn_ops::Job::work", other="attn_ops::Job::wait"), True),
        (RACE.format(one="attn_ops::Job::work", other="posix_memalign"), False),
        (RACE.format(one="tsl::Notification", other="tsl::Notification"), False),
        (RACE.format(one="attn_ops::tf::compute<X>", other="attn_ops::tf::create<X>"), False),
        (RACE.format(one="attn_ops::tf::destroy<X>", other="attn_ops::tf::compute<X>"), False),
        (RACE.format(one="attn_ops::tf::create<X>", other="attn_ops::tf::create<X>"), True),
    ],
    ids=(
        *("overflow", "another's overflow", "undefined", "another's undefined", "race", "half a race", "another's race"),
        *("made before", "destroyed after", "made twice"),
    ),
)
def test_whose_report_it_is(tmp_path, report, ours):
    (tmp_path / "log.1").write_text("noise\n" + report + "more noise\n")
    assert [len(reports.found(tmp_path)[0]), reports.found(tmp_path)[1]] == [int(ours), int(not ours)]


def test_reports_are_told_apart(tmp_path):
    overflow = ADDRESS.format(frame="attn_ops::cpu::forward", file="csrc/cpu/forward.h")
    (tmp_path / "log.1").write_text(overflow + overflow + ADDRESS.format(frame="Eigen::Tensor", file="eigen.h"))
    ours, others = reports.found(tmp_path)
    assert len(ours) == 1 and others == 1
