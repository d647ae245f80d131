"""What is said about the choice of an implementation, in any framework."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether something can run; ``reasons`` tells why not, one sentence each. True in a condition when it can."""

    ok: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self):
        return self.ok


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The ``implementation`` a call gets ("fused", "composite", "reference") and the ``reasons`` against the fused one.

    ``form`` tells how the fused kernels are called: "op" (TensorFlow's operator), "xla" (a custom call inside XLA), "op or
    xla" (a graph that holds both, for whoever runs it to take the one it can) or, where XLA takes no custom call, "op
    or composite"; None for others. ``device`` tells whose kernels those are: "cpu" or "gpu". ``notes`` tell what this
    TensorFlow lacks of what the package builds on, and what happens without it; and what a mask with structure is, above
    all what a function was recognised to be.
    """

    implementation: str
    reasons: tuple[str, ...] = ()
    form: str | None = None
    device: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self):
        form = f"{self.form} on the GPU" if self.device == "gpu" else self.form
        lines = [f"implementation: {self.implementation}" + (f" ({form})" if form else "")]
        if self.reasons:
            lines += ["not fused, because:", *(f"  - {reason}" for reason in self.reasons)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def asks_of_model(query, key, value, given) -> bool:
    """Whether `explain` is asked of a Keras layer or model, which stands alone in the place of the query."""
    if key is None and value is None and not given and hasattr(query, "_flatten_layers"):
        return True
    if key is None or value is None:
        raise TypeError("explain: takes query, key and value, or a Keras layer or model alone")
    return False


_DEVICE = "; the device is that of the tensors, or of tf.device or jax.default_device around the call"
_HINTS = {
    **dict.fromkeys(("cpu", "gpu", "cuda", "tpu"), _DEVICE),
    **dict.fromkeys(("flash", "flash_attention", "cudnn", "efficient"), "; the kernels that keep no scores are 'fused'"),
    **dict.fromkeys(("xla", "math", "plain"), "; the framework's own operations are 'composite'"),
}


def check_name(name: str, implementation: str | None, known: tuple[str, ...]) -> None:
    """ValueError unless ``implementation`` is None or one of the ``known`` ones."""
    if implementation is not None and implementation not in known:
        hint = _HINTS.get(implementation, "") if isinstance(implementation, str) else ""
        raise ValueError(
            f"{name}: implementation must be None or one of {', '.join(map(repr, known))}, got {implementation!r}{hint}"
        )


def check_can_run(name: str, implementation: str, reasons) -> None:
    """ValueError for an ``implementation`` that was asked for and cannot run, with all the ``reasons``."""
    if reasons:
        raise ValueError(f"{name}: implementation {implementation!r} cannot run: " + "; ".join(reasons))
