"""What a machine without a GPU can tell about GPUs: who is chosen there, what is registered, and what is said when the
CUDA kernels are missing. Their numbers are tested elsewhere (tests/cuda_host, and on GPUs)."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels
from attn_ops.call import attention_call, precision
from attn_ops.tensorflow import gpu
from attn_ops.tensorflow.forms import custom_call, eager
from attn_ops.tensorflow.forms import graph as forms_graph
from cases import make_inputs
from children import run

PACKAGE = Path(kernels.__file__).parents[1]
CORE = Path(kernels.core().__file__)

# The C interface of the CUDA kernels without any: enough to be opened and asked.
STAND_IN = r"""
#include "cuda/library.h"
using namespace attn_ops;
extern "C" {
uint64_t attn_ops_cuda_abi() { return uint64_t{sizeof(AttentionParams)} << 32 | sizeof(BackwardParams) + VERSION; }
const char* attn_ops_cuda_unavailable_reason(int device) { return device == 0 ? "" : "there is no such device"; }
const char* attn_ops_cuda_unsupported_reason(const AttentionParams* p) { return p->head_dim > 256 ? "too wide" : ""; }
size_t attn_ops_cuda_forward_workspace_bytes(const AttentionParams*) { return 0; }
size_t attn_ops_cuda_backward_workspace_bytes(const BackwardParams*) { return 0; }
int attn_ops_cuda_forward(const AttentionParams*, void*, Workspace) { return -1; }
int attn_ops_cuda_backward(const BackwardParams*, void*, Workspace) { return -1; }
#ifdef COMPLETE
const char* attn_ops_cuda_error_text() { return "it is a stand-in"; }
#endif
}
"""


def tensors(**sizes):
    return [tf.constant(x) for x in make_inputs("float32", **sizes)[:3]]


@pytest.fixture
def pretended(monkeypatch):
    """One GPU that runs the kernels, as long as nobody runs anything."""
    state = SimpleNamespace(device_reason=None, library=True)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [SimpleNamespace(name="/physical_device:GPU:0")])
    monkeypatch.setattr(gpu, "_ordinals", gpu._ordinals.__wrapped__)  # not from the cache, nor into it
    monkeypatch.setattr(kernels, "cuda_library_exists", lambda: state.library)
    monkeypatch.setattr(kernels, "cuda_unavailable_reason", lambda device: state.device_reason)

    def unsupported(dtype, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim):
        state.sizes = batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim
        return "float64 is not for it" if dtype == "float64" else "it is too wide" if head_dim > 256 else None

    monkeypatch.setattr(kernels, "cuda_unsupported_reason", unsupported)
    monkeypatch.setattr(kernels, "cuda_workspace_bytes", lambda backward, *given, **more: 1000 + backward)
    return state


def explain_in(form, *arguments, device=None, **options):
    explanations = []

    def function():
        with tf.device(device):
            explanations.append(attn_ops.explain(*arguments, **options))

    if form == "eager":
        function()
        return explanations[0]
    function = tf.function(function, jit_compile=form == "xla")

    function.get_concrete_function()  # traces, and runs nothing
    return explanations[0]


@pytest.mark.parametrize("form, name", [("eager", "op"), ("graph", "op or xla"), ("xla", "xla")])
def test_a_gpu_with_kernels_takes_the_fused_op(pretended, form, name):
    explanation = explain_in(form, *tensors())
    assert (explanation.implementation, explanation.form, explanation.device) == ("fused", name, "gpu")
    assert str(explanation) == f"implementation: fused ({name} on the GPU)"


@pytest.mark.parametrize("form", ["eager", "graph", "xla"])
def test_a_gpu_without_kernels_takes_the_composite(pretended, form):
    pretended.device_reason = "it is hidden by a test"
    explanation = explain_in(form, *tensors())
    assert explanation.implementation == "composite" and explanation.device is None
    assert explanation.reasons == (
        "a GPU is in use, and it is hidden by a test; under tf.device('CPU') the fused op runs on the CPU",
    )
    explanation = explain_in(form, *tensors(), device="CPU:0")
    assert (explanation.implementation, explanation.device) == ("fused", "cpu")


def test_eager_calls_follow_the_op_or_else_their_inputs(pretended):
    """TensorFlow runs an op on the GPU when it has a kernel there, and where its inputs are when it has none."""
    pretended.device_reason = "it is hidden by a test"
    assert attn_ops.explain(*tensors()).implementation == "composite"
    double = [tf.cast(x, tf.float64) for x in tensors()]
    assert attn_ops.explain(*double).device == "cpu"
    pretended.library = False
    assert attn_ops.explain(*tensors()).device == "cpu"


def test_calls_that_the_gpu_does_not_take(pretended):
    spec = tf.TensorSpec([1, 8, 2, 300])
    assert "it is too wide" in attn_ops.explain(spec, spec, spec).reasons[0]
    spec = tf.TensorSpec([1, 8, 2, 64], tf.float64)
    assert "float64" in explain_in("graph", spec, spec, spec).reasons[0]
    with pytest.raises(ValueError, match="'fused' cannot run: a GPU is in use, and float64 is not for it"):
        explain_in("graph", spec, spec, spec, implementation="fused")


def test_unknown_dimensions(pretended):
    open_spec = tf.TensorSpec([None, None, 2, None])
    assert "head_dim and value_dim are not known" in attn_ops.explain(open_spec, open_spec, open_spec).reasons[0]
    assert attn_ops.explain(open_spec, open_spec, open_spec, implementation="fused").implementation == "fused"
    query, key = tf.TensorSpec([None, 4, None, 64]), tf.TensorSpec([None, 2, 9, 64])
    assert attn_ops.explain(query, key, key, layout="BHSD").implementation == "fused"
    assert pretended.sizes == (1, 1, 9, 4, 2, 64, 64)


def build_stand_in(directory, *definitions):
    source = directory / "stand_in.cc"
    source.write_text(STAND_IN)
    library = directory / "libattn_ops_cuda.so"
    includes = f"-I{PACKAGE.parent / 'csrc'}"
    flags = [f"-D{definition}" for definition in definitions]
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", includes, *flags, source, "-o", library], check=True)


def ask_core(directory, question):
    """What a copy of `_core` in ``directory`` answers, with the CUDA library that lies beside it."""
    shutil.copy(CORE, directory)
    code = f"import _core\ntry: print({question})\nexcept RuntimeError as e: print('RuntimeError:', e)"
    run = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_the_library_is_found_beside_ours(tmp_path):
    build_stand_in(tmp_path, "VERSION=0", "COMPLETE")
    assert ask_core(tmp_path, "_core.cuda_library_exists()") == "True"
    assert ask_core(tmp_path, "_core.cuda_unavailable_reason(0)") == ""
    assert ask_core(tmp_path, "_core.cuda_unavailable_reason(1)") == "there is no such device"
    for width, reason in ((256, ""), (257, "too wide")):
        assert ask_core(tmp_path, f"_core.cuda_unsupported_reason('float16', 1, 1, 1, 1, 1, {width}, 8)") == reason


@pytest.mark.parametrize(
    "definitions, reason",
    [
        (None, "does not exist: the package was built without the CUDA kernels"),
        (("VERSION=8", "COMPLETE"), "is of another version of attn_ops"),
        (("VERSION=0",), "has no attn_ops_cuda_error_text: it is of another build"),
    ],
)
def test_no_library_or_a_wrong_one(tmp_path, definitions, reason):
    if definitions is not None:
        build_stand_in(tmp_path, *definitions)
    answer = ask_core(tmp_path, "_core.cuda_unavailable_reason(0)")
    assert answer == f"{tmp_path}/libattn_ops_cuda.so {reason}"
    call = "_core.cuda_unsupported_reason('float32', 1, 1, 1, 1, 1, 8, 8)"
    assert ask_core(tmp_path, call) == f"RuntimeError: {answer}"


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "libattn_ops_cuda.so").write_text("text")
    answer = ask_core(tmp_path, "_core.cuda_unavailable_reason(0)")
    assert answer.startswith("the library of the CUDA kernels cannot be loaded: ") and str(tmp_path) in answer


@pytest.mark.parametrize("with_library", [True, False])
def test_the_operators_have_gpu_kernels_where_the_library_is(tmp_path, with_library):
    if with_library:
        build_stand_in(tmp_path, "VERSION=0", "COMPLETE")
    library = shutil.copy(PACKAGE / "libattn_ops.so", tmp_path)
    code = f"""
import tensorflow as tf
from tensorflow.python.framework import kernels
library = tf.load_op_library({str(library)!r})
for name in ("AttnOps>Forward", "AttnOps>Backward", "AttnOps>Decode"):
    found = kernels.get_registered_kernels_for_op(name).kernel
    types = lambda kernel: [tf.as_dtype(t).name for c in kernel.constraint for t in c.allowed_values.list.type]
    print(name, *sorted("/".join(types(k)) for k in found if k.device_type == "GPU"))
q = tf.random.normal([2, 5, 2, 8])
print(library.attn_ops_forward(q, q, q, *[[]] * 12)[0].shape)  # the CPU has its own still
"""
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]
    types, pairs = " bfloat16 float16 float32", (
        " bfloat16/bfloat16 float16/float16 float32/bfloat16 float32/float16 float32/float32"  # of queries and of keys
    )
    wanted = ("AttnOps>Forward", types), ("AttnOps>Backward", types), ("AttnOps>Decode", pairs)
    assert done.stdout.splitlines() == [*(name + x * with_library for name, x in wanted), "(2, 5, 2, 8)"]


def test_xla_has_custom_calls_for_both_platforms():
    assert kernels.xla_unavailable_reason() is None  # all of them were taken
    handlers = kernels.core().xla_handlers()
    names = {f"attn_ops.{name}{lent}" for name in ("forward", "backward") for lent in ("", ".lent")}
    assert {platform: set(found) for platform, found in handlers.items()} == {"Host": names | {"attn_ops.append"}, "CUDA": names}
    assert "CUDA" in custom_call._PLATFORMS


@pytest.fixture(params=[False, True])
def tf32(request):
    before = attn_ops.allow_tf32()
    attn_ops.set_allow_tf32(request.param)
    yield request.param
    attn_ops.set_allow_tf32(before)


def all_nodes(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    return [node for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes]


def test_a_table_of_pages_names_only_pages_on_a_gpu(pretended):
    """Nobody can look at its entries there: those that are no page name the nearest."""
    pages, query = tf.zeros([6, 16, 2, 8], "bfloat16"), tf.zeros([2, 1, 2, 8])
    table = tf.constant([[5, 9], [-3, 0]])
    call = attention_call.AttentionCall(query, pages, pages, block_table=table)
    assert gpu.unsupported_reasons(call, forced=False) == [] and pretended.sizes[2] == 32
    np.testing.assert_array_equal(gpu.with_table(call).block_table, [[5, 5], [0, 0]])
    with tf.device("CPU"):
        assert gpu.with_table(call) is call
    traced = tf.function(attn_ops.paged_attention, jit_compile=True)
    nodes = all_nodes(traced, query, pages, pages, table, tf.constant([17, 3]))
    [module] = [n.attr["module"].s.decode() for n in nodes if n.op == "XlaCallModule"]
    assert "attn_ops.forward.lent" in module


def test_where_a_gpu_is_used_the_workspace_is_a_result(pretended):
    """Of both directions, so that XLA may put the kernels into a CUDA graph; on a CPU nobody uses it. Unknown extents
    leave it to XLA's allocator."""
    compiled = tf.function(step, jit_compile=True)
    nodes = all_nodes(compiled, *tensors())
    modules = [n.attr["module"].s.decode() for n in nodes if n.op == "XlaCallModule"]
    assert [("forward.lent" in m, "backward.lent" in m) for m in modules] in ([(1, 0), (0, 1)], [(0, 1), (1, 0)])
    assert all("-> (tensor<?x?x?x?xf32>" in m and "tensor<?xui8>" in m for m in modules)
    with tf.device("CPU"):
        for found, wanted in zip(compiled(*tensors()), step(*tensors()), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    nodes = all_nodes(tf.function(step, jit_compile=True), *[tf.TensorSpec([None, 5, 2, 8])] * 3)
    modules = [n.attr["module"].s.decode() for n in nodes if n.op == "XlaCallModule"]
    assert len(modules) == 2 and not any(".lent" in m for m in modules)


def step(*inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(attn_ops.scaled_dot_product_attention(*inputs))
    return tape.gradient(loss, inputs)


def test_tf32_is_an_attribute_of_the_graph(tf32):
    nodes = all_nodes(tf.function(step), *tensors())
    for name in ("AttnOps>Forward", "AttnOps>Backward"):
        assert {n.attr["allow_tf32"].b for n in nodes if n.op == name} == {tf32}
    modules = [n.attr["module"].s.decode() for n in nodes if n.op == "XlaCallModule"]
    assert len(modules) == 2 and all(f"allow_tf32 = {str(tf32).lower()}" in module for module in modules)


def test_tf32_follows_the_forward_call_into_the_gradient(tf32):
    @tf.function
    def from_elsewhere(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(attn_ops.scaled_dot_product_attention(*inputs))
        attn_ops.set_allow_tf32(not tf32)
        return tape.gradient(loss, inputs)

    nodes = all_nodes(from_elsewhere, *tensors())
    assert {n.attr["allow_tf32"].b for n in nodes if n.op == "AttnOps>Backward"} == {tf32}


def test_tf32_changes_nothing_on_the_cpu(tf32):
    inputs = tensors()
    expected, _ = attn_ops.reference.attention(*[x.numpy() for x in inputs])
    for function in (step, tf.function(step), tf.function(step, jit_compile=True)):
        assert all(np.isfinite(d).all() for d in function(*inputs))
    np.testing.assert_allclose(attn_ops.scaled_dot_product_attention(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_tf32_is_a_bool_and_off_by_default():
    with pytest.raises(TypeError, match="allowed must be a bool, got int"):
        attn_ops.set_allow_tf32(1)
    code = "import attn_ops; print(attn_ops.allow_tf32())"
    for value, expected in (("", False), ("0", False), ("1", True)):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(PACKAGE.parent), "ATTN_OPS_ALLOW_TF32": value},
            capture_output=True,
            text=True,
        )
        assert run.stdout.strip() == str(expected), run.stderr
    assert precision.allow_tf32 is attn_ops.allow_tf32


def test_what_was_saved_before_there_was_tf32(monkeypatch):
    """Graphs and custom calls without the attribute."""

    def without(options):
        return {k: v for k, v in attention_call.attributes(options).items() if k != "allow_tf32"}

    for module in (eager, custom_call):
        monkeypatch.setattr(module, "attributes", without)
    monkeypatch.setattr(forms_graph, "_branch", forms_graph._branch.__wrapped__)  # nothing made before, nothing kept
    inputs = tensors()
    expected = step(*inputs)
    graph = tf.function(step).get_concrete_function(*inputs).graph.as_graph_def()
    for nodes in (graph.node, *(f.node_def for f in graph.library.function)):
        for node in nodes:
            if node.op.startswith("AttnOps>"):
                node.attr.pop("allow_tf32")
            if "module" in node.attr:
                assert b"allow_tf32" not in node.attr["module"].s
    with tf.Graph().as_default():
        tf.import_graph_def(graph)
    for jit_compile in (False, True):
        for found, wanted in zip(tf.function(step, jit_compile=jit_compile)(*inputs), expected):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
