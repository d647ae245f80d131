"""How exactly the kernels multiply float32 on GPUs: a choice of the process, which calls take along when traced."""

from __future__ import annotations

import os

_allowed = os.environ.get("ATTN_OPS_ALLOW_TF32", "0") not in ("", "0")


def allow_tf32() -> bool:
    """Whether products of float32 may be taken in TF32 on GPUs; see `set_allow_tf32`."""
    return _allowed


def set_allow_tf32(allowed: bool) -> None:
    """Lets the fused op multiply float32 in TF32 on GPUs: three times fewer products, with 10 bits of mantissa.

    Off at first (the environment variable ``ATTN_OPS_ALLOW_TF32=1`` turns it on): float32 then means float32, by three
    products of TF32 each. Calls made or traced from now on hold the choice as an attribute, their gradients as well;
    functions that are traced already keep theirs. Other dtypes, the CPU and the composite do not care: for the
    composite TensorFlow and JAX have settings of their own.
    """
    global _allowed
    if not isinstance(allowed, bool):
        raise TypeError(f"set_allow_tf32: allowed must be a bool, got {type(allowed).__name__}")
    _allowed = allowed
