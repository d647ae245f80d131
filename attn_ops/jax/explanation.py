"""What a call would run, and why: asked without computing anything."""

from __future__ import annotations

import jax

from attn_ops.call import explanation, public
from attn_ops.call.explanation import Explanation
from attn_ops.call.normalize import mask_notes, normalize
from attn_ops.jax import call as calls
from attn_ops.jax import choice, forms, xp


@public.function(implementation=None)
def explain(query, key=None, value=None, **given) -> Explanation:
    """What `scaled_dot_product_attention` would run for these arguments on the default device, and why; or what a whole
    model runs.

    Takes its arguments and raises the same errors; arrays may be `jax.ShapeDtypeStruct` as well, also the table of a
    `T5RelativeBias`. Nothing is computed.

    Of one Keras layer or model alone (with JAX as Keras's backend) it tells what each attention layer in it runs, as
    `attn_ops.explain` does.
    """
    if explanation.asks_of_model(query, key, value, given):
        from attn_ops.models.explanation import of_model  # which imports Keras

        return of_model(query, places)
    name, implementation = "explain", given.pop("implementation", None)
    arguments = {"query": query, "key": key, "value": value, **given}
    specifications = {k: x for k, x in arguments.items() if _is_specification(x)}
    device = jax.config.jax_default_device or jax.default_backend()
    platform = getattr(device, "platform", device)
    reasons = []

    def look(arrays):
        call = normalize(xp, name, **{**arguments, **arrays})
        missing = forms.unavailable_reason()
        if missing is None and platform != "cpu":
            missing = forms.cuda_reason(*calls.split(call))
            missing = missing and f"the default device is of the platform {platform}, and {missing}"
        reasons.extend([] if missing is None else [missing])
        return call.query

    jax.eval_shape(look, specifications)
    explanation.check_name(name, implementation, choice.IMPLEMENTATIONS)
    if implementation == "fused":
        explanation.check_can_run(name, implementation, reasons)
    notes = mask_notes(given.get("mask"))
    chosen = implementation or ("composite" if reasons else "fused")
    if chosen != "fused":
        return Explanation(chosen, tuple(reasons), notes=notes)
    return Explanation(chosen, tuple(reasons), "xla", "cpu" if platform == "cpu" else "gpu", notes)


def places(dtype, implementation) -> tuple[Explanation, ...]:
    """What `explain` answers to an attention of a model in this dtype, four times: JAX compiles all calls by XLA; and what
    an export of Keras's gets."""
    x = jax.ShapeDtypeStruct((2, 8, 2, 8), dtype)
    found = explain(x, x, x, implementation=None if implementation == "fused" else implementation)
    exported = found if implementation == "fused" else explain(x, x, x, implementation="composite")
    return (found,) * 4 + (exported,)


def _is_specification(x):
    leaves = jax.tree.leaves(x)
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
