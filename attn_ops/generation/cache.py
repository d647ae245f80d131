"""KVCache: the keys and values of what a model has read so far."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import typing

import numpy as np

from attn_ops.call import options
from attn_ops.call.options import LARGEST_OFFSET

_NAME = "KVCache.create"
_FRAMEWORKS = ("tensorflow", "jax")


class KVCache(typing.NamedTuple):
    """The keys and values that a model has computed so far, in memory for ``max_length`` positions of each sequence::

        cache = attn_ops.KVCache.create(batch, max_length, num_kv_heads, head_dim, "bfloat16")
        out, cache = attn_ops.decode_attention(q, cache, k_new, v_new)

    A named tuple of tensors: `tf.nest`, `tf.while_loop`, `tf.function`, saved models, the transformations of JAX,
    `keras.tree` and Keras layers take it as it is. What is no tensor, layout and window, is in its class, so that a
    function is traced anew for another one. It is a value: `update` returns another cache, and the old one keeps its
    rows.

    To append a row costs a row. In TensorFlow that holds eagerly, in functions and in loops: the new cache shares the
    memory of the old one, whose rows it leaves alone, and only a second update of one and the same cache copies it. In
    JAX it holds in functions, as far as their arguments are donated (``jax.jit(step, donate_argnums=…)``), and in
    loops; called outside of them, `update` takes the old cache over, whose arrays are deleted: `copy` it first to keep
    both.

    Attributes:
        key: [batch, max_length, num_kv_heads, head_dim] (``layout`` "BSHD"), or with heads before positions ("BHSD").
            Turned by their positions already, where the model has rotary embeddings.
        value: the same with value_dim. What is at or past the length of a sequence has no meaning.
        key_scale, value_scale: of a cache in int8 float32 like key and value without their last axis: a row of ``key`` stands
            for the integers times its scale. None in other caches.
        lengths: int32 [batch], how many positions of each sequence there are, or were: see ``window``.
        written: int32 [batch] in TensorFlow, by which caches that share memory know of each other; None in JAX.
        layout: "BSHD" or "BHSD", of the new rows and of queries too.
        window: None, or how many keys a row sees, its own among them: older ones make way, so that memory is
            bounded by the window however long a sequence gets.
    """

    key: typing.Any
    value: typing.Any
    lengths: typing.Any
    written: typing.Any = None

    key_scale = value_scale = None
    layout = "BSHD"
    window = None

    @classmethod
    def create(
        cls,
        batch,
        max_length,
        num_kv_heads,
        head_dim,
        dtype="float32",
        *,
        layout="BSHD",
        window=None,
        value_dim=None,
        framework=None,
    ):
        """An empty cache.

        Args:
            batch: how many sequences; in graphs of TensorFlow it may be a tensor.
            max_length: how many positions a sequence may have. With a window shorter than that, sequences may go on
                beyond it.
            num_kv_heads, head_dim: of the keys and values.
            dtype: float16, bfloat16, float32, float64 or int8. New keys and values are cast to it. In int8 each row of a
                head keeps the largest magnitude as a float32, and its elements as multiples of 1/127 of that: a
                quarter of float32's memory (and a scale for each row). Queries stay as they are, and the
                attention computes in float32; only beside float64, on either side, they are cast to the cache's
                dtype (or float32).
            layout: "BSHD" or "BHSD".
            window: None, or how many keys a row sees, its own among them: a model's sliding window (Keras's
                ``sliding_window``, Mistral's). Also (left, right) as in the attention: left + 1 keys.
            value_dim: None: head_dim.
            framework: "tensorflow" or "jax"; None: that of ``dtype``, where it is a dtype of one, else of Keras's
                backend, else the one that is imported, TensorFlow if both are.

        Raises:
            TypeError: extents that are no integers, or a window that is none.
            ValueError: extents below 1, a dtype that is none of these, or another layout.
        """
        if layout not in ("BSHD", "BHSD"):
            raise ValueError(f"{_NAME}: layout must be 'BSHD' or 'BHSD', got {layout!r}")
        max_length = extent(_NAME, "max_length", max_length)
        num_kv_heads, head_dim = extent(_NAME, "num_kv_heads", num_kv_heads), extent(_NAME, "head_dim", head_dim)
        value_dim = head_dim if value_dim is None else extent(_NAME, "value_dim", value_dim)
        if not hasattr(batch, "shape"):
            batch = extent(_NAME, "batch", batch)
        window = _window(window)
        rows = max_length if window is None else min(max_length, capacity(window))
        framework = chosen_framework(_NAME, framework, dtype)

        def shape(dim):
            return (batch, rows, num_kv_heads, dim) if layout == "BSHD" else (batch, num_kv_heads, rows, dim)

        fields = append_module(framework).empty(_NAME, shape(head_dim), shape(value_dim), dtype)
        return kind(layout, window, len(fields) > len(KVCache._fields))(*fields)

    @property
    def memory(self):
        """The arrays that grow: key and value, and in int8 the scales of both."""
        return self.key, self.value

    def with_memory(self, memory, **fields):
        """The cache with these arrays for those of `memory`, and other ``fields``."""
        return self._replace(**dict(zip(("key", "value", "key_scale", "value_scale"), memory)), **fields)

    @property
    def max_length(self):
        """How many positions a sequence may have (2^30 where older ones make way for new ones)."""
        return LARGEST_OFFSET if self.rolls else self.rows

    @property
    def rows(self):
        """How many positions there is memory for, None where unknown."""
        return self.key.shape[1 if self.layout == "BSHD" else 2]

    @property
    def rolls(self):
        """Whether older positions make way for new ones."""
        return self.window is not None and self.rows == capacity(self.window)

    def update(self, k, v, lengths=None):
        """The cache with the new rows after those that it has.

        Args:
            k, v: floating [batch, any number, num_kv_heads, head_dim] (or in layout "BHSD"); cast to the cache's dtype.
            lengths: None, or integers [batch]: how many of the new rows each sequence has; the others are padding.

        Raises:
            TypeError: k or v are no floating tensors.
            ValueError: their shapes do not fit the cache, or there is no room for them; the cache stays as it was.
            tf.errors.InvalidArgumentError: the same, where only the running op can know.
        """
        decode = importlib.import_module(f"attn_ops.{framework_of(self, k, v)}.decode")
        return decode.update("KVCache.update", self, k, v, lengths)

    def rewind(self, lengths):
        """The cache without the positions at and past these ``lengths``, integers [batch] or one for all: what was tried
        and not taken (speculative decoding). New rows overwrite it in loops of TensorFlow and in JAX; elsewhere the first of
        them copies the cache, since the one before may still be wanted.

        Raises:
            TypeError: lengths that are no integers.
            ValueError: lengths that are negative or longer than those of the cache (where only the running op can know,
                the nearest ones that it has are taken), or a cache with a window, which has let go of what it would have to
                see again.
        """
        decode = importlib.import_module(f"attn_ops.{framework_of(self)}.decode")
        return decode.rewound("KVCache.rewind", self, lengths)

    def copy(self):
        """The cache in memory of its own."""
        return append_module(framework_of(self)).copied(self)


class _Fields(typing.NamedTuple):
    """Those of a cache in int8."""

    key: typing.Any
    value: typing.Any
    lengths: typing.Any
    written: typing.Any
    key_scale: typing.Any
    value_scale: typing.Any


class _Int8KVCache(_Fields, KVCache):
    __slots__ = ()

    @property
    def memory(self):
        return self.key, self.value, self.key_scale, self.value_scale


@functools.cache
def kind(layout, window, int8=False):
    """The class of caches of this layout and window, in int8 or another dtype. Its name tells all, by which `tf.function`
    knows types apart."""
    if (layout, window, int8) == ("BSHD", None, False):
        return KVCache
    name = f"KVCache_{layout}" + ("_int8" if int8 else "") + ("" if window is None else f"_window{window}")
    base = _Int8KVCache if int8 else KVCache
    made = type(name, (base,), {"__slots__": (), "layout": layout, "window": window, "__reduce__": _reduced})
    _kinds.append(made)
    for tell in _told:
        tell(made)
    return made


_kinds, _told = [KVCache], []


def for_each_kind(tell):
    """Calls ``tell`` with every class of caches: those without a window, of any other that there is, and that there will be."""
    for layout, int8 in itertools.product(("BSHD", "BHSD"), (False, True)):
        kind(layout, None, int8)
    for made in _kinds:
        tell(made)
    _told.append(tell)


def _reduced(cache):
    return with_fields, (cache.layout, cache.window, tuple(cache))


def with_fields(layout, window, fields):
    """The cache of this layout and window with these fields, those of int8 or not."""
    return kind(layout, window, len(fields) > len(KVCache._fields))(*fields)


def step(window):
    """By how many positions at a time rows of a cache with a window make way, and so many new ones it takes at once."""
    return max(16, window // 8)


def capacity(window):
    """How many positions a cache with this window has memory for."""
    return window + 2 * step(window)


def framework_of(*tensors):
    """"tensorflow" or "jax", which one of these belongs to."""
    flat = [x for t in tensors for x in (t if isinstance(t, KVCache) else (t,))]
    jax, tf = sys.modules.get("jax"), sys.modules.get("tensorflow")
    if tf is not None and any(tf.is_tensor(x) for x in flat):
        return "tensorflow"
    if jax is not None and any(isinstance(x, jax.Array) for x in flat):
        return "jax"
    return _framework_of(None)


def chosen_framework(name, framework, dtype):
    """The option ``framework`` of `create`, checked, or what else tells it."""
    if framework is None:
        return _framework_of(dtype)
    if framework not in _FRAMEWORKS:
        raise ValueError(f"{name}: framework must be one of {_FRAMEWORKS}, got {framework!r}")
    return framework


def _framework_of(dtype):
    """The framework of a cache that nothing but this ``dtype`` tells."""
    if type(dtype).__module__.startswith("tensorflow"):
        return "tensorflow"
    if type(dtype).__module__.startswith("jax"):  # jax.numpy.float32
        return "jax"
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):
        backend = keras.config.backend()
        if backend in _FRAMEWORKS:
            return backend
    return "jax" if "jax" in sys.modules and "tensorflow" not in sys.modules else "tensorflow"


def append_module(framework):
    """append.py of this framework."""
    return importlib.import_module(f"attn_ops.{framework}.append")


def extent(name, what, value):
    """``value`` as an extent that a cache may have."""
    if not options.is_integer(value):
        raise TypeError(f"{name}: {what} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {value}")
    if value > np.iinfo(np.int32).max:
        raise ValueError(f"{name}: {what} must fit 32 bits, got {value}")
    return int(value)


def _window(window):
    if window is None:
        return None
    if isinstance(window, (tuple, list)):
        left, _ = options.window(_NAME, window)
        return None if left < 0 else extent(_NAME, "window", left + 1)
    return extent(_NAME, "window", window)
