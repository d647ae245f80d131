"""What a tensor of a graph holds where constants alone decide it, found while the graph is made."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

_MOST_OPS = 64  # a mask made of constants takes a few


def known_value(x):
    """The values of the tensor ``x`` as a NumPy array, or None where only the running graph knows them.

    More than `tf.get_static_value`, which looks through few operations: in a traced function even
    ``tf.where(tf.constant(visible), 0.0, -1e9)`` is not known to that.
    """
    with np.errstate(over="ignore"):  # of numbers that a cast makes infinite
        value = tf.get_static_value(x)
    if value is not None or not hasattr(x, "graph"):
        return value
    nodes = _constant_nodes(x.op)
    if nodes is None:
        return None
    with tf.init_scope():
        if not tf.executing_eagerly():
            return None
        graph_def = tf.compat.v1.GraphDef(node=nodes, versions=x.graph.graph_def_versions)
        try:
            computed = tf.compat.v1.wrap_function(
                lambda: tf.graph_util.import_graph_def(graph_def, return_elements=[x.name]), []
            )()
        except (tf.errors.OpError, ValueError):  # an operation that cannot be run by itself
            return None
        return computed[0].numpy()


def _constant_nodes(op):
    """The nodes of a graph that computes the outputs of ``op`` from nothing; None where it depends on more."""
    nodes, todo = {}, [op]
    while todo:
        op = todo.pop()
        if op.name in nodes:
            continue
        value = tf.get_static_value(op.outputs[0]) if len(op.outputs) == 1 else None
        if value is not None:
            nodes[op.name] = _constant_node(op, value)
            continue
        inputs = [x.op for x in op.inputs]
        if not inputs or len(nodes) == _MOST_OPS or not _is_function_of_inputs(op):
            return None
        nodes[op.name] = _bare_node(op)
        todo += inputs
    return list(nodes.values())


def _is_function_of_inputs(op):
    return not (op.op_def.is_stateful or op.control_inputs or any(a.type == "func" for a in op.op_def.attr))


def _constant_node(op, value):
    node = tf.compat.v1.NodeDef(name=op.name, op="Const")
    node.attr["dtype"].type = op.outputs[0].dtype.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, op.outputs[0].dtype))
    return node


def _bare_node(op):
    """The node without what ties it to its graph: its device, and attributes for TensorFlow's own use."""
    node = tf.compat.v1.NodeDef()
    node.CopyFrom(op.node_def)
    node.device = ""
    for name in [name for name in node.attr if name.startswith("_")]:
        del node.attr[name]
    return node
