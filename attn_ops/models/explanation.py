"""What each attention layer of a model runs, and why: `attn_ops.explain(model)`."""

from __future__ import annotations

import dataclasses
import functools

import keras

from attn_ops.layers.base import FlashAttention
from attn_ops.models import found, seams

_HEADS = ("num_heads", "num_query_heads", "num_attention_heads", "_num_heads")
_CONVERT = "attn_ops.convert(model)"
_REGISTER = "attn_ops.models.register(cls, adapter)"
_RUNS = ("eager", "graph", "xla", "training")
_PLACES = (*_RUNS, "export")


@dataclasses.dataclass(frozen=True)
class LayerExplanation:
    """One row: what a layer runs.

    Attributes:
        layer: the path of names in the model.
        cls: the name of its class.
        heads: how many query heads it has, None where it does not tell.
        eager, graph, xla, training: "fused", "composite" (TensorFlow's operations in ours) or "keras" (its own code), in eager
            calls, in `tf.function`, in functions with `jit_compile=True`, and in a training step.
        export: the same of what `model.export` writes, which is to load everywhere: `attn_ops.export` can keep "fused".
        reason: why it does not run "fused" everywhere, or None.
        remedy: what to do about that, or None.
    """

    layer: str
    cls: str
    heads: int | None
    eager: str
    graph: str
    xla: str
    training: str
    export: str
    reason: str | None = None
    remedy: str | None = None

    @property
    def fused(self) -> bool:
        """Whether it runs fused everywhere, exports left aside."""
        return all(getattr(self, place) == "fused" for place in _RUNS)


@dataclasses.dataclass(frozen=True)
class ModelExplanation:
    """The attention layers of a model in the order of its layers, a table when printed."""

    model: str
    layers: tuple[LayerExplanation, ...]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self):
        count = sum(layer.fused for layer in self.layers)
        lines = [f"{self.model}: {count} of {len(self.layers)} attention layers run fused"]
        if not self.layers:
            return lines[0]
        head = ["layer", "class", "heads", *_PLACES]
        rows = [[str(getattr(x, {"class": "cls"}.get(name, name)) or "?") for name in head] for x in self.layers]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
        reasons: dict = {}
        for x in self.layers:
            if x.reason:
                reasons.setdefault((x.reason, x.remedy), []).append(x.layer)
        for (reason, remedy), names in reasons.items():
            which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            lines.append(f"{which}: {reason}" + (f"; remedy: {remedy}" if remedy else ""))
        return "\n".join(lines)


def of_model(model, places) -> ModelExplanation:
    """What the attention layers in this Keras layer or model run: ``places`` tells for a dtype and an implementation (or
    None) what `explain` of Keras's backend answers in eager calls, graphs, XLA, training and exports."""
    rows = []
    layers = found.layers("explain", model)
    paths = found.paths(model)
    places = functools.cache(places)  # for this answer: the next one may stand elsewhere
    for layer in layers:
        state = found.state(layer)
        if state is not None and state.attends:
            rows.append(_row(paths.get(id(layer), layer.name), layer, state, places))
    return ModelExplanation(model.name, tuple(rows))


def _row(path, layer, state, places):
    heads = next((getattr(layer, name) for name in _HEADS if isinstance(getattr(layer, name, None), int)), None)
    row = functools.partial(LayerExplanation, path, type(layer).__name__, heads)
    reason, remedy = _why_keras(layer, state)
    if reason is not None:
        return row(*["keras"] * len(_PLACES), reason, remedy)
    implementation = layer.implementation if isinstance(layer, FlashAttention) else None
    answers = places(keras.backend.standardize_dtype(layer.compute_dtype), implementation)
    names = [answer.implementation for answer in answers]
    reasons = dict.fromkeys(reason for answer in answers[: len(_RUNS)] for reason in answer.reasons)
    if implementation == "composite":
        return row(*names, "flash_attention=False", "make the layer with flash_attention=None")
    return row(*names, "; ".join(reasons) or None)


def _why_keras(layer, state):
    """Why this layer runs its own code, and what to do about it; None twice where it runs ours."""
    if isinstance(layer, FlashAttention):
        return None, None
    if state.reason is not None:
        return state.reason, None if isinstance(layer, keras.layers.AdditiveAttention) else _REGISTER
    if seams.in_effect(layer):
        return None, None
    return "its own code", _CONVERT
