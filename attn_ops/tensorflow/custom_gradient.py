"""`tf.custom_gradient` for functions in graphs that read no variables, quicker to trace: twelve attention layers took 1.07 to
1.09 of the time of stock's with TensorFlow's, and 0.95 to 0.97 with this (`benchmarks/overhead.py`, Zen 5).

TensorFlow's looks for variables among all operations of the function, which tapes record though nobody is to ask for their
gradients. Here no tape sees them; what ties results to inputs is the same, and what saves models and loads them finds it as
there: an `IdentityN` of both, whose gradient is registered under a name of its own.
"""

from __future__ import annotations

import itertools
import uuid

import tensorflow as tf

from attn_ops.tensorflow import place
from attn_ops.tensorflow.as_written import as_written

# No name of another process: a model that was saved there without its gradients is to find none here.
_PROCESS = uuid.uuid4().hex
_numbers = itertools.count()


def apply(run, gradient, inputs):
    """The results of ``run(*inputs)``, whose gradient is ``gradient``.

    Args:
        run: From tensors to (results, kept), two lists of tensors. Its operations need no gradients.
        gradient: (results, kept, cotangents, by_tape) -> for each input its gradient or None. ``results`` and ``kept`` are those
            of ``run``, as constants to whoever differentiates the gradient. ``by_tape``: a tape asks, and uses no gradient of
            what it did not watch when ``run`` was called.
        inputs: Tensors, of the graph that is being made where one is.
    """
    inputs = list(inputs)
    record = None if tf.executing_eagerly() else place.recorder()
    if record is None:
        return _in_public(run, gradient, inputs)
    name = f"AttnOpsGradient-{_PROCESS}-{next(_numbers)}"
    with place.tapes(see=False), tf.compat.v1.get_default_graph().gradient_override_map({"IdentityN": name}):
        made, kept = run(*inputs)
        tied = tf.identity_n([*made, *kept, *inputs])
    results, kept = tied[: len(made)], tied[len(made) : -len(inputs)]

    def of_inputs(cotangents, by_tape):  # which are `tf.IndexedSlices` where rows were gathered
        return gradient(results, kept, [*map(tf.convert_to_tensor, cotangents)], by_tape)

    @tf.RegisterGradient(name)
    @as_written  # who saves a model has AutoGraph trace it
    def of_graph(_, *cotangents):
        unasked = [None] * (len(results) + len(kept))
        return [*unasked, *of_inputs(cotangents[: len(results)], by_tape=False)]

    record(name, results, inputs, lambda *cotangents: of_inputs(cotangents, by_tape=True))
    return results


def own(x):
    """``x`` as a tensor of the graph that is being made: the gradient of a branch may refer to no others."""
    return x if getattr(x, "graph", None) is tf.compat.v1.get_default_graph() else tf.identity(x)


def _in_public(run, gradient, inputs):
    """The same by names that TensorFlow does not keep to itself."""

    @tf.custom_gradient
    def function(*inputs):
        # A tape that saw the operations of `run` would ask for the gradients that they do not have: where tapes are nested
        # or persistent, `tf.switch_case` builds the gradient of its branches at once, needed or not.
        made, kept = run(*map(tf.stop_gradient, inputs))
        # What the gradient keeps becomes a result of the function around, which may be asked for its gradient too.
        constants = [tf.stop_gradient(x) for x in made], [tf.stop_gradient(x) for x in kept]
        return made, lambda *cotangents: gradient(*constants, cotangents, by_tape=False)

    return function(*inputs)
