"""Keras's own tests of its attention layers, run against ours. See runner.py."""
