"""TensorFlow and JAX as commands use them: without notes about the machine, and traced where a command asks what would
run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile

import click

from attn_ops import requirements


# What Keras imports where it is installed, for functions that no command calls: a fourth of the time that TensorFlow
# takes to start.
_UNNEEDED = ("matplotlib", "sklearn")


class Missing(click.ClickException):
    """What a command needs is not installed."""

    exit_code = 2


@functools.cache
def tensorflow():
    """TensorFlow, started. What it logs below errors is left out, unless TF_CPP_MIN_LOG_LEVEL is 0 or 1.

    Raises:
        Missing: it is not installed, or cannot be imported.
    """
    asked_for = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") in ("0", "1")
    try:
        with contextlib.nullcontext() if asked_for else _silent_stderr(), _without(_UNNEEDED):
            import tensorflow as tf

            tf.config.list_physical_devices()
    except ImportError as error:
        raise Missing(requirements.missing("this command", error.name or "") or str(error)) from None
    if not asked_for:
        tf.get_logger().setLevel("ERROR")
    return tf


def has_tensorflow() -> bool:
    """Whether commands have TensorFlow. Without it JAX answers where it can; without either, they miss TensorFlow."""
    return requirements.installed("tensorflow") or not requirements.installed("jax")


def jax():
    """JAX.

    Raises:
        Missing: it cannot be imported.
    """
    try:
        return importlib.import_module("jax")
    except ImportError as error:
        raise Missing(requirements.missing("this command", error.name or "") or str(error)) from None


def keras():
    """Keras on TensorFlow, or without that on JAX, unless KERAS_BACKEND says otherwise.

    Raises:
        Missing: what it needs cannot be imported.
    """
    if has_tensorflow():
        tensorflow()
    else:
        os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        return importlib.import_module("keras")
    except ImportError as error:
        raise Missing(requirements.missing("this command", error.name or "") or str(error)) from None


@contextlib.contextmanager
def _silent_stderr():
    """Drops what is written to the file descriptor of standard error: what libraries log before levels are read."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _without(modules):
    """Nobody finds these modules meanwhile, unless they were imported before."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


def traced(function, **options):
    """What a Python function gives while TensorFlow traces it: ``options`` of `tf.function`."""
    found = []
    tf = tensorflow()
    tf.function(lambda: found.append(function()), autograph=False, **options).get_concrete_function()
    return found[0]


def exported(function):
    """What a Python function gives while TensorFlow traces it for a file."""
    found = []
    tf = tensorflow()
    module = tf.Module()

    @tf.function(input_signature=[], autograph=False)
    def call():
        found.append(function())
        return tf.constant(0)

    module.call = call
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory)
    return found[0]


@contextlib.contextmanager
def jax_in_float64():
    """In JAX float64 stays what it is meanwhile."""
    home = jax()
    enabled = home.enable_x64 if hasattr(home, "enable_x64") else importlib.import_module("jax.experimental").enable_x64
    with enabled(True):
        yield


@contextlib.contextmanager
def jax_on_cpu_in_float64():
    """The same, and JAX's default device is the CPU."""
    home = jax()
    with home.default_device(home.devices("cpu")[0]), jax_in_float64():
        yield
