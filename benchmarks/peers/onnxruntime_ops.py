"""ONNX Runtime's three attention operators, forward only, each as a model of one node."""

from __future__ import annotations

import numpy as np

from workloads import BIAS, BOOLEAN, FORWARD, PADDING, SEGMENTS, dense_mask

from .base import Peer, threads


def _session(node, inputs: dict[str, np.ndarray], outputs: list[str], contrib: bool):
    import onnx
    import onnxruntime

    types = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "int32": onnx.TensorProto.INT32,
        "bool": onnx.TensorProto.BOOL,
    }
    result = types[inputs["query"].dtype.name]
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(name, types[x.dtype.name], x.shape) for name, x in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, result, None) for name in outputs],
    )
    opsets = [onnx.helper.make_opsetid("", 23)]
    if contrib:
        opsets.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    # Its threads spin while a call runs, as they do by default, but not on into the next peer's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _packed(x: np.ndarray) -> np.ndarray:
    """[batch, seqlen, heads, head_dim] as [batch, seqlen, heads * head_dim], without a copy."""
    return x.reshape(*x.shape[:2], -1)


class MultiHeadAttention(Peer):
    """com.microsoft.MultiHeadAttention on [batch, seqlen, hidden]: a flash kernel where nothing is masked."""

    name = "ort_mha"
    modules = ("onnxruntime", "onnx")

    def supports(self, workload, mode):
        return mode == FORWARD and workload.num_heads == workload.num_kv_heads

    def prepare(self, workload, mode, inputs):
        import onnx

        feeds = {name: _packed(inputs[name]) for name in ("query", "key", "value")}
        node = onnx.helper.make_node(
            "MultiHeadAttention",
            list(feeds),
            ["out"],
            domain="com.microsoft",
            num_heads=workload.num_heads,
            unidirectional=int(workload.is_causal),
        )
        session = _session(node, feeds, ["out"], contrib=True)
        return lambda: session.run(["out"], feeds)

    def outputs(self, workload, mode, result):
        return [result[0].reshape(*result[0].shape[:2], workload.num_heads, workload.head_dim)]


class Attention(Peer):
    """The ONNX standard's Attention (opset 23) on [batch, heads, seqlen, head_dim]."""

    name = "ort_attention"
    modules = ("onnxruntime", "onnx")
    dtypes = ("float32", "float16")
    masks = (PADDING, SEGMENTS, BOOLEAN, BIAS)
    windows = True

    def supports(self, workload, mode):
        return mode == FORWARD

    def prepare(self, workload, mode, inputs):
        import onnx

        feeds = {name: np.ascontiguousarray(inputs[name].transpose(0, 2, 1, 3)) for name in ("query", "key", "value")}
        mask = inputs["bias"] if workload.mask == BIAS else dense_mask(workload, inputs)
        if mask is not None:
            rows_and_keys = (workload.seqlen_q, workload.seqlen_k)
            feeds["mask"] = np.broadcast_to(mask, (*mask.shape[:2], *rows_and_keys)).copy()
        node = onnx.helper.make_node("Attention", list(feeds), ["out"], is_causal=int(workload.is_causal))
        session = _session(node, feeds, ["out"], contrib=False)
        return lambda: session.run(["out"], feeds)

    def outputs(self, workload, mode, result):
        return [result[0].transpose(0, 2, 1, 3)]


class GroupQueryAttention(Peer):
    """com.microsoft.GroupQueryAttention: causal, with a key/value cache that it appends to in place.

    A decode step appends the last key and value; a prefill fills an empty cache. Both write the cache, which is
    part of what the operator does.
    """

    name = "ort_gqa"
    modules = ("onnxruntime", "onnx")

    def supports(self, workload, mode):
        return mode == FORWARD and (workload.is_causal or workload.is_decode)

    def prepare(self, workload, mode, inputs):
        import onnx
        import onnxruntime

        new = workload.seqlen_q  # rows that are new; those before them are in the cache
        cache = {f"past_{name}": np.ascontiguousarray(inputs[name].transpose(0, 2, 1, 3)) for name in ("key", "value")}
        feeds = {"query": _packed(inputs["query"])}
        feeds |= {name: np.ascontiguousarray(_packed(inputs[name][:, -new:])) for name in ("key", "value")}
        feeds |= cache
        feeds["seqlens_k"] = np.full(workload.batch, workload.seqlen_k - 1, np.int32)
        feeds["total_sequence_length"] = np.array(workload.seqlen_k, np.int32)
        outputs = ["out", "present_key", "present_value"]
        node = onnx.helper.make_node(
            "GroupQueryAttention",
            list(feeds),
            outputs,
            domain="com.microsoft",
            num_heads=workload.num_heads,
            kv_num_heads=workload.num_kv_heads,
        )
        session = _session(node, feeds, outputs, contrib=True)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
        out = onnxruntime.OrtValue.ortvalue_from_shape_and_type(feeds["query"].shape, np.float32)
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("out", out)
        for name in ("key", "value"):  # the same memory in and out: no copy of the cache
            binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])

        def step():
            session.run_with_iobinding(binding)
            return out

        return step

    def outputs(self, workload, mode, result):
        x = result.numpy()
        return [x.reshape(*x.shape[:2], workload.num_heads, workload.head_dim)]


def peers():
    yield MultiHeadAttention()
    yield Attention()
    yield GroupQueryAttention()
