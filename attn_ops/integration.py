"""Fused attention in models that already exist: `attn_ops.patched` and `attn_ops.convert` by their public module."""

from attn_ops import convert, patch, patched, revert, unpatch

__all__ = ["convert", "patch", "patched", "revert", "unpatch"]
