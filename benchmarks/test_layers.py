"""The Keras layer with its projections, ours and stock: inference and a training step."""

from workloads import LAYER, LAYER_TRAINING

MODES = (LAYER, LAYER_TRAINING)
DECODE = False


def test_layers(measure, name, workload, mode, peer):
    measure(name, workload, mode, peer)
