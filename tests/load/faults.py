"""What goes wrong around calls, each in a process of its own (test_faults.py): the call ends in an exception, and the next one is right.

    python faults.py memory core|op|graph|xla       no memory is left for the results, or for the workspace
    python faults.py interrupt core|op|graph|xla     Ctrl-C while a long call runs
    python faults.py fork core|op FILE               a child made before the first call, which leaves its result in FILE
    python faults.py workers                         the workers of tf.data call
    python faults.py thread_counts                   other numbers of threads from call to call, from several threads
    python faults.py two_versions COPY               another copy of the package, in COPY, is loaded already
"""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from load import calls

MIB = 2**20


@contextlib.contextmanager
def limited(mebibytes):
    """Address space for so much more than there is now."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attention(what):
    """(query, key -> output as a NumPy array) in one form."""
    if what == "core":
        from attn_ops import _core

        return lambda q, k: _core.forward(q, k, k, num_threads=1)[0]
    import attn_ops
    import tensorflow as tf

    def attend(q, k):
        return attn_ops.scaled_dot_product_attention(q, k, k, implementation="fused")

    wraps = {"op": attend, "graph": tf.function(attend, autograph=False)}
    function = wraps.get(what) or tf.function(attend, autograph=False, jit_compile=True)
    return lambda q, k: function(tf.constant(q), tf.constant(k)).numpy()


def small(attend):
    q, k, _, _ = calls.arrays(False)
    return attend(q, k)


def memory(what):
    attend = attention(what)
    wanted = small(attend)
    # 128 MiB, and as much again of results. (Not JAX: of its own arrays, it ends the process where there is no memory for one.)
    q, k = np.zeros((1, 2**16, 8, 64), "float32"), np.zeros((1, 4, 8, 64), "float32")
    if what == "core":
        errors = MemoryError
    else:
        import tensorflow as tf

        errors = tf.errors.ResourceExhaustedError
        q, k = tf.constant(q), tf.constant(k)
    for _ in range(3):
        with limited(100):
            try:
                attend(q, k)
            except errors as error:
                text = f"{type(error).__name__}: {str(error)[:150]}"
            else:
                sys.exit("it had the memory")
        assert calls.same([small(attend)], [wanted])
    print(text)


def interrupt(what):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    attend = attention(what)
    wanted = small(attend)
    rng = np.random.default_rng(0)
    length = 1024
    while True:  # some call that takes as long as matters, whatever the machine
        q = rng.standard_normal((1, length, 4, 64)).astype("float32")
        start = time.monotonic()
        right = attend(q, q)
        took = time.monotonic() - start
        if took > 0.6:
            break
        length *= 2
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    try:
        attend(q, q)
        time.sleep(5)  # where it ended sooner
    except KeyboardInterrupt:
        print(f"interrupted a call of {took:.1f} s")
    else:
        sys.exit("not interrupted")
    assert calls.same([small(attend)], [wanted])
    assert calls.same([attend(q, q)], [right])


def fork(what):
    attend = attention(what)  # imported, never used
    child = os.fork()
    found = small(attend)
    if child == 0:
        found.tofile(sys.argv[3])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert calls.same([np.fromfile(sys.argv[3], "float32")], [found.reshape(-1)])


def workers(_):
    import attn_ops
    import tensorflow as tf

    def attend(x):
        return attn_ops.scaled_dot_product_attention(x, x, x, implementation="fused")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 2, 40, 4, 16)).astype("float32")
    wanted = [attend(tf.constant(row)).numpy() for row in x]
    data = tf.data.Dataset.from_tensor_slices(x).map(attend, num_parallel_calls=16, deterministic=True).repeat(4).prefetch(8)
    count = 0
    for i, found in enumerate(data):
        assert calls.same([found.numpy()], [wanted[i % len(x)]])
        count += 1
    assert count == 256


def thread_counts(_):
    from attn_ops import _core

    q, k, v, _ = calls.arrays(True)
    wanted = _core.forward(q, k, v, num_threads=1)
    wrong = []

    def work(seed):
        counts = np.random.default_rng(seed).integers(0, 33, 60)
        for count in map(int, counts):
            if not calls.same(_core.forward(q, k, v, num_threads=count), wanted):
                wrong.append(count)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def two_versions(copy):
    """The second one cannot register the operators again; it says so, and computes with the composite."""
    import attn_ops
    import tensorflow as tf
    from attn_ops import kernels

    assert kernels.library() is not None
    q, k, v, _ = map(tf.constant, calls.arrays(False))
    right = attn_ops.scaled_dot_product_attention(q, k, v, implementation="fused")
    mine = [name for name in sys.modules if name.partition(".")[0] == "attn_ops"]
    kept = {name: sys.modules.pop(name) for name in mine}  # alive, as where a program embeds two
    sys.path.insert(0, copy)
    import attn_ops as other
    from attn_ops import kernels

    assert kernels.__file__.startswith(copy)
    reason = kernels.unavailable_reason()
    assert "another copy of the library is already loaded in this process" in reason, reason
    found = other.scaled_dot_product_attention(q, k, v)
    assert kept
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else None)
    print("done")
