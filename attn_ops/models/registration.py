"""Files of Keras that hold classes of this package load after `import attn_ops` alone.

The classes register with Keras where they are defined, in modules that `import attn_ops` does not load. Until then their
names are registered here, with stand-ins that load the class when Keras makes one from a file. Keras itself is not
imported for that: where it is not there yet, its import tells.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types

_PACKAGE = "attn_ops"
# Per class: the module that defines and registers it, and what of Keras it is, or None.
CLASSES = {
    "Attention": ("layers", "Layer"),
    "AttentionLayer": ("layers", "Layer"),
    "AttentionLayerWithWeights": ("layers", "Layer"),
    "AttentionWeights": ("models.operation", "Operation"),
    "GroupedQueryAttention": ("layers", "Layer"),
    "HierarchicalAttention": ("layers", "Layer"),
    "MaskOfCall": ("layers.score_options", None),
    "MultiHeadAttention": ("layers", "Layer"),
    "RotaryEmbedding": ("layers", "Layer"),
    "ScaledDotProductAttention": ("models.operation", "Operation"),
    "SelfAttention": ("layers", "Layer"),
}
CLASSES_OF_KERAS_2 = {
    name: ("models.keras_2", "Layer")
    for name in ("AttentionWeights", "DecodeAttention", "ScaledDotProductAttention", "UpdatedCache")
}


def register() -> None:
    """Registers the names with Keras and with Keras 2 (`tf_keras`): now if it is imported, else as soon as it is."""
    for package, classes in (("keras", CLASSES), ("tf_keras", CLASSES_OF_KERAS_2)):
        with_it = functools.partial(_register_with, classes=classes)
        if package in sys.modules:
            with_it(sys.modules[package])
        else:
            sys.meta_path.insert(0, _AfterImport(package, with_it))


def _register_with(keras, classes):
    try:
        kinds = {"Layer": keras.layers.Layer, "Operation": getattr(keras, "Operation", None), None: object}
        stand_ins = {
            f"{_PACKAGE}>{name}": _stand_in(name, module, kinds[kind]) for name, (module, kind) in classes.items()
        }
        registered = keras.saving.get_custom_objects()
    except Exception:  # one of another make, whose import must not fail for our sake
        return
    for name, stand_in in stand_ins.items():
        registered.setdefault(name, stand_in)


def _stand_in(name, module, kind):
    """A class in place of the one of this name in a module of ours: whatever is made of it is of that one."""

    def real():
        return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)

    def new(cls, *args, **kwargs):
        return real()(*args, **kwargs)

    def from_config(cls, config):
        return real().from_config(config)

    members = {"__new__": new, "from_config": classmethod(from_config), "__module__": f"{_PACKAGE}.{module}"}
    return types.new_class(name, (kind,), exec_body=lambda namespace: namespace.update(members))


class _AfterImport:
    """A finder that finds nothing itself, and has a function called with the module of a name once that is imported."""

    def __init__(self, name, function):
        self._name, self._function = name, function
        self._asking = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._name or self._asking:
            return None
        self._asking = True  # another finder that asks all the others, as this one does, must not ask it again
        try:
            specs = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._asking = False
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            self._have_called_after(spec.loader)
        return spec

    def _have_called_after(self, loader):
        load = loader.exec_module

        def exec_module(module):
            load(module)
            self._function(module)

        try:
            loader.exec_module = exec_module  # of this loader alone: each import has its own
        except AttributeError:  # one without attributes of its own
            pass
