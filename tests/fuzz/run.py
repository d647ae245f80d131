#!/usr/bin/env python3
"""Compares random attention calls with what they should give: see cases.py (what is drawn) and check.py (what is wrong).

    python tests/fuzz/run.py                                            # 20,000 cases
    python tests/fuzz/run.py --seed 3 --count 500 --isa avx2,generic --implementations core,op
    python tests/fuzz/run.py --seed 0 --case 1234 --isa avx2 --implementations core      # one of them, told at length

Every case runs with the kernels of every instruction set; of the other implementations each takes its share. Prints one line
that repeats each case that fails; the exit status is 1 if any did.
"""

import argparse
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

from fuzz import cases, check, ways


def chosen_ways(implementations, isas):
    """The ways of these names, for `core` one for each of the instruction sets (None: all that run here)."""
    usable = kernels.core().isas()
    unknown = [name for name in isas or () if name not in usable]
    unknown += [name for name in implementations if name not in ("core", *ways.OTHERS)]
    if unknown:
        raise SystemExit(f"unknown here: {', '.join(unknown)}; there are {', '.join((*usable, 'core', *ways.OTHERS))}")
    found = {}
    for name in implementations:
        if name == "core":
            found |= {f"core --isa {isa}": ways.Core(isa) for isa in isas or usable}
        else:
            found[name] = ways.OTHERS[name]
    return found


def takes(way, seed, number):
    """Whether this case is in the share of this way: always the same answer."""
    return zlib.crc32(f"{way.name} {seed} {number}".encode()) < way.share * 2**32


def findings(case, way, judge):
    """What is wrong with the case computed this way, as a list of texts."""
    try:
        found = judge.findings(way(case), way.precision(case), way.rounds)
        return found + _changed_bits(case, way) if isinstance(way, ways.Core) else found
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


def fuzz(seed, numbers, chosen, seconds=float("inf"), whole=False, report=print):
    """Runs the cases of these numbers, and tells what is wrong. Returns how many each way ran, and how many failed.

    `chosen`: ways by their name on the command line. `whole`: not only the cases in the share of each.
    """
    start = time.monotonic()
    counts, failed = dict.fromkeys(chosen, 0), 0
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        taken = {name: way for name, way in chosen.items() if whole or takes(way, seed, number)}
        if not taken:
            continue
        case = cases.draw(seed, number)
        taken = {name: way for name, way in taken.items() if case.dtype in way.dtypes and not way.lacks & set(case.options)}
        judge = check.Judge(case)
        wrong = {name: findings(case, way, judge) for name, way in taken.items()}
        wrong = {name: found for name, found in wrong.items() if found}
        for name, found in wrong.items():
            report(f"python tests/fuzz/run.py --seed {seed} --case {number} --implementations {name}")
            for text in (str(case), *found):
                report("    " + text.replace("\n", "\n    "))
        for name in taken:
            counts[name] += 1
        failed += bool(wrong)
    return counts, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--isa", type=_names, help="instruction sets of `core`, by default all that run here")
    known = ", ".join(("core", *ways.OTHERS))
    parser.add_argument("--implementations", type=_names, default=("core", "reference"), help=f"of {known}")
    arguments = parser.parse_args()
    chosen = chosen_ways(arguments.implementations, arguments.isa)
    one = arguments.case is not None
    numbers = [arguments.case] if one else range(arguments.first, arguments.first + arguments.count)
    if one:
        print(cases.draw(arguments.seed, arguments.case))
    counts, failed = fuzz(arguments.seed, numbers, chosen, arguments.seconds, whole=one)
    told = ", ".join(f"{count} with {name}" for name, count in counts.items())
    print(f"cases of seed {arguments.seed}: {told}; {failed} failed")
    return 1 if failed else 0


def _names(text):
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
