"""What `pytest -m gpu` leaves out: modules that need packages which are not here. A machine that is lent for trying
kernels has PyTorch and NumPy, and neither TensorFlow nor what needs its headers to be built (`attn_ops._core`).

Other runs import every module, so that nothing goes untested unnoticed.
"""

import ast
import functools
import importlib.util
import sys
from pathlib import Path

_HELPERS = Path(__file__).resolve().parent
_PATH = (_HELPERS.parent, _HELPERS)  # as in pyproject.toml
_CORE = "attn_ops._core"
_ROOMS = {"attn_ops.tensorflow": "tensorflow", "attn_ops.jax": "jax", "attn_ops.layers": "keras"}  # and what they import


@functools.cache
def missing_packages(path: Path) -> frozenset[str]:
    """The packages, and `attn_ops._core`, that importing this file of the tests would ask for in vain."""
    missing = set()
    for name in _imports(ast.parse(path.read_text(), str(path))):
        helper = _helper(name)
        if helper:
            missing |= missing_packages(helper) if helper != path else set()
        elif not _exists(name):
            missing.add(name)
    return frozenset(missing)


def _helper(name: str) -> Path | None:
    """The file of a module of the tests, if it is one."""
    places = [folder.joinpath(*name.split(".")) for folder in _PATH]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.exists()), None)


@functools.cache
def _exists(name: str) -> bool:
    return name in sys.builtin_module_names or importlib.util.find_spec(name) is not None


def _imports(module: ast.Module):
    """Names of packages that are imported at once; of attn_ops, only `_core`, which `kernels.core()` imports too."""
    for node in _at_once(module):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "kernels.core":
            names = [_CORE]
        else:
            continue
        for name in names:
            room = ".".join(name.split(".")[:2])
            if name == _CORE or _helper(name):
                yield name
            elif room in _ROOMS:
                yield _ROOMS[room]
            else:
                yield name.partition(".")[0]


def _at_once(node: ast.AST):
    """The nodes that are executed when the module is: of functions, the decorators alone."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        children = node.decorator_list
    else:
        children = [] if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node)
    for child in children:
        yield child
        yield from _at_once(child)
