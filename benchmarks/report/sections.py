"""The sections of the report: what is measured for each, and what is compared in the same rounds."""

from __future__ import annotations

from runner import Entry, Group
from workloads import BIAS, BOOLEAN, FORWARD, FORWARD_BACKWARD, PADDING, SEGMENTS, WORKLOADS

OURS = "attn_ops"
EAGER = "attn_ops_eager"  # for work of less than a millisecond: calling any graph costs 0.15 ms, more than the kernel
RIVALS = ("torch_sdpa", "ort_mha", "ort_attention", "ort_gqa", "openvino_sdpa")  # those without Keras or XLA
_FORWARD = (OURS, *RIVALS, "jax", "keras_graph", "keras_xla")
_TRAINING = (OURS, "torch_sdpa", "tf_xla", "jax", "keras_graph", "keras_xla")
_MASKED = (OURS, "torch_sdpa", "ort_attention", "openvino_sdpa", "jax")
_KERNEL_SCALING = ("attn_ops_core", "attn_ops_core_1_thread")
_KERNEL_CROWDED = ("attn_ops_core_1_thread", "attn_ops_core_16_threads")

# Workloads by the part they play; the targets are about these.
FULL = ("bert_base_512", "long_2048", "wide_heads_2048")
CAUSAL_512 = ("bert_base_512_causal",)
CAUSAL_2048 = ("long_2048_causal", "wide_heads_2048_causal")
SHORT = ("small_128", "bert_base_128")
SHORT_CAUSAL = ("small_128_causal", "bert_base_128_causal")
TRAINING = ("bert_base_512", "long_2048", "wide_heads_2048")
TRAINING_CAUSAL = ("bert_base_512_causal", "long_2048_causal", "wide_heads_2048_causal")
TRAINING_SHORT = ("bert_base_128",)
DECODE_BATCH_1 = ("llama8b_decode_1k", "llama8b_decode_8k", "llama8b_decode_32k")
DECODE_BATCH_8 = ("llama8b_decode_1k_batch8", "llama8b_decode_4k_batch8")
DECODE = DECODE_BATCH_1 + DECODE_BATCH_8
DECODE_WITH_KERAS = ("llama8b_decode_1k", "llama8b_decode_8k")  # seconds a step: the others would take all the time
HALF_BASE, HALF = "bert_base_512_float32", ("bert_base_512_float16", "bert_base_512_bfloat16")
BF16 = {"bert_base_512_bfloat16": "bert_base_512_float32", "long_2048_bfloat16": "long_2048_float32"}  # and their bases
FLOAT64 = "bert_base_512_float64"
MASKS_BASE = "long_2048_unmasked"
MASKS = tuple(f"long_2048_{mask}" for mask in (PADDING, "window", SEGMENTS))
BIAS_BASE = "length_1024_unmasked"
BIASES = tuple(f"length_1024_{mask}" for mask in (BIAS, BOOLEAN))
SCALING = ("one_head_2048", "bert_base_512", "long_2048_causal")
LENGTHS = ("length_128", "length_512", "length_1024", "long_2048", "length_4096")
TINY = ("tiny_16", "tiny_64")
OVERHEAD = "one_token"
MEMORY = "long_16384"
MEMORY_LENGTHS = ("length_512", "long_2048", "length_4096")
MEMORY_PEERS = (OURS, "torch_sdpa", "jax", "keras_graph")

TITLES = {
    "forward": "forward",
    "short": "forward, 128 tokens",
    "training": "forward + backward",
    "decode": "decode: 1 query, 32/8 heads",
    "half": "float16, bfloat16",
    "bf16": "bfloat16 against float32, N >= 512",
    "float64": "float64",
    "masks": "padding, window, segments",
    "bias": "additive bias, boolean mask",
    "threads": "threads",
    "threads16": "16 threads, whatever the CPUs",
    "tiny": "16 and 64 tokens",
    "memory": "memory",
    "overhead": "TensorFlow overhead",
    "lengths": "time against length (charts)",
}


def groups(section: str, threads: int, most_threads: int, names: list[str] | None, quick: bool) -> list[Group]:
    """What a section measures with this many threads. `names` restricts the peers; ours are measured always, for all
    is compared with them."""

    def group(*entries):
        made = []
        for name, mode, peers in entries:
            workload = WORKLOADS[name].quick() if quick else WORKLOADS[name]
            made.append(Entry(workload, mode, tuple(p for p in peers if chosen(p, names))))
        return Group(section, tuple(made))

    if section == "forward":
        return [group((name, FORWARD, _FORWARD)) for name in FULL + CAUSAL_512 + CAUSAL_2048]
    if section == "short":
        return [group((name, FORWARD, (EAGER, *_FORWARD))) for name in SHORT + SHORT_CAUSAL]
    if section == "training":
        names_of_section = TRAINING + TRAINING_CAUSAL + TRAINING_SHORT
        return [group((name, FORWARD_BACKWARD, _TRAINING)) for name in names_of_section]
    if section == "decode":
        rivals = (EAGER, OURS, "ort_gqa", "ort_attention", "torch_sdpa")
        with_keras = (*rivals, "jax", "keras_graph")
        return [group((name, FORWARD, with_keras if name in DECODE_WITH_KERAS else rivals)) for name in DECODE]
    if section == "half":
        # Keras takes seconds a step here and is left out.
        return [group((HALF_BASE, FORWARD, (OURS,)), *((name, FORWARD, _MASKED) for name in HALF))]
    if section == "bf16":
        peers = {FORWARD: _MASKED, FORWARD_BACKWARD: (OURS, "torch_sdpa")}
        return [
            group((base, mode, (OURS,)), (name, mode, peers[mode])) for name, base in BF16.items() for mode in peers
        ]
    if section == "float64":
        return [group((FLOAT64, FORWARD, (OURS, "torch_sdpa", "keras_graph")))]
    if section == "masks":
        return [group((MASKS_BASE, FORWARD, (OURS,)), *((name, FORWARD, _MASKED) for name in MASKS))]
    if section == "bias":
        return [group((BIAS_BASE, FORWARD, (OURS,)), *((name, FORWARD, _MASKED) for name in BIASES))]
    if section == "threads":
        # One thread and all in the same process: with TensorFlow the two would be two processes at two times.
        modes = (FORWARD, FORWARD_BACKWARD)
        if threads < most_threads or threads == 1:
            return []
        return [group((name, mode, _KERNEL_SCALING)) for name in SCALING for mode in modes]
    if section == "threads16" and threads == most_threads:
        return [group((name, mode, _KERNEL_CROWDED)) for name in SCALING for mode in (FORWARD, FORWARD_BACKWARD)]
    if section == "tiny" and threads == most_threads:
        peers = dict.fromkeys((*_KERNEL_SCALING, *_KERNEL_CROWDED))
        return [group((name, mode, tuple(peers))) for name in TINY for mode in (FORWARD, FORWARD_BACKWARD)]
    if section == "lengths":
        peers = (OURS, "torch_sdpa", "ort_mha", "openvino_sdpa", "jax", "keras_graph")
        return [group((name, FORWARD, peers)) for name in LENGTHS if name not in FULL]
    if section == "overhead":
        return [group((OVERHEAD, FORWARD, ("attn_ops_eager", "attn_ops_core")))]
    return []  # memory has processes of its own: see memory_runs


def memory_runs(names: list[str] | None, quick: bool) -> list[tuple[str, str]]:
    """(workload, peer) of the fresh processes in which memory growth of forward + backward is measured."""
    lengths = MEMORY_LENGTHS[:1] if quick else MEMORY_LENGTHS
    runs = [(name, peer) for name in lengths for peer in MEMORY_PEERS if chosen(peer, names)]
    return [(MEMORY, OURS), *runs]


def chosen(peer: str, names: list[str] | None) -> bool:
    return names is None or peer in names or peer.startswith(OURS)
