"""Keras's own tests of MultiHeadAttention, GroupedQueryAttention and Attention, against ours (tests/keras_suite)."""

import importlib.util
import unittest

import pytest

pytest.importorskip("absl.testing.parameterized", reason="Keras's test files need absl-py")
pytest.importorskip("keras")
if importlib.util.find_spec("keras.src.layers.attention.attention_test") is None:
    pytest.skip("the wheel of this Keras has no tests in it", allow_module_level=True)

from attn_ops import kernels  # noqa: E402
from keras_suite import runner  # noqa: E402
from keras_suite.expected_differences import EXPECTED_DIFFERENCES  # noqa: E402

_FOUND = set()

# pytest collects the unittest classes that it finds among the globals.
for _fused in (False, True):
    for _module in runner.MODULES:
        for _name, _cls in runner.load_classes(_module, _fused).items():
            _FOUND.update(f"{_name}.{test}" for test in unittest.TestLoader().getTestCaseNames(_cls))
            globals()[f"{_name}_{'fused' if _fused else 'composite'}"] = _cls if _fused else pytest.mark.wide(6)(_cls)
del _cls


def test_fused_op_is_present():
    assert kernels.unavailable_reason() is None  # otherwise the *_fused classes test the composite


def test_keras_tests_were_found():
    for name in ("MultiHeadAttentionTest", "GroupedQueryAttentionTest", "AttentionTest"):
        assert sum(test.startswith(name + ".") for test in _FOUND) > 5


def test_expected_differences_exist():
    assert set(EXPECTED_DIFFERENCES) <= _FOUND
