"""The weights of the attention layers of a trained Keras model."""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

from attn_ops import requirements
from attn_ops.models import convert, found
from attn_ops.visualize import checks, listening, recorded
from attn_ops.visualize.recorded import LONGEST, MAX_BYTES, TOP_KEYS, ModelAttention

_NAME = "attn_ops.visualize.attention"
_NO_VALUES = "its weights could not be had: it runs inside a function that is compiled, or over more than one axis"
_KNOWN = (
    "Known are MultiHeadAttention, GroupQueryAttention, Attention and AdditiveAttention of Keras and their subclasses, the layers "
    "of attn_ops, the models of KerasHub, and whatever calls attn_ops.scaled_dot_product_attention or "
    "keras.ops.dot_product_attention; attn_ops.models.register makes a class of your own known"
)


def attention(model, inputs, layers=None, *, tokens=None, longest=LONGEST, top_keys=TOP_KEYS, max_bytes=MAX_BYTES):
    """The weights of the attention layers of a trained model, for some inputs: softmax of the scores, before dropout.

    Runs the model once on the inputs, in inference mode. Its layers may be stock ones, converted ones, those of
    :mod:`attn_ops.layers` and of KerasHub, anywhere in functional, sequential, subclassed and nested models; a shared
    layer is there once for each call. Nothing of the model changes, whatever happens: not its weights, states of random
    numbers, flags and traced functions. While it runs, `tf.function`s of the process run as Python.

    Up to ``longest`` rows and keys, the weights themselves are kept; of longer sequences the means of blocks and the
    largest weights of each row, computed from queries and keys some rows at a time: the matrix is never there. What
    attention sinks take is left out, so that rows of such layers sum to less than 1.

    Args:
        model: A built Keras model or layer.
        inputs: What `model` is called with, with an axis for the batch: an array, or a list or dict of them; nested lists
            of numbers or texts are arrays. For a layer that is no `keras.Model`, a tuple holds its arguments by position.
        layers: None for all; or names of attention layers, or one of them: paths as `attn_ops.explain(model)` prints
            them, their last parts, or patterns such as `"decoder/*"`. Of a shared layer all calls, or `"name#2"`.
        tokens: None, or what stands at the positions, padding too: a sequence of labels; a tuple of two for models of two
            sequences, which are told apart by their lengths; or a dict of those by names as for ``layers``, where a
            tuple is (query tokens, key tokens). Instead of a sequence of labels there may be one for each entry of the
            batch.
        longest: Up to how many rows and keys the weights are kept.
        top_keys: How many keys of each row are kept otherwise.
        max_bytes: What the result may take.

    Returns:
        A :class:`ModelAttention`, a table when printed. `attention(...)["encoder/attention"].weights` is float32
        `[batch, num_heads, seqlen_q, seqlen_k]`.

    Raises:
        TypeError: `model` is no Keras layer, or the tokens are no labels.
        ValueError: The model was never built, or has no attention whose weights can be had; a name is no attention
            layer of it; tokens do not fit; the result would be larger than ``max_bytes``.
    """
    requirements.check_keras(_NAME)
    inside = found.layers("visualize.attention", model)
    for what, number in (("longest", longest), ("top_keys", top_keys), ("max_bytes", max_bytes)):
        if (
            isinstance(number, bool)
            or not isinstance(number, (int, np.integer))
            or number < (0 if what == "longest" else 1)
        ):
            raise ValueError(f"{_NAME}: {what} must be a positive integer, got {number!r}")
    if not model.built:
        raise ValueError(
            f"{_NAME}: {model.name} was never built, so that it has no weights yet: call it on data, train it or load its weights "
            "first"
        )
    paths = found.paths(model)
    known = _attention_layers(inside, paths)
    wanted = _wanted(layers, known, paths.values())
    classes = {id(layer): type(layer).__name__ for layer in inside}
    recording = _Recording(model, paths, classes, wanted, longest, top_keys, max_bytes)
    with listening.listening(inside, recording.tell), convert.borrowed(inside):
        try:
            _run(model, inputs)
        except _Stopped as stop:
            raise stop.reason from None
    silent = {name: reason or "it did not run" for name, reason in known.items() if name not in recording.heard}
    left_out = {**silent, **recording.left_out}
    there = [*recording.heard, *left_out]
    missing = [name for name in wanted or () if not checks.matches(name, there)]
    if missing and there:
        raise ValueError(_unknown(missing, there))
    left_out = {name: reason for name, reason in left_out.items() if _is_wanted(name, wanted)}
    if not recording.layers:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"{_NAME}: no attention of {model.name} has weights that can be had{reasons}. {_KNOWN}")
    return ModelAttention(model.name, recorded.with_tokens(_NAME, recording.layers, tokens), left_out)


def _attention_layers(inside, paths):
    """The paths of the layers that are known to attend, and why their weights cannot be had, or None."""
    known = {}
    for layer in inside:
        state = found.state(layer)
        if state is not None and state.attends:
            known[paths.get(id(layer), layer.name)] = state.reason
    return known


def _wanted(layers, known, paths):
    """The names that were asked for, or None for all; those that are no layer at all are refused before anything runs."""
    if layers is None:
        return None
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_NAME}: layers must be None or names of layers, got {layers!r}")
    paths = [*paths, *known]
    missing = [name for name in names if not checks.matches(name.partition("#")[0], paths)]
    if missing and known:
        raise ValueError(_unknown(missing, known))
    return names


def _unknown(missing, known):
    return f"{_NAME}: {', '.join(map(repr, missing))} is no attention layer here; known: {', '.join(known)}"


def _is_wanted(name, wanted):
    shared = name.partition("#")[0]  # the name of a layer stands for all calls of it
    return wanted is None or any(checks.matches(pattern, [x]) for pattern in wanted for x in (name, shared))


def _run(model, inputs):
    if isinstance(inputs, tuple) and not isinstance(model, keras.Model):
        model(*inputs, training=False)
        return
    several = len(getattr(model, "inputs", None) or ()) > 1
    if isinstance(inputs, dict):
        inputs = {name: _array(x) for name, x in inputs.items()}
    else:
        inputs = [_array(x) for x in inputs] if several and isinstance(inputs, (list, tuple)) else _array(inputs)
    inputs = keras.tree.map_structure(lambda x: ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x, inputs)
    model(inputs, training=False)


def _array(x):
    """A list of numbers or texts, nested or not, as an array; anything else as it is."""
    nested = isinstance(x, (list, tuple)) and not any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x))
    return np.asarray(x) if nested else x


class _Stopped(BaseException):  # no Exception, to which Keras adds what it knows of the call
    def __init__(self, reason):
        self.reason = reason


class _Recording:
    """What has been heard of a model so far.

    Attributes:
        layers: a list of `LayerAttention`.
        heard: their names, of all calls, and of those that were not asked for.
        left_out: reasons by name.
    """

    def __init__(self, model, paths, classes, wanted, longest, top_keys, max_bytes):
        self._model, self._paths, self._classes, self._wanted = model, paths, classes, wanted
        self._longest, self._top_keys, self._max_bytes = longest, top_keys, max_bytes
        self._bytes = 0
        self._calls = {}
        self.layers, self.heard, self.left_out = [], [], {}

    def tell(self, stack, make):
        path, cls = self._named(stack)
        count = self._calls[path] = self._calls.get(path, 0) + 1
        name = path if count == 1 else f"{path}#{count}"
        if not _is_wanted(name, self._wanted):
            self.heard.append(name)
            return
        source = make()
        if source is None or min(source.shape) == 0:
            self.left_out[name] = _NO_VALUES if source is None else f"there is nothing in it: shape {source.shape}"
            return
        self.heard.append(name)
        self._bytes += recorded.kept_bytes(source.shape, self._longest, self._top_keys)
        if self._bytes > self._max_bytes:
            batch, heads, rows, keys = source.shape
            raise _Stopped(ValueError(
                f"{_NAME}: the weights up to layer {name} (batch {batch}, {heads} heads, {rows} x {keys}) take "
                f"{self._bytes:,} bytes, and max_bytes allows {self._max_bytes:,}: ask for fewer layers "
                f"(layers=) or fewer examples, keep less (longest={self._longest}, top_keys={self._top_keys}), or allow more"
            ))  # fmt: skip
        self.layers.append(recorded.summarized(name, cls, source, self._longest, self._top_keys))

    def _named(self, stack):
        """The path and the class of the innermost layer that is part of the model, or of the operation in it."""
        if not stack:
            return self._model.name, type(self._model).__name__
        inner = stack[-1]
        if isinstance(inner, keras.layers.Wrapper) and getattr(inner.layer, "name", None):
            inner = inner.layer  # of which some wrappers run `call` alone
        path = self._paths.get(id(inner))
        if path is None:  # an operation, or a layer that Keras does not track
            around = next(
                (self._paths[id(x)] for x in reversed(stack[:-1]) if id(x) in self._paths and x is not self._model),
                None,
            )
            path = inner.name if around is None else f"{around}/{inner.name}"
        return path, self._classes.get(id(inner), type(inner).__name__)
