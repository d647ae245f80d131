"""What the rules for arguments say of extents, some of which may be unknown, and of the order of the axes."""

from __future__ import annotations

LAYOUTS = "'BSHD' is [batch, seqlen, num_heads, head_dim], 'BHSD' is [batch, num_heads, seqlen, head_dim]"


def check_layout(name, layout):
    if layout not in ("BSHD", "BHSD"):
        raise ValueError(f"{name}: layout must be 'BSHD' or 'BHSD', got {layout!r}; {LAYOUTS}")


def shape_text(extents):
    return "<unknown>" if extents is None else str(tuple(extents))


def compatible(extents, expected):
    """Whether extents that may be unknown (None, each or all) can be the ``expected`` ones, which may be so too."""
    if extents is None:
        return True
    if len(extents) != len(expected):
        return False
    return all(a is None or b is None or a == b for a, b in zip(extents, expected))
