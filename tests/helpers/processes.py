"""Two processes that work together on this machine."""

import os
import socket
import subprocess
import sys

import attn_ops

_ROOT = os.path.dirname(os.path.dirname(attn_ops.__file__))
_PATIENCE = 300  # seconds: they wait for each other, and one that died would keep the other waiting


def run_two(program, described):
    """The output of both; ``described(n, ports)`` gives arguments and environment of the n-th, with two free ports."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    started, outputs = [], []
    try:
        for n in range(2):
            arguments, environment = described(n, ports)
            started.append(
                subprocess.Popen(
                    [sys.executable, str(program), *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=_ROOT,
                    env={**os.environ, "PYTHONPATH": _ROOT, "CUDA_VISIBLE_DEVICES": "", **environment},
                )
            )
        outputs = [process.communicate(timeout=_PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return outputs
