"""The few functions of arrays that masks need of whichever framework their arrays belong to."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys

import numpy as np


class NumPy:
    """The few array functions that NumPy, TensorFlow and JAX name or do differently."""

    arange = staticmethod(np.arange)
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    equal = staticmethod(np.equal)
    where = staticmethod(np.where)

    def int64(self, x):
        return self._values(x).astype(np.int64)

    def int32(self, x):
        return self._values(x).astype(np.int32)

    def bool(self, x):
        return self._values(x).astype(bool, copy=False)

    def _values(self, x):
        values = known(x)  # constants of graphs too, which are no arrays of NumPy
        return np.asarray(x) if values is None else np.asarray(values)

    def repeat_batch(self, visible, batch):
        if visible.shape[0] not in (1, batch):
            raise ValueError(f"Mask.materialize: batch must be {visible.shape[0]}, that of the mask, got {batch}")
        return np.broadcast_to(visible, (batch,) + visible.shape[1:])

    def same_batch(self, *arrays):
        """The arrays `[batch or 1, extent]` with one batch."""
        batches = {x.shape[0] for x in arrays}
        if len(batches - {1}) > 1:
            raise ValueError(f"Mask: parts of one mask must have the same batch, or 1, got {sorted(batches)}")
        [batch] = np.broadcast_shapes(*((n,) for n in batches))
        return [np.broadcast_to(x, (batch, x.shape[1])) for x in arrays]

    def extent(self, x, axis):
        return x.shape[axis]

    def take(self, x, indices, axis=-1):
        return np.take(x, indices, axis)

    def take_along(self, x, indices):
        """`x[b, indices[b, i]]`."""
        return np.take_along_axis(x, indices, 1)

    def argsort(self, x):
        """Along the last axis; equal elements stay in order."""
        return np.argsort(x, -1, kind="stable")

    def searchsorted(self, ordered, values, side):
        """Of values `[batch, n]` in ordered `[batch, m]`, or of values of any shape in ordered `[m]`."""
        if ordered.ndim == 1:
            return np.searchsorted(ordered, values, side)
        found = [np.searchsorted(o, v, side) for o, v in zip(ordered, values)]
        return np.stack(found) if found else np.zeros(values.shape, np.int64)

    def can_search(self, ordered, values):
        """Whether `argsort`, `searchsorted` and `running_maximum` can be had of both, `[batch, m]` and `[batch, n]`."""
        return True

    def with_zero(self, x):
        """`[batch, n]` with one more column, of zeros."""
        return np.pad(x, [(0, 0), (0, 1)])

    def running_maximum(self, x):
        """Along the last axis."""
        return np.maximum.accumulate(x, -1)

    def check_lengths(self, name, lengths, seqlen):
        lengths = np.asarray(lengths)
        if lengths.size and (lengths.min() < 0 or lengths.max() > seqlen):
            raise ValueError(f"Mask.materialize: {name} must be in [0, {seqlen}], got {lengths}")


class TensorFlow:
    def __init__(self, tf):
        self.tf = tf
        self.arange = tf.range
        self.minimum = tf.minimum
        self.maximum = tf.maximum
        self.equal = tf.equal
        self.where = tf.where
        self.listed = tf.convert_to_tensor

    def int64(self, x):
        return self.tf.cast(x, self.tf.int64)

    def int32(self, x):
        return self.tf.cast(x, self.tf.int32)

    def bool(self, x):
        return self.tf.cast(x, self.tf.bool)

    def repeat_batch(self, visible, batch):
        return self.tf.broadcast_to(visible, self.tf.concat([[batch], self.tf.shape(visible)[1:]], 0))

    def same_batch(self, *arrays):
        tf = self.tf
        known = [x.shape[0] for x in arrays]
        if None not in known and len(set(known)) == 1:
            return list(arrays)
        batch = tf.shape(arrays[0])[:1]
        for x in arrays[1:]:
            batch = tf.broadcast_dynamic_shape(batch, tf.shape(x)[:1])
        return [tf.broadcast_to(x, tf.concat([batch, tf.shape(x)[1:]], 0)) for x in arrays]

    def extent(self, x, axis):
        return self.tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]

    def take(self, x, indices, axis=-1):
        return self.tf.gather(x, indices, axis=axis)

    def take_along(self, x, indices):
        return self.tf.gather(x, indices, batch_dims=1)

    def argsort(self, x):
        return self.int64(self.tf.argsort(x, stable=True))

    def searchsorted(self, ordered, values, side):
        tf = self.tf
        if len(ordered.shape) > 1:  # its reshaping in `tf.searchsorted` fails for an empty batch of unknown extent
            search = {"left": tf.raw_ops.LowerBound, "right": tf.raw_ops.UpperBound}[side]
            return search(sorted_inputs=ordered, values=values, out_type=tf.int64)
        return tf.reshape(tf.searchsorted(ordered, tf.reshape(values, [-1]), side, tf.int64), tf.shape(values))

    def can_search(self, ordered, values):
        """Not in XLA where only the data may decide the extents: it sorts whatever lies beyond them too."""
        unknown = None in [*ordered.shape, *values.shape]
        return not (unknown and importlib.import_module("attn_ops.tensorflow.place").in_xla())

    def with_zero(self, x):
        return self.tf.pad(x, [[0, 0], [0, 1]])

    def running_maximum(self, x):
        # TensorFlow has none of its own: in step n each element takes what the 2^n before it have found.
        tf = self.tf
        extent = tf.shape(x)[-1]
        places = tf.range(extent)

        def step(distance, x):
            return 2 * distance, tf.maximum(x, tf.gather(x, tf.maximum(places - distance, 0), axis=-1))

        return tf.while_loop(lambda distance, _: distance < extent, step, (tf.constant(1), x))[1]

    def check_lengths(self, name, lengths, seqlen):
        """Values of a graph tensor are not known here; the attention op checks them when it runs."""

    def required(self, x, holds, rule):
        """``x``, which where a graph runs (but not in XLA) waits until ``holds()``, else tf.errors.InvalidArgumentError."""
        tf = self.tf
        if tf.executing_eagerly():
            return x
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(holds()), [rule, "got", x], summarize=8)]):
            return tf.identity(x)


class Jax:
    def __init__(self, jax):
        self.jax = jax
        self.jnp = jax.numpy
        self.arange = jax.numpy.arange
        self.minimum = jax.numpy.minimum
        self.maximum = jax.numpy.maximum
        self.equal = jax.numpy.equal
        self.where = jax.numpy.where
        self.listed = jax.numpy.asarray

    def int64(self, x):
        """In JAX's default integers: int32, unless 64 bits are enabled. An integer stays one, since extents must."""
        if not isinstance(x, (np.ndarray, np.generic, list, tuple, self.jax.Array)):
            return x
        return self.jnp.asarray(x).astype(int)

    def int32(self, x):
        return self.jnp.asarray(x).astype("int32")

    def bool(self, x):
        return self.jnp.asarray(x).astype(bool)

    def repeat_batch(self, visible, batch):
        return self.jnp.broadcast_to(visible, (batch, *visible.shape[1:]))

    def same_batch(self, *arrays):
        [batch] = self.jnp.broadcast_shapes(*(x.shape[:1] for x in arrays))
        return [self.jnp.broadcast_to(x, (batch, x.shape[1])) for x in arrays]

    def extent(self, x, axis):
        return x.shape[axis]

    def take(self, x, indices, axis=-1):
        return self.jnp.take(x, indices, axis, mode="clip")

    def take_along(self, x, indices):
        return self.jnp.take_along_axis(x, indices, 1, mode="clip")

    def argsort(self, x):
        return self.jnp.argsort(x, -1, stable=True)

    def searchsorted(self, ordered, values, side):
        def search(ordered, values):
            return self.jnp.searchsorted(ordered, values, side)

        return search(ordered, values) if ordered.ndim == 1 else self.jax.vmap(search)(ordered, values)

    def can_search(self, ordered, values):
        """Not where `jax.export` leaves the extent open."""
        return isinstance(ordered.shape[-1], int)

    def with_zero(self, x):
        return self.jnp.pad(x, [(0, 0), (0, 1)])

    def running_maximum(self, x):
        return self.jax.lax.cummax(x, x.ndim - 1)

    def check_lengths(self, name, lengths, seqlen):
        """Values of a traced array are not known here; the attention checks them where it can."""

    def required(self, x, holds, rule):
        """``x``: what is traced cannot be asked."""
        return x


class Keras:
    """KerasTensors: what a mask of them needs to be combined with others and handed to the attention."""

    def __init__(self, keras):
        self.keras = keras
        self.minimum = keras.ops.minimum
        self.equal = keras.ops.equal

    def int64(self, x):
        return self.keras.ops.cast(x, "int64")

    def required(self, x, holds, rule):
        """``x``, whose values the attention will know."""
        return x


def as_written(function):
    """``function`` as tensorflow/as_written.py keeps it, once there is a TensorFlow. AutoGraph reads this: no import here."""
    kept = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal kept
        tf = sys.modules.get("tensorflow")
        if kept is None and getattr(tf, "autograph", None) is not None:
            kept = tf.autograph.experimental.do_not_convert(function)
        return function(*args, **kwargs) if kept is None or tf.executing_eagerly() else kept(*args, **kwargs)

    return call


def of(values):
    """That of the framework which one of the values belongs to."""
    keras = sys.modules.get("keras")
    kind = getattr(keras, "KerasTensor", ())
    if any(isinstance(value, kind) for value in values):
        return Keras(keras)
    tf = sys.modules.get("tensorflow")
    if tf is not None and any(tf.is_tensor(value) for value in values):
        return TensorFlow(tf)
    jax = sys.modules.get("jax")
    if jax is not None and any(isinstance(value, jax.Array) for value in values):
        return Jax(jax)
    return NumPy()


@contextlib.contextmanager
def untraced():
    """What TensorFlow and JAX make of arrays with values has values meanwhile, also while something is being traced."""
    tf, jax = (sys.modules.get(name) for name in ("tensorflow", "jax"))
    with contextlib.ExitStack() as stack:
        if tf is not None and not tf.executing_eagerly():
            stack.enter_context(tf.init_scope())
        if jax is not None:
            stack.enter_context(jax.ensure_compile_time_eval())
        yield


def native(x):
    """``x``, an array of NumPy in this machine's order of bytes: graphs of TensorFlow read others as if they were in it,
    and JAX takes none."""
    return x.astype(x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) and not x.dtype.isnative else x


def held(x):
    """``x``, or the array of JAX that it stands for, as JAX's functions take it: a variable of Keras, a parameter of Flax;
    `native`."""
    x = native(x)
    keras, jax = (sys.modules.get(name) for name in ("keras", "jax"))
    if jax is None or isinstance(x, (jax.Array, getattr(keras, "KerasTensor", ()))):
        return x
    return x.__jax_array__() if hasattr(type(x), "__jax_array__") else x


def listed(sequence):
    """Nested lists as an array: of NumPy, or where there are traced numbers in it, of their framework."""
    try:
        return np.asarray(sequence)
    except (TypeError, NotImplementedError):  # what TensorFlow and JAX say of those
        xp = of(_flat(sequence))
        if not hasattr(xp, "listed"):
            raise
        return xp.listed(sequence)


def _flat(sequence):
    return [x for item in sequence for x in (_flat(item) if isinstance(item, (list, tuple)) else [item])]


def known(x):
    """The values of an array or a number as a NumPy array; None of what is traced or only described."""
    keras, tf, jax = (sys.modules.get(name) for name in ("keras", "tensorflow", "jax"))
    if isinstance(x, getattr(keras, "KerasTensor", ())):
        return None
    if tf is not None and tf.is_tensor(x):
        return x.numpy() if isinstance(x, tf.Variable) and tf.executing_eagerly() else tf.get_static_value(x)
    if jax is not None and isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, (int, np.ndarray, np.generic)) or (jax is not None and isinstance(x, jax.Array)):
        return np.asarray(x)
    return None  # such as an extent that jax.export leaves open


def required(x, holds, rule):
    """``x``, for whose elements ``holds(x)`` is true.

    Where they are known a ValueError with the rule and them, or of many axes the first wrong one, tells otherwise; in graphs
    of TensorFlow, as they run, an InvalidArgumentError. XLA and JAX do not tell of what they trace.
    """
    values = known(x)
    if values is None:
        return of((x,)).required(x, lambda: holds(x), rule)
    wrong = values[~np.asarray(holds(values))]
    if wrong.size:
        raise ValueError(f"{rule}, got {values if values.ndim < 2 else wrong[0]}")
    return x
