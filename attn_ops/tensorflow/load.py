"""What loads a model that was exported with the fused op."""

from __future__ import annotations

from attn_ops import kernels
from attn_ops.tensorflow import derivatives  # noqa: F401  registers the gradients: what is loaded can be differentiated


def load_library() -> str:
    """Loads the compiled library into TensorFlow, so that models exported with ``ops="fused"`` can be loaded.

    `import attn_ops` alone does not, since it is quick and works without TensorFlow; calling the attention or making
    a layer does.

    Returns:
        The library's path, for TF_LoadLibrary of TensorFlow's C API and for servers.

    Raises:
        ImportError: The library cannot be loaded, and why.
    """
    missing = kernels.unavailable_reason()
    if missing is not None:
        raise ImportError(f"attn_ops.load_library: {missing}")
    return kernels.library_path()
