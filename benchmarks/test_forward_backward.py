"""Attention, forward and backward: the output and the gradients of query, key and value."""

from workloads import FORWARD_BACKWARD

MODES = (FORWARD_BACKWARD,)
DECODE = False


def test_forward_backward(measure, name, workload, mode, peer):
    measure(name, workload, mode, peer)
