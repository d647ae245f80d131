"""A process in which the attention of stock layers and models runs in ours: what is behind
`keras.ops.dot_product_attention` is replaced, and the seams of all classes that are known."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import threading
import types
import warnings

import keras
from keras import ops

from attn_ops.layers.axes import dims, one_per_query_head
from attn_ops.layers.backend import backend
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.masks.mask import combined
from attn_ops.models import found, seams
from attn_ops.models.adapters import SEAMS

_HOOK = f"keras.src.backend.{keras.config.backend()}.nn"
_NAME = "dot_product_attention"
# What the replacement understands. Newer arguments of Keras would be dropped silently: then it does not patch.
_KNOWN = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "scale",
    "is_causal",
    "flash_attention",
    "attn_logits_soft_cap",
)
# Masked scores are -2.4e38 in Keras. A bias below this may leave a visible one behind them.
_BELOW_MASKED = -1e38
_lock = threading.RLock()
# The blocks of `patched` that share a patch, which the last one to end takes away (those of several threads may overlap), and
# the layers that are traced again then.
_blocks = types.SimpleNamespace(open=0, layers=[])


def patch():
    """Has the attention of stock layers and models run in :func:`attn_ops.scaled_dot_product_attention`, in this process.

    Replaced are the function behind `keras.ops.dot_product_attention` (of Keras's TensorFlow or JAX backend), and in each
    class of attention of Keras and KerasHub that is imported by now, and known, the method that :func:`attn_ops.convert`
    replaces in a layer. That holds for the functions that are traced or run eagerly while it is in place, with dropout too. A call
    runs fused where the fused op can, otherwise in the composite; `flash_attention=True` runs fused or raises ValueError
    with the reasons. Keras's own function still serves `flash_attention=False` and everything that
    :func:`attn_ops.scaled_dot_product_attention` does not take. Queries that see no key give what Keras gives them: a stock
    model may read them as keys later. Beside a mask, a bias with values below `-1e38` (`finfo.min`, `-inf`; in float16 all
    below -65504, as which Keras adds it) is left to Keras as well, when it runs: there such a key counts less than a masked
    one. Patching twice is patching once.

    Raises:
        RuntimeError: This Keras has no such function, or calls it in another way; the message says what was found.
            :func:`attn_ops.convert` does not depend on it.
    """
    with _lock:
        if not _is_patched():
            module = _hook()
            setattr(module, _NAME, _replacement(getattr(module, _NAME)))
            for seam in SEAMS:
                if seam.cls() is not None and not seam.reason_against(seam.cls()):
                    seams.install_in_class(seam)
            for seam in (seam for of_class in seams.registered.values() for seam in of_class):
                seams.install_in_class(seam)


def unpatch():
    """Undoes :func:`patch`; nothing where it is not in place.

    Functions traced meanwhile keep what they were traced with. A function that somebody else put in place after
    :func:`patch` stays.
    """
    with _lock:
        if _is_patched():
            module = sys.modules[_HOOK]
            setattr(module, _NAME, getattr(module, _NAME).original)
            seams.uninstall_in_classes()


@contextlib.contextmanager
def patched(model=None):
    """:func:`patch` for the duration of a `with` block; leaves alone a patch that was in place before. Of blocks that overlap,
    in several threads, the one that ends last takes it away.

    Warns once where the block ends without a single fused call: a function that was traced before it goes on as it was.

    Args:
        model: A Keras model, or None: what it has traced is dropped as the block begins and as it ends, so that it runs
            patched inside, and stock after it.

    Raises:
        TypeError: `model` is not a Keras layer.
        RuntimeError: See :func:`patch`.
    """
    layers, fused = [] if model is None else found.layers("patched", model), backend.choice.calls["fused"]
    with _lock:
        shares = _blocks.open > 0 or not _is_patched()
        patch()
        if shares:
            _blocks.open += 1
            _blocks.layers += layers
    found.drop_traced_functions(layers)
    try:
        yield
    finally:
        with _lock:
            _blocks.open -= shares
            if shares and not _blocks.open:
                unpatch()
                found.drop_traced_functions(_blocks.layers)
                _blocks.layers.clear()
    if backend.choice.calls["fused"] == fused:
        _warn_of_no_call()


def _warn_of_no_call():
    warnings.warn(
        "attn_ops.patched: no attention ran fused inside the block. Functions that were traced before it stay what they are "
        "(pass the model, to have it traced again), and attn_ops.explain(model) tells what each layer runs.",
        stacklevel=4,
    )


def _hook():
    """The module whose function :func:`patch` replaces, or RuntimeError."""
    found = f"keras {keras.__version__} on {keras.config.backend()}"
    try:
        module = importlib.import_module(_HOOK)
        parameters = tuple(inspect.signature(getattr(module, _NAME)).parameters)
        used = importlib.import_module("keras.src.ops.nn").backend.nn
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"attn_ops.patch: cannot replace {_HOOK}.{_NAME} ({found}): {error}") from error
    if used is not module:
        raise RuntimeError(f"attn_ops.patch: keras.ops does not use {_HOOK} ({found})")
    if parameters != _KNOWN[: len(parameters)]:
        raise RuntimeError(
            f"attn_ops.patch: {_HOOK}.{_NAME} takes {parameters}, of which only {_KNOWN} are understood ({found})"
        )
    return module


def _is_patched():
    function = getattr(sys.modules.get(_HOOK), _NAME, None)
    return function is not None and getattr(function, "itself", None) is function


def _replacement(original):
    def dot_product_attention(
        query,
        key,
        value,
        bias=None,
        mask=None,
        scale=None,
        is_causal=False,
        flash_attention=None,
        attn_logits_soft_cap=None,
    ):
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        bias, mask = (x if x is None or hasattr(x, "dtype") else ops.convert_to_tensor(x) for x in (bias, mask))
        soft_cap = attn_logits_soft_cap
        if flash_attention is False or not _is_taken(query, key, value, bias, mask):
            own = {} if soft_cap is None else {"attn_logits_soft_cap": soft_cap}
            return original(query, key, value, bias, mask, scale, is_causal, flash_attention, **own)
        bias, mask = _rank_4(bias), _rank_4(mask)

        def here():
            out = backend.attention.scaled_dot_product_attention(
                query,
                key,
                value,
                bias=bias,
                mask=mask,
                scale=scale,
                is_causal=is_causal,
                causal_alignment="top_left",  # said, so that nobody is warned of it: Keras's answer is wanted
                implementation="fused" if flash_attention else None,
                **({} if soft_cap is None else {"logits_soft_cap": soft_cap}),
            )
            if mask is None or value.shape[1] == 0:
                return out
            visible = combined(mask, is_causal=is_causal)
            return with_means(out, value, empty_rows(visible, dims(query)[1], dims(key)[1]))

        if bias is None or (mask is None and not is_causal) or flash_attention or soft_cap is not None:
            return here()

        def in_keras():
            per_head = (one_per_query_head(x, query.shape[2]) for x in (key, value))
            return original(query, *per_head, bias, mask, scale, is_causal, flash_attention)

        if not backend.can_branch(query, key, bias):
            return in_keras()
        in_its_dtype = ops.cast(bias, keras.backend.result_type(query.dtype, key.dtype, value.dtype))
        return ops.cond(ops.min(ops.cast(in_its_dtype, "float32")) < _BELOW_MASKED, in_keras, here)

    dot_product_attention.original = original
    dot_product_attention.itself = dot_product_attention  # whatever wraps it by functools.wraps has its attributes too
    return dot_product_attention


def _is_taken(query, key, value, bias, mask):
    """Whether scaled_dot_product_attention means the same by these arguments; the rest is left to Keras, errors too."""
    xp = backend.xp
    if any(len(xp.extents(x) or ()) != 4 or not xp.is_floating(x.dtype) for x in (query, key, value)):
        return False
    if mask is not None and (keras.backend.standardize_dtype(mask.dtype) != "bool" or len(mask.shape) > 4):
        return False
    return bias is None or len(bias.shape) <= 4


def _rank_4(x):
    """A mask or bias of Keras's, which broadcasts from the right like arrays, with all four axes."""
    if x is None:
        return None
    x = ops.convert_to_tensor(x)
    return x[(None,) * (4 - len(x.shape))]
