"""What parts of this package need of others, and what to say where that is not there.

The commands work today: they name packages that are in the index, which this one is not.
"""

from __future__ import annotations

import importlib.util
import re
import traceback

REINSTALL = "build and install it again: in a checkout, pip install ."

_OLDEST_KERAS = (3, 7)
_FRAMEWORKS = {
    "tensorflow": ("TensorFlow 2.16 or newer", "pip install tensorflow keras"),
    "keras": (
        "TensorFlow 2.16 or newer, or JAX, with Keras 3.7 or newer",
        "pip install tensorflow keras (or jax keras)",
    ),
    "jax": ("JAX 0.5 or newer", "pip install jax"),
    "jaxlib": ("JAX 0.5 or newer", "pip install jax"),
    "matplotlib": ("matplotlib", "pip install matplotlib"),
    "click": ("click 8.1 or newer", "pip install click"),
}


def installed(package: str) -> bool:
    """Whether it can be imported, as far as that is known without doing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # hidden: by a finder, or as None in sys.modules
        return False


def missing(wanted: str, module: str) -> str | None:
    """That ``wanted`` needs ``module``, which is one of those above or of one, and what to do; None where it is neither."""
    package = module.partition(".")[0]
    if package not in _FRAMEWORKS:
        return None
    if package != module:
        return (
            f"{wanted} needs the module {module}, which the installed {package} lacks: it is incomplete, or of a version "
            "that attn_ops does not know"
        )
    needed, command = _FRAMEWORKS[package]
    return f"{wanted} needs {needed}, and {package} is not installed: {command}"


def reason(wanted: str, error: ModuleNotFoundError) -> str | None:
    """`missing` for the module that an import did not find. Keras looks for TensorFlow unless it is told otherwise."""
    text = missing(wanted, error.name or "")
    if text is not None and error.name == "tensorflow" and installed("jax"):
        through = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
        if any(name.partition(".")[0] == "keras" for name in through):
            return f"{text}, or set KERAS_BACKEND=jax for Keras on JAX"
    return text


def check_keras(wanted: str) -> None:
    """ImportError unless there is a Keras that is new enough for ``wanted``."""
    import keras

    version = getattr(keras, "__version__", "unknown")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST_KERAS:
        raise ImportError(f"{wanted} needs Keras 3.7 or newer, and {version} is installed: pip install -U keras")
