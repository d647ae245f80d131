"""What is heard while a Keras model runs: each attention in it, and in which layer.

Heard are the calls of our op, which `attn_ops.models.convert.borrowed` leads the known layers to; those of
`keras.ops.dot_product_attention`; and the softmax of layers that do it themselves in a method of Keras's names.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import threading

import keras
import numpy as np
from keras import ops

from attn_ops.call import listeners
from attn_ops.call.normalize import normalize
from attn_ops.layers.backend import backend
from attn_ops.visualize.probabilities import Given, Probabilities

_OP = "scaled_dot_product_attention"
_SOFTMAX = ("_masked_softmax", "_apply_scores")  # of Keras and KerasHub: (scores, mask) -> weights; … -> (out, weights)
_heard = contextvars.ContextVar("attn_ops_heard", default=None)
_lock = threading.RLock()


class Heard:
    """The attention of a model that is running.

    Attributes:
        stack: the layers and operations that are running, the innermost last.
    """

    def __init__(self, tell):
        self.stack = []
        self._tell = tell
        self._silent = False

    def hear(self, make):
        """Tells of an attention, whose weights ``make`` gives."""
        if not self._silent:
            with self.silence():
                self._tell(self.stack, make)

    @contextlib.contextmanager
    def silence(self):
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before


@contextlib.contextmanager
def listening(layers, tell):
    """Has ``tell`` called for each attention in calls of these layers that this thread makes in the `with` block: with the
    layers and operations around it, and a function that gives its `Probabilities`, its `Given`, or None without values.

    In it Keras variables keep their values, and TensorFlow's functions run eagerly, without being traced.
    """
    heard = Heard(tell)
    token = _heard.set(heard)
    try:
        with _lock, contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(keras.Operation, "__call__", _counted))
            module, name = _keras_op()
            if module is not None:
                stack.enter_context(_replaced(module, name, _heard_op))
            for layer in layers:
                for name in _SOFTMAX:
                    if callable(getattr(layer, name, None)):
                        stack.enter_context(_replaced(layer, name, functools.partial(_heard_softmax, name)))
            listeners.listeners.append(_hear_call)
            stack.callback(listeners.listeners.remove, _hear_call)
            stack.enter_context(_with_losses_kept(layers))
            stack.enter_context(_eagerly())
            stack.enter_context(keras.StatelessScope())
            yield heard
    finally:
        _heard.reset(token)


def _hear_call(name, call):
    heard = _heard.get()
    if heard is not None and name == _OP:
        heard.hear(lambda: Probabilities(call) if _has_values(call.query) else None)


def _counted(stock):
    """`Operation.__call__`, which knows where it is."""

    @functools.wraps(stock)
    def call(self, *args, **kwargs):
        heard = _heard.get()
        if heard is None:
            return stock(self, *args, **kwargs)
        heard.stack.append(self)
        try:
            return stock(self, *args, **kwargs)
        finally:
            heard.stack.pop()

    return call


def _heard_op(stock):
    """What is behind `keras.ops.dot_product_attention`."""

    @functools.wraps(stock)
    def dot_product_attention(query, key, value, bias=None, mask=None, scale=None, is_causal=False, *more, **named):
        heard = _heard.get()
        if heard is not None:
            cap = named.get("attn_logits_soft_cap")

            def make():
                if not _has_values(query):
                    return None
                options = {"bias": _rank_4(bias), "mask": _rank_4(mask), "scale": scale, "is_causal": is_causal}
                options |= {"causal_alignment": "top_left"} | ({} if cap is None else {"logits_soft_cap": cap})
                return Probabilities(normalize(backend.xp, _OP, query, key, value, **options))

            heard.hear(make)
        with contextlib.nullcontext() if heard is None else heard.silence():  # behind it may be ours
            return stock(query, key, value, bias, mask, scale, is_causal, *more, **named)

    return dot_product_attention


def _heard_softmax(name, stock):
    """A layer's own softmax: `_masked_softmax(scores, mask)`, or `_apply_scores(scores, values, mask)` with the output too."""

    @functools.wraps(stock)
    def softmax(scores, *args, **kwargs):
        result = stock(scores, *args, **kwargs)
        heard = _heard.get()
        if heard is not None:
            weights, masks = (result[1], args[1:2]) if name == "_apply_scores" else (result, args[:1])
            masks += tuple(kwargs[x] for x in ("attention_mask", "scores_mask") if x in kwargs)
            heard.hear(lambda: _given(weights, masks[0] if masks else None))
        return result

    softmax.put_by_attn_ops = True  # and so does not keep ours from the layer
    return softmax


def _given(weights, mask):
    """The `Given` of `[batch, seqlen_q, seqlen_k]` or `[batch, num_heads, seqlen_q, seqlen_k]`, beside a mask as Keras
    broadcasts it; or None for others."""
    if len(weights.shape) not in (3, 4) or not _has_values(weights):
        return None
    weights = ops.convert_to_numpy(ops.cast(weights, "float32"))
    weights = weights if weights.ndim == 4 else weights[:, None]
    if mask is None:
        return Given(weights)
    mask = ops.convert_to_numpy(mask)
    mask = mask if mask.dtype == bool else mask > 0.5
    if mask.ndim == 2:
        mask = mask[:, None]
    return Given(weights, mask if mask.ndim == 4 else mask[:, None])


def _rank_4(x):
    return None if x is None else ops.reshape(x, (1,) * (4 - len(x.shape)) + tuple(ops.shape(x)))


def _keras_op():
    """The module and the name of what is behind `keras.ops.dot_product_attention`, or None twice."""
    name = "dot_product_attention"
    try:
        module = importlib.import_module("keras.src.ops.nn").backend.nn
        return (module, name) if callable(getattr(module, name)) else (None, None)
    except (ImportError, AttributeError):
        return None, None


@contextlib.contextmanager
def _replaced(owner, name, make):
    """An attribute of a class, a module or a layer replaced for a while; in layers without setattr, which Keras tracks."""
    own = vars(owner).get(name)
    put = functools.partial(setattr, owner) if isinstance(owner, type) else vars(owner).__setitem__
    put(name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if own is not None:
            put(name, own)
        elif isinstance(owner, type):
            delattr(owner, name)
        else:
            del vars(owner)[name]


@contextlib.contextmanager
def _with_losses_kept(layers):
    """A model forgets the losses of its last call when it is called again."""
    names = ("_losses", "_loss_ids")  # a list and a set
    before = [
        (kept, kept.copy()) for layer in layers for name in names if (kept := getattr(layer, name, None)) is not None
    ]
    try:
        yield
    finally:
        for kept, own in before:
            kept.clear()
            (kept.update if isinstance(kept, set) else kept.extend)(own)


@contextlib.contextmanager
def _eagerly():
    """Functions that a model has inside run as Python, for the values in them, and so that nothing of this is traced."""
    if keras.config.backend() == "jax":
        import jax

        with jax.disable_jit():
            yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _has_values(x) -> bool:
    """Whether a tensor is no symbol of a function that is being traced."""
    try:
        np.asarray(x[:0])
    except Exception:  # each framework has its own
        return False
    return True
