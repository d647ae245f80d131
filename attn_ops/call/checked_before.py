"""Calls that are like one that was checked before, which need no checks: an eager call would spend a third of its time on them."""

from __future__ import annotations

from attn_ops.call import precision
from attn_ops.call.attention_call import AttentionCall

_NUMBERS = frozenset([bool, int, float, str, type(None)])
_LARGEST = 1024
_FIRST = 3  # query, key, value

_options: dict = {}  # what stands behind the tensors in an `AttentionCall`, by likeness


def likeness(xp, tensors, given):
    """All that the rules see of a call, where that is no more than kinds of tensors, and numbers; else None."""
    types = tuple(map(type, given.values()))  # for True is 1, and -1.0 is -1
    if not _NUMBERS.issuperset(types):
        return None
    kinds = tuple(map(xp.kind, tensors))
    return None if None in kinds else (xp, kinds, tuple(given.items()), types, precision.allow_tf32())


def recall(like, tensors):
    """The call with these ``tensors`` if one that was ``like`` it is known, else None."""
    options = _options.get(like)
    return None if options is None else AttentionCall._make((*tensors, *options))


def remember(like, tensors, call):
    """Keeps what is not of these very tensors in a ``call``, and warns of nothing; one without any other array."""
    if not is_of(call, tensors) or call.has_other_tensors() or call.sees_the_first_key_alone():
        return
    keep(_options, like, tuple(call[_FIRST:]))


def is_of(call, tensors):
    """Whether these very tensors are what a ``call`` is of: not ones that were promoted to a common dtype, or got more axes."""
    return all(x is y for x, y in zip(call, tensors))


def keep(known, like, what):
    """Adds ``what`` is known of calls of this likeness to those that are, if need be in their place."""
    if len(known) >= _LARGEST:
        known.clear()
    known[like] = what
