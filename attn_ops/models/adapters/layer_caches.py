"""The caches of all layers of one of KerasHub's generating models, which stay apart while it generates.

KerasHub keeps them in one tensor `[batch, num_layers, 2, max_length, num_kv_heads, head_dim]`, takes that apart for
each token, and stacks the caches that the layers return: the whole of it is copied twice per token. Its samplers take
any structure of tensors for a cache. Here it is a named tuple with a tensor per layer, and the methods that take such a
cache are KerasHub's own, run with an `ops.stack` that makes no tensor. Whoever calls them otherwise than in `generate`
gets and gives one tensor, as ever.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import types

import keras
from keras import ops

# The models whose `generate_step` is running, or being traced, here.
_generating = contextvars.ContextVar("generating", default=())


@functools.cache
def kind(count):
    """The class of the caches of so many layers, whose i-th is also `[:, i]`, as of the tensor."""
    fields = collections.namedtuple(f"LayerCaches{count}", [f"layer_{i}" for i in range(count)])
    return type(fields.__name__, (fields,), {"__slots__": (), "__getitem__": _item})


def _item(caches, key):
    if not isinstance(key, tuple):
        return tuple.__getitem__(caches, key)
    batch, layer, *rest = key
    cache = tuple.__getitem__(caches, layer)
    whole = batch == slice(None) and all(part is ... for part in rest)
    return cache if whole else cache[(batch, *rest)]


def generate_step(layer, stock, *args, **kwargs):
    """`generate_step` of a model of KerasHub, whose other methods keep the caches apart meanwhile.

    Samplers of KerasHub's take structures; those of others, and a draft model beside this one, may want the tensor.
    """
    sampler = type(getattr(layer, "sampler", None)).__call__
    known = getattr(sampler, "__module__", "").startswith("keras_hub.src.samplers.")
    if not known or getattr(layer, "_assistant_model", None) is not None:
        return stock(*args, **kwargs)
    with _generate(layer):
        return stock(*args, **kwargs)


@contextlib.contextmanager
def _generate(layer):
    token = _generating.set((*_generating.get(), layer))
    try:
        yield
    finally:
        _generating.reset(token)


class Apart:
    """The adapter of a method that takes the caches of all layers and returns them with new rows."""

    def __init__(self, method):
        self.method = method

    def __call__(self, layer, stock, *args, **kwargs):
        if not any(layer is model for model in _generating.get()):
            return stock(*args, **kwargs)
        own = getattr(type(layer), self.method)
        return _with_caches_apart(getattr(own, "stock", own))(layer, *args, **kwargs)


class _Instead:
    """A module with other functions in the place of some."""

    def __init__(self, module, **own):
        self._module = module
        vars(self).update(own)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _stack(arrays, axis=0):
    return kind(len(arrays))(*arrays) if axis == 1 else ops.stack(arrays, axis=axis)


@functools.cache
def _with_caches_apart(function):
    """A function of KerasHub, whose `ops.stack(caches, axis=1)` makes a `kind`."""
    own_ops = _Instead(ops, stack=_stack)
    names = {**function.__globals__, "ops": own_ops, "keras": _Instead(keras, ops=own_ops)}
    own = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own
