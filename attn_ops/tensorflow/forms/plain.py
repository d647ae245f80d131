"""The operator `AttnOps>Plain`, for eager calls of query, key and value alone that are like one before.

Such a call may take as long to reach the kernel as the kernel takes. This operator has no lists of inputs and few
attributes, since each costs an eager call, used or not; and what was found out about the first such call, by the rules
of call/ and the choice of an implementation, is kept for those like it.
"""

from __future__ import annotations

from attn_ops import kernels
from attn_ops.call import checked_before
from attn_ops.call.attention_call import DEFAULT_ATTRIBUTES, AttentionCall, attributes
from attn_ops.tensorflow import gpu, place

_ATTRIBUTES = DEFAULT_ATTRIBUTES.keys() - {"dropout_rate"}  # of the operator

_given: dict = {}  # the attributes of the operator that differ from their defaults, name after value, by likeness


def again(like, query, key, value):
    """The output of a call ``like`` (checked_before.py) one that was remembered, or None."""
    given = None if like is None else _given.get(like)
    if given is None or kernels.unavailable_reason() is not None:
        return None
    execute = place.eager_executor()
    if execute is not None:
        try:
            return execute("AttnOps>Plain", query, key, value, *given)[0]
        except Exception:  # of names that TensorFlow keeps to itself: those of the function below are the public ones
            pass
    return kernels.library().attn_ops_plain(query, key, value, **dict(zip(given[::2], given[1::2])))[0]


def remember(like, tensors, call: AttentionCall) -> None:
    """Keeps what is to be known of ``call``, which ran fused in an eager call of these ``tensors`` and this ``like``, if the
    operator can."""
    if like is None or not checked_before.is_of(call, tensors):
        return
    if call.squeeze or call.return_lse or call.has_other_tensors() or gpu.any_visible():
        return
    changed = {name: x for name, x in attributes(call).items() if x != DEFAULT_ATTRIBUTES.get(name)}
    if changed.keys() <= _ATTRIBUTES:
        given = {"Tlse": call.lse_dtype, **changed}
        checked_before.keep(_given, like, tuple(x for pair in given.items() for x in pair))
