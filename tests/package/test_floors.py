"""The modules of the package stand on floors: what is below never imports what is above, and there are few."""

import ast
import functools
import importlib
from importlib.util import resolve_name
from pathlib import Path

import pytest

import attn_ops

ROOT = Path(attn_ops.__file__).parent
DESIGN = 7  # floors that the design allows
# Of packages that load on first use what they name (lazy.py), each name counted as the module that has it: above the adapters of
# other people's classes stand who looks for these in a model, who explains or converts it, and who is asked to.
THROUGH_DOORS = 11


def files():
    """The modules by name, without the package itself, which names all."""
    paths = {path.relative_to(ROOT.parent).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    named = {".".join(parts).removesuffix(".__init__"): path for parts, path in paths.items()}
    return {name: path for name, path in named.items() if name != "attn_ops"}


def imported(name, path):
    """What `import` statements in a module name, those in functions too: pairs of a module and a name in it, or None."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from ((module, alias.name) for alias in node.names)


def homes(package):
    """The modules of the names that a package loads on first use."""
    return {name: resolve_name(home, package) for name, home in getattr(importlib.import_module(package), "_HOMES", {}).items()}


def graph(through_doors):
    """For each module those that it imports."""
    paths = files()
    doors = {name: homes(name) for name, path in paths.items() if through_doors and path.name == "__init__.py"}
    edges = {}
    for name, path in paths.items():
        found = set()
        for module, what in imported(name, path):
            inner = f"{module}.{what}"
            found |= {inner if inner in paths else module, doors.get(module, {}).get(what)}
        edges[name] = sorted(found & paths.keys() - {name})
    return edges


def highest(edges):
    """The longest chain of imports, which begins at the highest floor; AssertionError where one comes back to its beginning."""
    above = []

    @functools.cache
    def chain(name):
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        above.append(name)
        below = max(map(chain, edges[name]), key=len, default=())
        above.pop()
        return name, *below

    return max(map(chain, edges), key=len)


@pytest.mark.parametrize("through_doors, floors", [(False, DESIGN), (True, THROUGH_DOORS)])
def test_floors(through_doors, floors):
    found = highest(graph(through_doors))
    assert len(found) <= floors, " -> ".join(found)


def test_a_circle_is_found():
    with pytest.raises(AssertionError, match="a circle: b -> c -> b"):
        highest({"a": ["b"], "b": ["c"], "c": ["b"]})
    assert highest({"a": ["b", "c"], "b": ["c"], "c": []}) == ("a", "b", "c")
