"""Functions with derivatives of their own, in reverse mode and in forward mode.

`jax.custom_vjp` has no forward mode, and `jax.custom_jvp` no transpose of its own; its rule is also lost inside
`jax.lax.scan`, which derives what it hoists out of a loop as it finds it. Here are two primitives instead: a `call` whose
derivative is a function, and in it what is `Linear`, whose transpose is one. Both take and return tuples of arrays.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from attn_ops.jax import place


def call(function, derivative, arguments, linear=()):
    """``function(*arguments)``.

    ``derivative(arguments, tangents)`` gives the results and the tangents of all of them; a tangent that is zero is None.
    ``linear`` are the positions of arguments for which `jax.linear_transpose` may ask: one at a time the results are linear
    in them, or do not depend on them.
    """
    function = jax.make_jaxpr(function)(*arguments)
    return tuple(_call.bind(*arguments, function=function, derivative=derivative, linear=linear))


class Linear(typing.NamedTuple):
    """``function(others, linear)``, linear in its second argument and differentiable in both, and its transpose:
    ``transpose(others, cotangents)``, the cotangents of ``linear``."""

    function: typing.Callable
    transpose: typing.Callable

    def __call__(self, others, linear, like):
        """The value; ``like`` are arrays that it has the types of."""
        return self._bound(others, linear, tuple(map(place.type_of, like)))

    def _bound(self, others, linear, types):
        return tuple(_linear.bind(*others, *linear, of=self, count=len(others), types=types))


def _value(*arguments, function, derivative, linear):
    return jaxpr_as_fun(function)(*arguments)


def _derivative(primals, tangents, function, derivative, linear):
    return derivative(tuple(primals), tuple(None if type(x) is ad.Zero else x for x in tangents))


def _transposed(cotangents, *arguments, function, derivative, linear):
    asked = [at for at, x in enumerate(arguments) if ad.is_undefined_primal(x)]
    if len(asked) > 1 or asked[0] not in linear:
        raise NotImplementedError("attn_ops: attention is linear in its value alone, and has no other jax.linear_transpose")
    [at] = asked
    zeros = jnp.zeros(arguments[at].aval.shape, arguments[at].aval.dtype)

    def along(x):
        primals, tangents = list(arguments), [None] * len(arguments)
        primals[at], tangents[at] = zeros, x
        return derivative(tuple(primals), tuple(tangents))[1]

    found = [None] * len(arguments)
    [found[at]] = jax.linear_transpose(along, zeros)(tuple(map(ad.instantiate_zeros, cotangents)))
    return found


def _of_examples(arguments, axes, function, derivative, linear):
    size, arguments, axes = _leading(arguments, axes)

    def of_each(primals, tangents):
        along = tuple(None if x is None else axis for x, axis in zip(tangents, axes))
        return jax.vmap(derivative, (axes, along), axis_size=size)(primals, tangents)

    results = call(jax.vmap(jaxpr_as_fun(function), axes, axis_size=size), of_each, arguments, linear)
    return results, (0,) * len(results)


def _leading(arguments, axes):
    """How many examples there are, and the arguments and axes where that axis, of those that have it, is the first."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes) if axis is not None)
    arguments = tuple(x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arguments, axes))
    return size, arguments, tuple(None if axis is None else 0 for axis in axes)


def _linear_value(*arguments, of, count, types):
    return of.function(arguments[:count], arguments[count:])


def _linear_derivative(primals, tangents, **parameters):
    count = parameters["count"]
    value = _linear.bind(*primals, **parameters)
    given = [type(x) is not ad.Zero for x in tangents]
    if not any(given[:count]):
        along = map(ad.instantiate_zeros, tangents[count:])
        return value, _linear.bind(*primals[:count], *along, **parameters)

    @jax.checkpoint
    def function(*differentiable):
        differentiable = iter(differentiable)
        return _linear_value(*(next(differentiable) if g else x for g, x in zip(given, primals)), **parameters)

    return value, jax.jvp(function, *([x for x, g in zip(part, given) if g] for part in (primals, tangents)))[1]


def _linear_transposed(cotangents, *arguments, of, count, types):
    cotangents = tuple(map(ad.instantiate_zeros, cotangents))
    return [None] * count + list(of.transpose(arguments[:count], cotangents))


def _linear_of_examples(arguments, axes, of, count, types):
    size, arguments, axes = _leading(arguments, axes)
    others, linear = arguments[:count], arguments[count:]
    linear = tuple(x if axis == 0 else jnp.broadcast_to(x, (size, *x.shape)) for x, axis in zip(linear, axes[count:]))
    of = Linear(*(jax.vmap(x, (axes[:count], 0), axis_size=size) for x in of))
    results = of._bound(others, linear, tuple(jax.make_jaxpr(of.function)(others, linear).out_avals))
    return results, (0,) * len(results)


def _primitive(name, types, value, derivative, of_examples):
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(value)
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = of_examples
    mlir.register_lowering(primitive, mlir.lower_fun(value, multiple_results=True))
    return primitive


_call = _primitive("attn_ops_call", lambda *_, function, **__: function.out_avals, _value, _derivative, _of_examples)
_linear = _primitive(
    "attn_ops_linear", lambda *_, types, **__: types, _linear_value, _linear_derivative, _linear_of_examples
)
ad.primitive_transposes[_call] = _transposed
ad.primitive_transposes[_linear] = _linear_transposed
