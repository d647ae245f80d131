"""Sixteen Python threads that call at once, each any call of calls.py, of which the results must have the bits of the first time.

    python threads.py core|op|xla [--threads 16] [--seconds 10] [--fresh]

op: eager calls, functions, caches and Keras models. xla: functions that XLA compiles, of TensorFlow and JAX. --fresh: the threads meet
before anything was used in this process, and each makes its own calls. In a process of its own (test_load.py, sanitize/run.py).
"""

import argparse
import random
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from load import calls


def made(what):
    if what == "core":
        return {**calls.core(True), **{f"small {name}": call for name, call in calls.core(num_threads=3).items()}}
    if what == "op":
        return {**calls.op(), **calls.decoding(), **calls.models()}
    return {**calls.op(wraps=["xla"]), **calls.jax()}


def run(what, threads, seconds, fresh):
    """How many calls were made; raises where one was wrong."""
    shared = None if fresh else made(what)
    wanted = {} if fresh else {name: call() for name, call in shared.items()}
    barrier, lock, wrong, counts = threading.Barrier(threads), threading.Lock(), [], []

    def work(number):
        try:
            barrier.wait(60)
            mine, pick, count = shared or made(what), random.Random(number), 0
            until = time.monotonic() + seconds
            while time.monotonic() < until or count == 0:
                name = pick.choice(sorted(mine))
                found = mine[name]()
                with lock:
                    right = wanted.setdefault(name, found)
                if not calls.same(found, right):
                    raise AssertionError(f"{name}: other bits")
                count += 1
            counts.append(count)
        except BaseException as error:
            wrong.append(error)
            raise

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if wrong:
        raise SystemExit(f"{len(wrong)} threads failed, the first with {wrong[0]!r}")
    assert len(counts) == threads
    return sum(counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["core", "op", "xla"])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    count = run(arguments.what, arguments.threads, arguments.seconds, arguments.fresh)
    print(f"{arguments.what}: {count} calls from {arguments.threads} threads, the same bits each time")
    print("done")


if __name__ == "__main__":
    main()
