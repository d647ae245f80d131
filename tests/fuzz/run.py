#!/usr/bin/env python3
"""Compares random attention calls with what they should give: see cases.py (what is drawn) and check.py (what is wrong).

    python tests/fuzz/run.py                                            # 20,000 cases
    python tests/fuzz/run.py --seed 3 --count 500 --isa avx2,generic --implementations core,op
    python tests/fuzz/run.py --seed 0 --case 1234 --isa avx2 --implementations core      # one of them, told at length
    python tests/fuzz/run.py --seed 0 --case 1234 --isa avx2 --implementations core --without "no bias, keys 0:3"

Every case runs with the kernels of every instruction set; of the other implementations each takes its share (ways.py says what
they are). Those of the CUDA kernels (cuda_ways.py) are `cuda`, `cuda-without-decode`, `cuda-stored` on the CPU, `cuda-ptx` where there
is an nvcc, and with `card` for `cuda` on a card. Of each case that fails it prints the line that repeats it, and another one of the smallest case that fails in the same
way (shrink.py); the exit status is 1 if any did.
"""

import argparse
import functools
import os
import sys
import time
import traceback
import zlib
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests / "helpers")]  # as pytest has it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for products this small its threads only wait for each other

from attn_ops import kernels

from fuzz import cases, check, cuda_ways, packed, reductions, second_truth, shrink, stored, ways

OF_EVERY_ISA = {"core": ways.Core, "core-stored": stored.CoreStored}
OTHERS = {**ways.OTHERS, **stored.WAYS, **packed.WAYS, **second_truth.WAYS, **cuda_ways.WAYS}
KNOWN = (*OF_EVERY_ISA, *OTHERS)


def chosen_ways(implementations, isas):
    """The ways of these names, for the kernels alone one for each of the instruction sets (None: all that run here)."""
    usable = kernels.core().isas() if kernels.core() else []
    unknown = [name for name in isas or () if name not in usable]
    unknown += [name for name in implementations if name not in KNOWN]
    if unknown:
        raise SystemExit(f"unknown here: {', '.join(unknown)}; there are {', '.join((*usable, *KNOWN))}")
    found = {}
    for name in implementations:
        if name in OF_EVERY_ISA:
            found |= {f"{name} --isa {isa}": OF_EVERY_ISA[name](isa) for isa in isas or usable}
        else:
            found[name] = OTHERS[name]
    return found


def takes(way, seed, number):
    """Whether this case is in the share of this way: always the same answer."""
    return zlib.crc32(f"{way.name} {seed} {number}".encode()) < way.share * 2**32


def findings(case, way, judge):
    """What is wrong with the case computed this way, as a list of texts."""
    try:
        found = judge.findings(way(case), way.precision(case), way.rounds, way.differentiates)
        return found + _changed_bits(case, way) if isinstance(way, ways.Kernels) else found
    except Exception:  # an error is a finding, of one case
        return [traceback.format_exc(chain=False).strip()[-2000:]]


def _changed_bits(case, way):
    """Whether other garbage in hidden places, or another number of threads, changes a bit."""
    first, second = way(case), way(case, 1)
    changed = check.different(first, second)
    if not changed:
        return []
    by_threads = check.different(first, way(case, 0, case.threads[1]))
    reason = f"{case.threads} threads" if by_threads else f"{case.garbage} where hidden"
    return [f"not the same bits with {reason}: {', '.join(changed)}"]


def fuzz(seed, numbers, chosen, seconds=float("inf"), whole=False, report=print, without=(), shrinking=60.0):
    """Runs the cases of these numbers, and tells what is wrong. Returns how many each way ran, and how many failed.

    `chosen`: ways by their name on the command line. `whole`: not only the cases in the share of each. `without`: reductions
    that each case is run after. `shrinking`: seconds to make one that fails smaller.
    """
    start = time.monotonic()
    counts, failed = dict.fromkeys(chosen, 0), 0
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        taken = {name: way for name, way in chosen.items() if whole or takes(way, seed, number)}
        if not taken:
            continue
        case, wrong, judges = cases.draw(seed, number), {}, Judges()
        for text in without:
            case = reductions.reduced(case, text)
        for name, way in taken.items():
            own = way.suited(case)
            if own is not None:
                counts[name] += 1
                wrong[name] = findings(own, way, judges.of(own))
        for name, found in wrong.items():
            if found:
                line = f"python tests/fuzz/run.py --seed {seed} --case {number} --implementations {name}"
                tell(report, line, chosen[name].suited(case), without, found)
                if shrinking:
                    smallest, more, found = shrink.shrunk(case, functools.partial(failure, chosen[name]), shrinking)
                    report("the smallest that fails so:")
                    smallest = chosen[name].suited(smallest)
                    tell(report, line, smallest, [*without, *more], [*shrink.described(smallest), *found])
        failed += any(wrong.values())
    return counts, failed


class Judges:
    """Of the case that was drawn, and of what ways make of it: one for all that compute the same."""

    def __init__(self):
        self._last = None

    def of(self, case):
        if self._last is None or self._last.case is not case:
            self._last = check.Judge(case)
        return self._last


def failure(way, case):
    """`findings` of a case that was not drawn for this way."""
    own = way.suited(case)
    return [] if own is None else findings(own, way, check.Judge(own))


def tell(report, line, case, without, found):
    report(line + (f' --without "{", ".join(without)}"' if without else ""))
    for text in (str(case), *found):
        report("    " + text.replace("\n", "\n    "))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--isa", type=_names, help="instruction sets of `core…`, by default all that run here")
    parser.add_argument("--without", type=_reductions, default=(), help="reductions.py has what, by commas")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds to make a case that fails smaller, 0: leave it")
    parser.add_argument("--implementations", type=_names, default=("core", "reference"), help=f"of {', '.join(KNOWN)}")
    arguments = parser.parse_args()
    chosen = chosen_ways(arguments.implementations, arguments.isa)
    one = arguments.case is not None
    numbers = [arguments.case] if one else range(arguments.first, arguments.first + arguments.count)
    if one:
        print(cases.draw(arguments.seed, arguments.case))
    given = {"without": arguments.without, "shrinking": 0 if arguments.without else arguments.shrink}
    counts, failed = fuzz(arguments.seed, numbers, chosen, arguments.seconds, whole=one, **given)
    told = ", ".join(f"{count} with {name}" for name, count in counts.items())
    print(f"cases of seed {arguments.seed}: {told}; {failed} failed")
    return 1 if failed else 0


def _names(text):
    return tuple(text.split(","))


def _reductions(text):
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
