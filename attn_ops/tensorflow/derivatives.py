"""The derivatives of the fused attention, to second order, in whatever form the kernels are called.

First derivatives are the kernels' own; those of them are the composite's, which is made of differentiable operations.
Eager calls find the gradients of the operators registered, since `tf.custom_gradient` costs them ten times as much.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call.attention_call import (
    DEFAULT_ATTRIBUTES,
    NO_GRADIENT,
    AttentionCall,
    attributes,
    optional_inputs,
    reads_cache,
)
from attn_ops.tensorflow import composite, custom_gradient, place, registration, vectorization

# For the names of all attributes and of all counts of optional inputs.
_ANY_CALL = AttentionCall(None, None, None, block_q=1, block_k=1, logits_soft_cap=1.0)
_NO_INPUTS = optional_inputs(AttentionCall(None, None, None))
_GRADIENTS = {"num_bias": "bias", "num_relative_bias": "relative_bias", "num_sinks": "sinks"}  # of optional inputs


def differentiable(form, call: AttentionCall):
    """(out, lse) of a ``form`` whose operations have no gradient of their own, with gradients up to second order; lse is
    None unless ``call.return_lse``."""
    call = _in_this_graph(call)
    # No tape that is open now will ask for it. What is differentiated without tapes, as functions are, may.
    constant_bias = call.bias is not None and not place.is_watched(call.bias)

    def forward(*inputs):
        out, lse, statistics = form.forward(call.with_differentiable(inputs))
        return [out, *([lse] if call.return_lse else [])], [statistics]

    def gradient(results, kept, cotangents, by_tape):
        if reads_cache(call):
            raise NotImplementedError(NO_GRADIENT)
        asked = call._replace(constant_bias=constant_bias and by_tape)
        return _at_their_places(asked, asked.asked(), _gradients(form, asked, results[0], *kept, cotangents))

    out, *lse = custom_gradient.apply(forward, gradient, call.differentiable())
    return out, lse[0] if lse else None


def _gradients(form, call, out, statistics, cotangents):
    call, cotangents = _in_this_graph(call), [*map(custom_gradient.own, cotangents)]
    out, statistics = map(custom_gradient.own, (out, statistics))
    if vectorization.reason_against_kernels(call, *cotangents):
        return composite.gradients(composite.separate(call), cotangents, call.asked(), vectorized=True)
    num_inputs = len(call.differentiable())

    def backward(*arguments):
        d_out, d_lse = (*arguments[num_inputs:], None)[:2]
        return form.backward(call.with_differentiable(arguments[:num_inputs]), out, statistics, d_out, d_lse), []

    def gradient(_, __, incoming, by_tape):
        d_inputs, d_cotangents = _second_order(call, cotangents, _at_their_places(call, call.asked(), incoming))
        return *d_inputs, *d_cotangents

    return custom_gradient.apply(backward, gradient, [*call.differentiable(), *cotangents])


def _at_their_places(call, asked, gradients):
    """One for each differentiable input, of the gradients of those that are ``asked`` for; None for the others."""
    found = dict(zip(asked, gradients))
    return [found.get(at) for at in range(len(call.differentiable()))]


def _in_this_graph(call):
    """``call`` with tensors of the graph that is being made: the gradient of a branch may refer to no others."""
    return call.map_tensors(custom_gradient.own)


def _second_order(call, cotangents, incoming):
    """How a function of the gradients of ``call`` changes with its inputs and with the cotangents.

    Args:
        call: The attention.
        cotangents: [d_out] or [d_out, d_lse], from which the first gradients were computed.
        incoming: Gradients with respect to the gradients of the differentiable inputs; None for what nobody used, or
            computed.

    Returns:
        Two lists: for the differentiable inputs, and for the cotangents. None where nothing depends.
    """
    wanted = [i for i, g in enumerate(incoming) if g is not None]
    # Copies, too, because a tape does not follow a tensor of another graph that was taken into this one before.
    call, cotangents = composite.separate(call), [*map(tf.identity, cotangents)]
    inputs = call.differentiable()
    with tf.GradientTape() as tape:
        tape.watch(inputs + cotangents)
        first = composite.gradients(call, cotangents, wanted, query_chunk=None)
    d = tape.gradient(first, inputs + cotangents, output_gradients=[incoming[i] for i in wanted])
    return d[: len(inputs)], d[len(inputs) :]


def _attributes_of(op):
    """(name, default where the op has none) -> attribute of ``op``. For eager operations TensorFlow takes some 3 us each time, a
    third of a small call's gradient: what one has is remembered for all that were given the same."""
    given = place.eager_attributes(op)
    known = {} if given is None else _known(op.type, given)

    def get(name, *default):
        if name not in known:
            known[name] = _attribute(op, name, *default)
        return known[name]

    return get


def _attribute(op, name, *default):
    """An eager operation knows the attributes that it was given, and some it does not have."""
    try:
        return op.get_attr(name)
    except (KeyError, ValueError, tf.errors.InvalidArgumentError):
        if not default:
            raise
        return default[0]


@functools.lru_cache(maxsize=256)
def _known(operator, given) -> dict:
    """Attributes by name, filled as they are asked for, of eager operations that were given these."""
    return {}


def _split(get_attribute, inputs):
    """The optional inputs of either op, which end its input list: as lists, by the attribute that counts them."""
    lists, start = {}, 0
    for count in optional_inputs(_ANY_CALL):
        end = start + get_attribute(count)
        lists[count] = list(inputs[start:end])
        start = end
    return lists


def _of_inputs(lists, gradients):
    """Gradients of the optional inputs ``lists``, from those of `_GRADIENTS`, flat and in this order; None for others."""
    gradients = iter(gradients)
    return [next(gradients) if count in _GRADIENTS else None for count, inputs in lists.items() for _ in inputs]


@registration.gradient_of("AttnOps>Forward")
def _forward_gradient(op, d_out, _, *d_lse):
    get_attribute = _attributes_of(op)
    if get_attribute("halves"):
        raise NotImplementedError("attn_ops: attention to a cache of keys and values in one tensor has no gradient")
    lists = _split(get_attribute, op.inputs[3:])
    # Eager tapes and those of tf.function tell which inputs nobody watches; a constant bias then costs nothing.
    unwanted = place.unwatched_inputs(op)
    d_query, d_key, d_value, *others = _backward(
        op,
        d_out,
        [d for d in d_lse if d is not None],
        lists,
        d_bias=bool(lists["num_bias"]) and 3 not in unwanted,
        **{name: get_attribute(name) for name in attributes(_ANY_CALL)},
    )
    others = _of_inputs(lists, [d for gradients in others for d in gradients])
    return [d_query, d_key, d_value] + [None if at in unwanted else d for at, d in enumerate(others, 3)]


@registration.gradient_of("AttnOps>Plain")
def _plain_gradient(op, d_out, _):
    get_attribute = _attributes_of(op)
    given = {name: get_attribute(name, default) for name, default in DEFAULT_ATTRIBUTES.items()}
    return _backward(op, d_out, [], _NO_INPUTS, d_bias=False, **given)[:3]


def _backward(op, d_out, d_lse, lists, **attributes):
    """The results of AttnOps>Backward for a forward operator and its cotangents."""
    query, key, value = op.inputs[:3]
    out, statistics = op.outputs[:2]
    d_out = tf.zeros_like(out) if d_out is None else d_out
    return kernels.library().attn_ops_backward(
        query, key, value, out, statistics, d_out, d_lse, *lists.values(), **attributes
    )


@registration.gradient_of("AttnOps>Decode")
def _no_gradient(op, *_):
    raise NotImplementedError(NO_GRADIENT)


@registration.gradient_of("AttnOps>Backward")
def _backward_gradient(op, *gradients):
    """Second order. `out` and `statistics` are inputs of the op but functions of the others, which get it all."""
    query, key, value, _, _, d_out = op.inputs[:6]
    get_attribute = _attributes_of(op)
    num_d_lse = get_attribute("num_d_lse")
    d_lse = list(op.inputs[6 : 6 + num_d_lse])
    lists = _split(get_attribute, op.inputs[6 + num_d_lse :])
    call = _call_of(op, query, key, value, lists)
    incoming = list(gradients)
    if call.bias is not None and not get_attribute("d_bias"):  # nobody wanted that of the bias, which is empty
        incoming[3] = None
    d_inputs, d_cotangents = _second_order(call, [d_out, *d_lse], incoming)
    d_d_out, *d_d_lse = d_cotangents
    return [*d_inputs[:3], None, None, d_d_out, *d_d_lse, *_of_inputs(lists, d_inputs[3:])]


def _call_of(op, query, key, value, lists):
    """The call that an op was made for."""
    get_attribute = _attributes_of(op)
    attribute = {name: get_attribute(name) for name in attributes(_ANY_CALL)}

    def one(count):
        return next(iter(lists.get(count, ())), None)

    def pair(count):
        return tuple(lists.get(count, ())) or None

    def number(name):
        text = attribute.get(name, b"").decode()
        return float(text) if text else None

    return AttentionCall(
        query,
        key,
        value,
        one("num_bias"),
        tuple(lists["num_masks"]),
        number("scale"),
        attribute["window_left"],
        attribute["window_right"],
        attribute["bottom_right"],
        one("num_query_lengths"),
        one("num_key_lengths"),
        number("dropout_rate"),
        one("num_seed"),
        attribute["layout"].decode(),
        lse_dtype=op.inputs[4].dtype,
        intervals=pair("num_intervals"),
        query_offset=one("num_query_offset"),
        segments=pair("num_segments"),
        blocks=one("num_blocks"),
        block_q=attribute.get("block_q", 0),
        block_k=attribute.get("block_k", 0),
        logits_soft_cap=number("soft_cap"),
        alibi_slopes=one("num_slopes"),
        relative_bias=one("num_relative_bias"),
        sinks=one("num_sinks"),
    )
