"""Who is told of attention calls: `attn_ops.visualize`, while it looks at a model."""

from __future__ import annotations

from collections.abc import Callable

listeners: list[Callable] = []  # each is called with the name of the function and its `AttentionCall`
