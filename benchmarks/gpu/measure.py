"""Measures a workload by all peers in interleaved rounds, once their answers are checked."""

from __future__ import annotations

import dataclasses

import numpy as np
from attn_ops.cli import interleave
from rows import Row
from workloads import FORWARD, Workload, make_inputs

from . import device as devices
from .workloads import example, flops, input_bytes

# The largest error against the float64 reference, as a part of the largest value.
_TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2}
OURS = "attn_ops"


@dataclasses.dataclass(frozen=True)
class Effort:
    rounds: int = 15
    seconds: float = 10.0
    turn: float = 0.02


def run(device, workload: Workload, mode: str, peers, effort: Effort) -> tuple[list[Row], list[str]]:
    """The rows, and notes: peers that failed and why. What of ours fails is raised."""
    steps, errors, notes = {}, {}, []
    peers = [peer for peer in peers if peer.can(workload, mode)]
    try:
        for peer in peers:
            try:
                errors[peer.name] = check(device, peer, workload, mode)
                steps[peer.name] = _rotating(device, peer, workload, mode)
            except Exception as failure:  # whatever another library raises; ours must not fail
                if peer.name.startswith(OURS):
                    raise
                notes.append(f"{peer.name}, {workload}, {mode}: {type(failure).__name__}: {failure}"[:300])
        if not steps:
            return [], notes
        samples, rates, rounds = interleave.run(
            steps,
            effort.rounds,
            effort.seconds,
            probes=devices.limits(device),
            turn=effort.turn,
            take_turn=lambda step, samples, seconds: _turn(device, step, samples, seconds),
        )
    finally:
        for peer in peers:
            peer.close()
        steps.clear()
        device.release()
    by_name = {peer.name: peer for peer in peers}
    return [
        _row(workload, mode, by_name[name], sample, rates, rounds, errors[name]) for name, sample in samples.items()
    ], notes


def _turn(device, step, samples, seconds):
    if hasattr(step, "turn"):  # in another process, with a clock of its own
        samples.wall.append(step.turn(seconds))
        return
    devices.turn(device, step, samples, seconds)


def _rotating(device, peer, workload, mode):
    """A step whose every call works on another set of inputs, so that none is still in the cache."""
    count = max(-(-2 * device.cache_bytes // input_bytes(workload)), 1)
    first = peer.prepare(device, workload, mode, random_inputs(device, workload, 0))
    if hasattr(first, "turn"):  # which rotates itself
        return first
    steps = [first]
    steps += [peer.prepare(device, workload, mode, random_inputs(device, workload, n)) for n in range(1, count)]
    position = 0

    def step():
        nonlocal position
        position = (position + 1) % len(steps)
        return steps[position]()

    return step


def random_inputs(device, workload, seed):
    """Standard normal, never zeros: with those the device needs less power and clocks higher."""
    import torch

    generator = torch.Generator(device=device.kind).manual_seed(seed)
    rows = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    keys = (workload.batch, workload.seqlen_k, workload.num_kv_heads, workload.head_dim)
    dtype = getattr(torch, workload.dtype)
    return {
        name: torch.randn(shape, generator=generator, device=device.kind, dtype=dtype)
        for name, shape in {"query": rows, "key": keys, "value": keys, "d_out": rows}.items()
    }


def check(device, peer, workload, mode) -> float:
    """The largest error at an example of the workload, against the float64 reference, relative to the largest value.

    Raises:
        AssertionError: it is more than the dtype explains: what is fast but wrong is not measured.
    """
    import torch

    small = example(workload)
    # Rounded first: the reference sees what the peer sees.
    dtype = getattr(torch, workload.dtype)
    arrays = make_inputs(dataclasses.replace(small, dtype="float32"), seed=1)
    inputs = {name: torch.from_numpy(x).to(device.kind, dtype) for name, x in arrays.items()}
    rounded = {name: x.double().cpu().numpy() for name, x in inputs.items()}
    actual = peer.prepare(device, small, mode, inputs)()
    device.synchronize()
    expected = _reference(small, mode, rounded)
    assert len(actual) == len(expected), f"{len(actual)} outputs, expected {len(expected)}"
    error, tolerance = 0.0, _TOLERANCE[workload.dtype]
    for got, want in zip(actual, expected, strict=True):
        assert tuple(got.shape) == want.shape, f"shape {tuple(got.shape)}, expected {want.shape}"
        difference = np.abs(got.detach().double().cpu().numpy() - want).max()
        error = max(error, float(difference / np.abs(want).max()))
    assert error <= tolerance, f"error {error:.2g} exceeds {tolerance:.2g}"
    return error


def _reference(workload, mode, inputs):
    from attn_ops import reference

    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    if mode == FORWARD:
        return [reference.attention(q, k, v, is_causal=workload.is_causal)[0]]
    return reference.attention_gradients(q, k, v, d_out=inputs["d_out"], is_causal=workload.is_causal)[:3]


def _row(workload, mode, peer, sample, rates, rounds, error) -> Row:
    limit = "copy" if workload.is_decode else "matmul"
    best = sample.minimum("wall")
    work = workload.key_value_bytes() if workload.is_decode else flops(workload, mode)
    return Row(
        workload=workload.name,
        mode=mode,
        threads=1,
        peer=peer.name,
        shape=workload.shape,
        options=workload.options,
        version=peer.version(),
        rounds=rounds,
        wall_median=sample.median("wall"),
        wall_min=best,
        gflops_per_second=flops(workload, mode) / sample.median("wall") / 1e9,
        limit=limit,
        limit_per_second=rates[limit],
        percent_of_limit=100 * work / sample.median("wall") / rates[limit],
        error=error,
    )
