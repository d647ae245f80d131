"""Fixtures of the tests of whole models."""

from hub import keras_hub  # noqa: F401  a fixture
