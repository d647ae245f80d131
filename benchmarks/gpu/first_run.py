"""The first minutes on a card: is it right, how fast is it, and why?

    python benchmarks/gpu/first_run.py right                        # a call of some minutes: is it right?
    python benchmarks/gpu/first_run.py fast                         # another: how fast, and why?
    python benchmarks/gpu/first_run.py facts kernels --out DIR      # only these stages; without any: all, in order
    python benchmarks/gpu/first_run.py --list

Each stage is a process of its own with a time limit, so that one which faults or hangs costs no other; what it prints
goes to the screen and, at once, to DIR/<stage>.log. Needs PyTorch and `libattn_ops_cuda.so`; no network, no TensorFlow,
no `_core`. The exit status is the number of stages that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PATH = [str(_ROOT), str(_ROOT / "benchmarks")]
sys.path[:0] = _PATH

# By stage: the most seconds it may take. A call is what a machine may be lent for at a time: at most nine minutes.
CALLS = {
    "right": {
        "facts": 20,  # the card, its driver, whether the library takes it
        "kernels": 120,  # every kernel against float64, with all that it takes
        "fuzz": 120,  # random calls of all options
        "tests": 150,  # pytest -m gpu
        "soak": 60,  # the same bits from thousands of launches, streams, and replays of a CUDA graph
    },
    "fast": {
        "numbers": 150,  # the shapes that papers show, beside cuDNN and FlashAttention
        "profile": 90,  # what bounds forward, backward and decode: Nsight Compute
        "memcheck": 150,  # compute-sanitizer
        "racecheck": 120,
    },
}
STAGES = {name: seconds for call in CALLS.values() for name, seconds in call.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}, or {' or '.join(CALLS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("first_run"), help="where logs go (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the stages and their limits, and nothing else")
    parser.add_argument("--only", default="", metavar="WORDS", help="of `numbers`, rows with one of these (d128 decode)")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)  # this process is the stage
    chosen = parser.parse_args(argv)
    chosen.stages = [name for given in chosen.stages for name in CALLS.get(given, [given])]
    unknown = [name for name in chosen.stages if name not in STAGES]
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if chosen.list:
        print("\n".join(f"{name:10} at most {seconds} s" for name, seconds in STAGES.items()))
        return 0
    if chosen.within:
        from gpu import stages

        return getattr(stages, chosen.stages[0])(chosen.out) or 0
    os.environ["ATTN_OPS_FIRST_RUN_ONLY"] = chosen.only  # for the processes of the stages
    chosen.out.mkdir(parents=True, exist_ok=True)
    return sum(not _run(name, chosen.out) for name in chosen.stages or STAGES)


def _run(name: str, out: Path) -> bool:
    """Whether the stage went well. What it prints is written and shown line by line."""
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    path = os.pathsep.join([*_PATH, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--within", name, "--out", str(out)]
    if timeout := shutil.which("timeout"):  # which ends its children too
        command = [timeout, "--kill-after=5", str(STAGES[name]), *command]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with (out / f"{name}.log").open("w") as log:
        stage = subprocess.Popen(command, env=environment, cwd=_ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True)
        for line in stage.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
    status = stage.wait()
    word = "ok" if status == 0 else "TOO LONG" if status in (124, 137) else f"FAILED ({status})"
    print(f"== {name}: {word}, {time.monotonic() - begin:.0f} s", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
