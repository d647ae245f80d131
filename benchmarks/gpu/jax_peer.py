"""jax.nn.dot_product_attention through cuDNN, in a process of its own that takes its turns on request.

Two frameworks in one process would fight for the device's memory. Only one process works at a time: this one waits for
the answer of the other, so that rounds are interleaved all the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
from workloads import FORWARD, Workload

from .peers import Peer
from .workloads import input_bytes

_MOST_CALLS = 50


class JaxCudnn(Peer):
    name, module, dtypes = "jax_cudnn", "jax", ("bfloat16", "float16")
    starts_slowly = True

    def __init__(self):
        self._processes = []

    def missing(self, device):
        return super().missing(device) or (None if device.kind == "cuda" else "cuDNN needs a CUDA device")

    def prepare(self, device, workload, mode, inputs):
        import torch

        # Inputs of the example are sent, since its answers are checked; others are as random there.
        values = None
        if workload.name == "example":
            values = {name: x.float().cpu().numpy().tolist() for name, x in inputs.items()}
        remote = Remote(workload, mode, values, device.cache_bytes, lambda x: torch.from_numpy(x))
        self._processes.append(remote)
        return remote

    def close(self):
        for process in self._processes:
            process.close()
        self._processes.clear()


class Remote:
    """A step in another process."""

    def __init__(self, workload, mode, values, cache_bytes, convert):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "gpu.jax_peer"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self._convert = convert
        self._ask({"workload": dataclasses.asdict(workload), "mode": mode, "values": values, "cache": cache_bytes})

    def _ask(self, what):
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __call__(self):
        return [self._convert(np.array(x, np.float32)) for x in self._ask({"call": True})["outputs"]]

    def turn(self, seconds: float) -> float:
        """Seconds of one call among several in a row."""
        return self._ask({"turn": seconds})["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def _serve() -> None:
    """The other process: an answer, a line, for every line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    step, is_example = None, False
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "workload" in request:
                step, answer, is_example = _step(request), {}, request["values"] is not None
            elif "turn" in request:
                answer = {"seconds": _time(step, request["turn"])}
            else:
                outputs = step()
                answer = {"outputs": [np.asarray(x, np.float32).tolist() for x in outputs] if is_example else []}
        except Exception as failure:  # whatever the library raises; the other side tells it
            answer = {"error": f"{type(failure).__name__}: {failure}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def _step(request):
    import jax

    fields = request["workload"]
    workload = Workload(**{**fields, "window": None})
    sets = 1 if request["values"] else -(-2 * request["cache"] // input_bytes(workload))
    inputs = [_inputs(workload, request["values"], index) for index in range(max(sets, 1))]

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=workload.is_causal, implementation="cudnn")

    if request["mode"] == FORWARD:
        function = jax.jit(attend)
        prepared = [x[:3] for x in inputs]
        outputs = lambda i: [function(*prepared[i])]  # noqa: E731
    else:
        # What forward leaves is the closure that vjp returns: a pytree, and so an argument of the compiled gradient.
        forward = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1])
        pulls = [forward(*x[:3]) for x in inputs]
        function = jax.jit(lambda pull, d_out: pull(d_out))
        outputs = lambda i: function(pulls[i], inputs[i][3])  # noqa: E731
    turns = itertools.cycle(range(len(inputs)))
    return lambda: outputs(next(turns))


def _inputs(workload, values, seed):
    import jax
    import jax.numpy as jnp

    rows = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    keys = (workload.batch, workload.seqlen_k, workload.num_kv_heads, workload.head_dim)
    dtype = jnp.dtype(workload.dtype)
    if values:
        return [jnp.asarray(values[name], dtype) for name in ("query", "key", "value", "d_out")]
    seeds = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(s, shape, dtype) for s, shape in zip(seeds, (rows, keys, keys, rows), strict=True)]


def _time(step, seconds):
    import jax

    def several(calls):
        begin = time.perf_counter()
        for _ in range(calls):
            outputs = step()
        jax.block_until_ready(outputs)
        return (time.perf_counter() - begin) / calls

    once = several(1)
    return several(min(max(int(seconds / once), 1), _MOST_CALLS))


if __name__ == "__main__":
    _serve()
