"""Attention under `tf.distribute`: replicas on logical devices of a process of their own, and two workers."""

import json
from pathlib import Path

import processes
import pytest
from children import run

HERE = Path(__file__).parent


def _said(script):
    """The words that a script prints in a process of its own."""
    process = run((HERE / script).read_text(), TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout.split()


def _replicas():
    """`MirroredStrategy` on two logical devices."""
    assert _said("replicas.py") == ["gathered", "trained", "dropped", "refused", "told"]


def _parameter_server():
    """`ParameterServerStrategy`, the worker and the server in one process."""
    assert _said("parameter_server.py") == ["trained"]


@pytest.mark.wide(2)
@pytest.mark.parametrize("check", [_replicas, _parameter_server])
def test_tensorflow(check):
    check()


def test_two_workers():
    """`MultiWorkerMirroredStrategy`, with a loop of one's own."""

    def described(n, ports):
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        return [], {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": n}})}

    outputs = processes.run_two(HERE / "two_processes_tensorflow.py", described)
    assert ["worker 0 of 2" in outputs[0], "worker 1 of 2" in outputs[1]] == [True, True]
