"""Attention of one new query to a long key/value cache."""

from workloads import FORWARD

MODES = (FORWARD,)
DECODE = True


def test_decode(measure, name, workload, mode, peer):
    measure(name, workload, mode, peer)
