"""The kernels inside a function that XLA compiles: forward and backward as custom calls, in the form of eager.py; and rows
written into caches.

`XlaCallModule` carries a program in StableHLO whose one operation of substance is a custom call of XLA's foreign
function interface; csrc/bindings/xla.cc has the handlers. Every extent is unknown in the program: XLA fills them in
when it compiles, so one text serves all shapes.
"""

from __future__ import annotations

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call.attention_call import AttentionCall, attributes, canonical, given_inputs
from attn_ops.tensorflow import place

_TYPES = {
    tf.float32: "f32",
    tf.float64: "f64",
    tf.float16: "f16",
    tf.bfloat16: "bf16",
    tf.bool: "i1",
    tf.int8: "i8",
    tf.int32: "i32",
    tf.int64: "i64",
    tf.uint8: "ui8",
}
_VERSION = 9  # of XlaCallModule: TensorFlow 2.18 knows no later one
_PLATFORMS = ("CPU", "CUDA")  # more than one: the function is not bound to the device it was traced for


def unavailable_reason() -> str | None:
    """Why functions compiled by XLA cannot call the kernels, where the library is there; None when they can."""
    return kernels.xla_unavailable_reason() or place.xla_call_missing_reason()


def forward(call: AttentionCall, workspace: int | None, **more):
    """(out, lse, statistics), without a gradient of their own; lse is None unless ``call.return_lse``. ``more`` are
    attributes, for ``workspace`` see `_custom_call`."""
    query, key, value = range(3)
    _, heads, rows, _ = canonical(range(4), call.layout)
    out_shape, lse_shape = call.result_shapes()
    row = [(query, 0), (query, heads), (query, rows)]
    results = [
        ([(query, 0), (query, 1), (query, 2), (value, 3)], call.query.dtype, out_shape),
        ([*row, 2], call.lse_dtype, [*lse_shape, 2]),
        *([(row, call.lse_dtype, lse_shape)] if call.return_lse else []),
    ]
    out, statistics, *lse = _custom_call(
        "attn_ops.forward",
        [call.query, call.key, call.value],
        call,
        {"num_lse": int(call.return_lse), **more},
        *map(list, zip(*results)),
        workspace=workspace,
    )
    return out, lse[0] if lse else None, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse, workspace: int | None):
    """The gradients of those inputs of ``call`` that are `asked` for; ``d_lse`` may be None."""
    operands = [call.query, call.key, call.value, out, statistics, d_out, *([] if d_lse is None else [d_lse])]
    inputs = call.differentiable()
    wanted = [inputs[at] for at in call.asked()]
    optional = [x for given in given_inputs(call).values() for x in given]
    places = [0, 1, 2]
    for x in wanted[3:]:
        places.append(len(operands) + next(at for at, other in enumerate(optional) if other is x))
    return _custom_call(
        "attn_ops.backward",
        operands,
        call,
        {"num_d_lse": int(d_lse is not None), "d_bias": call.bias is not None and not call.constant_bias},
        results=[[(operand, axis) for axis in range(x.shape.rank)] for operand, x in zip(places, wanted)],
        dtypes=[x.dtype for x in wanted],
        shapes=[x.shape for x in wanted],
        workspace=workspace,
    )


def append(cache, rows, page, row, axis: int):
    """``cache`` with ``rows[b, …, i, …]`` at ``[page[b, i], …, row[b, i], …]``, the rows in ``axis``, in its memory where XLA
    needs that no more. On CPUs alone."""
    results = [[(0, i) for i in range(cache.shape.rank)]]
    operands, config = [cache, rows, page, row], {"axis": axis}
    return _made("attn_ops.append", operands, results, [cache.dtype], [cache.shape], config, 1, in_place=True)[0]


def _custom_call(target, operands, call, own, results, dtypes, shapes, workspace):
    """Runs the custom call ``target`` on ``operands`` and the optional inputs of ``call``, with attributes of its ``own``
    beside those of the call; see `_program`. With one result more where there is a ``workspace``, of that many bytes for the
    kernels of a GPU: what asks XLA for memory while it runs cannot be put into a CUDA graph."""
    wanted = len(results)
    if workspace is not None:
        target += ".lent"
        results, dtypes, shapes = [*results, [workspace]], [*dtypes, tf.uint8], [*shapes, [workspace]]
    optional = given_inputs(call)
    counts = {name: len(given) for name, given in optional.items()}
    operands = operands + [x for given in optional.values() for x in given]
    config = {**attributes(call), **counts, **own}
    return _made(target, operands, results, dtypes, shapes, config, wanted)


def _made(target, operands, results, dtypes, shapes, config, wanted, **more):
    """The first ``wanted`` results of the program of a custom call; see `_program`."""
    made = place.xla_call()(
        operands,
        version=_VERSION,
        module=_program(target, operands, results, dtypes, config, **more),
        Tout=dtypes,
        Sout=shapes,
        platforms=_PLATFORMS,
    )
    return place.opaque_to_xla(made[:wanted])


def _program(target, operands, results, dtypes, config, in_place=False):
    """The StableHLO of one custom call.

    Args:
        target: Its name.
        operands: Tensors, of which dtypes and ranks count.
        results: For each result, and each of its axes, its extent, or which (operand, axis) has it.
        dtypes: Of the results.
        config: Attributes by name: strings, integers and booleans.
        in_place: Whether the only result is the first operand, written over.
    """
    inputs = [_type(x.shape.rank, x.dtype) for x in operands]
    outputs = [_type(len(extents), dtype) for extents, dtype in zip(results, dtypes)]
    # Unknown extents of results are computed from those of operands, and handed over as further operands.
    body = []
    sources = {source for extents in results for source in extents}
    for extent in sorted(source for source in sources if isinstance(source, int)):
        body.append(f"{_extent(extent)} = stablehlo.constant dense<{extent}> : tensor<1xi32>")
    for operand, axis in sorted(source for source in sources if not isinstance(source, int)):
        body += [
            f"%size{operand}_{axis} = stablehlo.get_dimension_size %in{operand}, dim = {axis}"
            f" : ({inputs[operand]}) -> tensor<i32>",
            f"{_extent((operand, axis))} = stablehlo.reshape %size{operand}_{axis} : (tensor<i32>) -> tensor<1xi32>",
        ]
    for i, extents in enumerate(results):
        parts = ", ".join(map(_extent, extents))
        types = ", ".join(["tensor<1xi32>"] * len(extents))
        body.append(f"%shape{i} = stablehlo.concatenate {parts}, dim = 0 : ({types}) -> tensor<{len(extents)}xi32>")
    names = [f"%in{i}" for i in range(len(inputs))]
    shape_names = [f"%shape{i}" for i in range(len(outputs))]
    shape_types = [f"tensor<{len(extents)}xi32>" for extents in results]
    # Row-major layouts: XLA may choose others for what is not said.
    operand_layouts = [_layout(x.shape.rank) for x in operands] + [_layout(1)] * len(outputs)
    config = ", ".join(f"{name} = {_attribute(value)}" for name, value in sorted(config.items()))
    first_shape = len(names)
    alias = "output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []"
    aliases = f" output_operand_aliases = [#stablehlo.output_operand_alias<{alias}>]," if in_place else ""
    body.append(
        f'%out:{len(outputs)} = stablehlo.custom_call @"{target}"({", ".join(names + shape_names)})'
        f" {{api_version = 4 : i32, backend_config = {{{config}}},{aliases} operand_layouts = [{', '.join(operand_layouts)}],"
        f" result_layouts = [{', '.join(_layout(len(extents)) for extents in results)}], indices_of_shape_operands ="
        f" dense<[{', '.join(str(first_shape + i) for i in range(len(outputs)))}]> : tensor<{len(outputs)}xi64>}}"
        f" : ({', '.join(inputs + shape_types)}) -> ({', '.join(outputs)})"
    )
    body.append(f"return {', '.join(f'%out#{i}' for i in range(len(outputs)))} : {', '.join(outputs)}")
    parameters = ["%platform_index: tensor<i32>", *(f"{name}: {type_}" for name, type_ in zip(names, inputs))]
    return "\n".join(
        [
            "module @attn_ops attributes {jax.uses_shape_polymorphism = true} {",
            f"func.func public @main({', '.join(parameters)}) -> ({', '.join(outputs)}) {{",
            *body,
            "}",
            "}",
        ]
    )


def _extent(source):
    """The name of a known extent, or of that of an axis of an operand."""
    return f"%known{source}" if isinstance(source, int) else "%extent{}_{}".format(*source)


def _type(rank, dtype):
    return f"tensor<{'?x' * rank}{_TYPES[dtype]}>"


def _layout(rank):
    return f"dense<[{', '.join(map(str, reversed(range(rank))))}]> : tensor<{rank}xindex>"


def _attribute(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else f"{value} : i64"
