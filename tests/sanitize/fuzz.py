#!/usr/bin/env python3
"""Runs fuzz_target.cc with libFuzzer, from the inputs in corpus.txt on.

    python tests/sanitize/fuzz.py --minutes 30 [--compiler clang++-14]     # needs clang with libFuzzer
    python tests/sanitize/fuzz.py --keep 200                               # and writes that many inputs back

The first build takes ten minutes of one core or more. Inputs that crash are kept in build/fuzz/found; `replay` of
test_sanitize.py runs one without clang. The exit status is that of the fuzzer.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus.txt"


def unpacked(folder):
    """The inputs of corpus.txt, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, line in enumerate(CORPUS.read_text().split()):
        paths.append(folder / f"{number:04}")
        paths[-1].write_bytes(bytes.fromhex(line))
    return paths


def packed(folder, count):
    """Writes the inputs of a folder that libFuzzer found worth keeping into corpus.txt, but no more than ``count``, of all sizes."""
    inputs = sorted({path.read_bytes() for path in folder.iterdir()}, key=lambda x: (len(x), x))
    step = max(1, len(inputs) / count)
    CORPUS.write_text("".join(inputs[int(i * step)].hex() + "\n" for i in range(min(count, len(inputs)))))


def main():
    sys.path.insert(0, str(HERE))
    import builds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--compiler", default="clang++")
    parser.add_argument("--keep", type=int, help="write so many inputs back to corpus.txt, after merging")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    build = builds.configure("fuzz", CMAKE_CXX_COMPILER=arguments.compiler)
    builds.run("cmake", "--build", build, "--target", "fuzz_target", "--parallel", arguments.jobs)
    corpus, found, merged = build / "corpus", build / "found", build / "merged"
    unpacked(corpus)
    for folder in (found, merged):
        folder.mkdir(exist_ok=True)
    limits = ("-rss_limit_mb=4000", "-timeout=60", "-max_len=512", f"-artifact_prefix={found}/")
    program = build / "fuzz_target"
    ended = subprocess.run([program, corpus, *limits, f"-max_total_time={arguments.minutes * 60:.0f}", "-print_final_stats=1"])
    if arguments.keep and ended.returncode == 0:
        builds.run(program, "-merge=1", *limits, merged, corpus)
        packed(merged, arguments.keep)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
