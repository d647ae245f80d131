"""Fused attention in models that already exist: `attn_ops.patched` and `attn_ops.convert` by their public module."""

from attn_ops.models.convert import convert, revert
from attn_ops.models.patched import patch, patched, unpatch

__all__ = ["convert", "patch", "patched", "revert", "unpatch"]
