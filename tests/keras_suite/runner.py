"""Loads the layer tests that ship inside the Keras wheel with our classes in place of the stock ones.

The test modules reach the layers through their global `layers`; each module is executed afresh and gets a `layers` that
answers with our classes. Nothing of Keras is copied or changed. Needs absl-py, which the test modules import, and a
Keras whose wheel has them (3.15 does, 3.12 does not).
"""

import importlib.util
import unittest

import pytest

import attn_ops
from keras_suite.expected_differences import EXPECTED_DIFFERENCES

MODULES = ("multi_head_attention_test", "grouped_query_attention_test", "attention_test")

_OURS = {
    "MultiHeadAttention": attn_ops.layers.MultiHeadAttention,
    "GroupedQueryAttention": attn_ops.layers.GroupedQueryAttention,
    "GroupQueryAttention": attn_ops.layers.GroupQueryAttention,
    "Attention": attn_ops.layers.Attention,
}


class _Replacing:
    """A module with other answers for some of its names."""

    def __init__(self, module, replacements):
        self._module = module
        self._replacements = replacements

    def __getattr__(self, name):
        return self._replacements[name] if name in self._replacements else getattr(self._module, name)


def load_classes(module_name, fused):
    """The test classes of a module of Keras's attention layers, bound to our layers.

    Args:
        module_name: One of MODULES.
        fused: Whether the layers may fuse. Keras's tests disable flash attention, and so our fused op, before each
            test; with True that has no effect.

    Returns:
        A dict of class name to unittest.TestCase class, whose tests are marked: those in EXPECTED_DIFFERENCES must fail.
    """
    spec = importlib.util.find_spec(f"keras.src.layers.attention.{module_name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.layers = _Replacing(module.layers, _OURS)
    if fused and hasattr(module, "disable_flash_attention"):
        module.disable_flash_attention = lambda: None
    if hasattr(module, "backend"):
        # The tests of flash attention skip themselves on TensorFlow, where the stock layers have none: some when they
        # run, others by a mark, removed below.
        module.backend = _Replacing(module.backend, {"backend": lambda: "jax"})
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    }
    for name, cls in classes.items():
        for test in unittest.TestLoader().getTestCaseNames(cls):
            getattr(cls, test).__dict__.pop("pytestmark", None)
            reason = EXPECTED_DIFFERENCES.get(f"{name}.{test}")
            if reason is not None:
                setattr(cls, test, pytest.mark.xfail(strict=True, reason=reason)(getattr(cls, test)))
    return classes
