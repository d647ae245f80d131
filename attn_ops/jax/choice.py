"""Which implementation a call gets, as far as that is decided before it is compiled for a device."""

from __future__ import annotations

import collections

from attn_ops.call import explanation
from attn_ops.jax import forms

IMPLEMENTATIONS = ("fused", "composite")
# How many calls each has got in this process; in functions that JAX compiles, how many were traced.
calls: collections.Counter = collections.Counter()


def choose(name: str, implementation: str | None) -> str:
    """"fused" for the kernels wherever the device has them, or "composite"; ValueError where a forced one cannot run."""
    explanation.check_name(name, implementation, IMPLEMENTATIONS)
    missing = forms.unavailable_reason()
    if implementation == "fused":
        explanation.check_can_run(name, implementation, [] if missing is None else [missing])
    return implementation or ("fused" if missing is None else "composite")
