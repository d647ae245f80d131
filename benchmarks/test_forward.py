"""Attention, forward."""

from workloads import FORWARD

MODES = (FORWARD,)
DECODE = False


def test_forward(measure, name, workload, mode, peer):
    measure(name, workload, mode, peer)
