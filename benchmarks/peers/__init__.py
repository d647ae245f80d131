"""Every implementation that is measured. See base.Peer for what one provides."""

from __future__ import annotations

import importlib.util

from workloads import FORWARD

from . import (
    attn_ops_core,
    jax_attention,
    keras_layers,
    onnxruntime_ops,
    openvino_sdpa,
    tensorflow_ops,
    torch_sdpa,
)
from .base import Peer, check, set_threads, versions

if importlib.util.find_spec("attn_ops") is None:  # its reference checks every peer
    raise ImportError("the benchmarks need attn_ops installed: ./dev setup, or pip install --editable .")

__all__ = ["PEERS", "Peer", "check", "select", "set_threads", "versions"]

_MODULES = (
    tensorflow_ops,
    attn_ops_core,
    torch_sdpa,
    onnxruntime_ops,
    openvino_sdpa,
    jax_attention,
    keras_layers,
)
PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.peers()}


def select(workload, mode: str, names=None) -> list[Peer]:
    """The installed peers that can do this work, in table order; `names` restricts them. Decoding is not trained."""
    unknown = sorted(set(names or ()) - PEERS.keys())
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if workload.is_decode and mode != FORWARD:
        return []
    return [
        peer
        for peer in PEERS.values()
        if (peer.name in names if names else peer.by_default) and peer.installed() and peer.can(workload, mode)
    ]
