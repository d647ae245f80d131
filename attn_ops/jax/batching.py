"""What `jax.vmap` makes of the kernels: its axis joins the batch, so that one call does what many would.

Not where examples share what must not be added up or drawn anew: dropout, whose bits follow the number of the batch
entry; relative_bias and sinks that differ between examples, or whose gradients do; pages that differ. There, one call
follows the other.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attn_ops.jax.call import Arrays, Options

_OF_NO_BATCH = ("relative_bias", "sinks")  # and in pages also the keys
# Those that the kernels want for each entry; one of the others may be for all.
_FOR_EACH = ("query", "key", "value", "query_lengths", "key_lengths", "block_table", "key_scales", "value_scales")


def forward(kernels, options: Options, arrays: Arrays):
    """``kernels(options, arrays)``, which are `forms.forward`, with a rule for `jax.vmap`."""
    return _forward(kernels, options)(arrays)


def backward(kernels, options: Options, arrays: Arrays, out, statistics, d_out, d_lse, wanted: tuple[str, ...]):
    """``kernels(options, *arguments, wanted)``, which are `forms.backward`, with a rule for `jax.vmap`."""
    return _backward(kernels, options, wanted)(arrays, out, statistics, d_out, d_lse)


@functools.cache
def _forward(kernels, options):
    function = jax.custom_batching.custom_vmap(functools.partial(kernels, options))

    @function.def_vmap
    def rule(count, batched, arrays):
        if _differ(options, arrays, batched[0]):
            return _one_by_one(function, batched, arrays)
        batch = arrays.query.shape[1 if batched[0].query else 0]
        results = function(_joined_arrays(arrays, batched[0], count, batch))
        return _parted(results, count, batch), jax.tree.map(lambda x: True, results)

    return function


@functools.cache
def _backward(kernels, options, wanted):
    function = jax.custom_batching.custom_vmap(lambda *x: kernels(options, *x, wanted))

    @function.def_vmap
    def rule(count, batched, arrays, *others):
        if _differ(options, arrays, batched[0]) or any(name in wanted for name in _OF_NO_BATCH):
            return _one_by_one(function, batched, arrays, *others)
        own = arrays.query.shape[1 if batched[0].query else 0]
        joined = _joined_arrays(arrays, batched[0], count, own)
        bias_shape = None
        if "bias" in wanted:  # each example has a gradient of its own
            bias_shape = arrays.bias.shape[1 if batched[0].bias else 0 :]
            joined = joined._replace(bias=_joined(arrays.bias, batched[0].bias, count, own))
        results = function(joined, *(_joined_tree(x, b, count) for x, b in zip(others, batched[1:])))
        results = list(_parted(results, count, own))
        if bias_shape is not None:
            at = wanted.index("bias")
            if bias_shape[0] != own:
                results[at] = results[at].sum(1, keepdims=True)
        return tuple(results), (True,) * len(results)

    return function


def _differ(options, arrays, batched):
    """Whether examples cannot be entries of one batch."""
    alone = [*_OF_NO_BATCH, *(("key", "value", "key_scales", "value_scales") if arrays.block_table is not None else ())]
    return bool(options.dropout_rate) or any(getattr(batched, name) for name in alone)


def _joined_arrays(arrays, batched, count, batch):
    """The arrays of all examples as those of one call."""

    def join(name, x, is_batched):
        if x is None or name in _OF_NO_BATCH:
            return x
        if arrays.block_table is not None and name in ("key", "value", "key_scales", "value_scales"):
            return x
        if isinstance(x, tuple):
            return tuple(map(functools.partial(join, name), x, is_batched))
        if not is_batched and name not in _FOR_EACH and x.shape[0] == 1 != batch * count:
            return x  # all entries have the same
        return _joined(x, is_batched, count, batch)

    return Arrays(*map(join, Arrays._fields, arrays, batched))


def _joined_tree(x, batched, count):
    return None if x is None else _joined(x, batched, count, x.shape[1 if batched else 0])


def _joined(x, batched, count, batch):
    """``x`` [count, batch or 1, ...], or without its first axis, as [count * batch, ...]."""
    shape = x.shape[1:] if batched else x.shape
    x = jnp.broadcast_to(x if batched else x[None], (count, *shape))
    x = jnp.broadcast_to(x, (count, batch, *shape[1:]))
    return x.reshape(count * batch, *shape[1:])


def _parted(results, count, batch):
    return jax.tree.map(lambda x: x.reshape(count, batch, *x.shape[1:]), results)


def _one_by_one(function, batched, *arguments):
    leaves, tree = jax.tree.flatten(arguments)
    vary = jax.tree.leaves(batched)

    def one(varying):
        varying = iter(varying)
        return function(*jax.tree.unflatten(tree, [next(varying) if v else x for x, v in zip(leaves, vary)]))

    results = jax.lax.map(one, [x for x, v in zip(leaves, vary) if v])
    return results, jax.tree.map(lambda x: True, results)
