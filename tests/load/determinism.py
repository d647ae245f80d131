"""The same bits from run to run, from eager calls, functions and XLA: what is printed, a digest of each call, must not change with
the number of threads either, nor with the mode in which the host rounds.

    python determinism.py [--runs 100] [--threads 4] [--mode "flush to zero"]

Prints one line of JSON, digests by call. In a process of its own (test_determinism.py), as TensorFlow's threads are fixed once started.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from load import calls, float_mode


def digest(results):
    return hashlib.sha256(b"".join(x.tobytes() for x in results)).hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=list(float_mode.MODES))
    parser.add_argument("--small", action="store_true", help="arrays for one thread")
    arguments = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    made = {f"core {name}": call for name, call in calls.core(not arguments.small, arguments.threads).items()}
    made |= calls.op(not arguments.small, wraps=("eager", "graph", "xla"))
    made |= calls.jax(not arguments.small)
    mode = float_mode.FloatMode().set(float_mode.MODES[arguments.mode]) if arguments.mode else contextlib.nullcontext()
    with mode:
        digests = {}
        for _ in range(arguments.runs):
            for name, call in made.items():
                found = digest(call())
                if digests.setdefault(name, found) != found:
                    sys.exit(f"{name}: {digests[name]}, then {found}")
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
