"""The kernels inside a function that XLA compiles, also where the data decide sizes: custom_call.py with all the room."""

from __future__ import annotations

from attn_ops.call import pages
from attn_ops.call.attention_call import AttentionCall
from attn_ops.generation import int8
from attn_ops.tensorflow import dynamic_sizes, gpu, place, xp
from attn_ops.tensorflow.forms import custom_call


def unavailable_reason(call: AttentionCall) -> str | None:
    """Why functions compiled by XLA cannot call the kernels, where the library is there; None when they can."""
    if dynamic_sizes.any_unknown(call) and not place.with_static_size():
        return "the batch or a length is unknown, and this TensorFlow does not tell how much room there is for it"
    return custom_call.unavailable_reason()


def forward(call: AttentionCall, **more):
    """(out, lse, statistics), without a gradient of their own; lse is None unless ``call.return_lse``. ``more`` are
    attributes."""
    if not dynamic_sizes.any_unknown(call):
        call = gpu.with_table(call)
        return custom_call.forward(call, gpu.workspace_bytes(call, backward=False), **more)
    room = dynamic_sizes.Room(call if call.block_table is None else pages.gathered(xp, int8.dequantized(xp, call)))
    out, lse, statistics = custom_call.forward(room.call, gpu.workspace_bytes(room.call, backward=False), **more)
    return room.cut_out(out), None if lse is None else room.cut_lse(lse), room.cut_lse(statistics)


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """The gradients of those inputs of ``call`` that are `asked` for; ``d_lse`` may be None."""
    if not dynamic_sizes.any_unknown(call):
        return custom_call.backward(call, out, statistics, d_out, d_lse, gpu.workspace_bytes(call, backward=True))
    room = dynamic_sizes.Room(call)
    d_lse = None if d_lse is None else room.like_lse(d_lse)
    made = room.like_out(out), room.like_lse(statistics), room.like_out(d_out)
    gradients = custom_call.backward(room.call, *made, d_lse, gpu.workspace_bytes(room.call, backward=True))
    inputs = call.differentiable()
    return [dynamic_sizes.cut_like(d, inputs[at]) for d, at in zip(gradients, call.asked())]
