#!/usr/bin/env python3
"""Writes the stubs of the public modules, what type checkers and editors know of their names:

    python tests/package/stub.py

Of the package itself, whose names load on first use; of functions whose options stand in `call.options.Options`, spelt
out; and of all else that is public, so that what has no type in the code has one for whoever checks strictly.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import attn_ops
from attn_ops.call.options import Options

MODULES = ("", "masks", "layers", "jax", "jax.parallel", "models", "visualize")
_TYPES = {**Options.__annotations__, "implementation": "str | None", "rotary": "bool | dict | None"}
_SIMPLE = re.compile(r"(?:\b(?:int|str|float|bool|bytes|None|tuple|list|dict)\b|[\s|,\[\]]|\.\.\.)+")
_GENERIC = {"dict": "dict[str, Any]", "list": "list[Any]", "tuple": "tuple[Any, ...]"}
_OPERATORS = ("__and__", "__bool__", "__call__", "__getitem__", "__iter__", "__len__")
_OF_MASK = ("block_sparse", "boolean", "causal", "chunked", "combined", "from_function", "intervals", "key_padding",
            "packed", "padding", "prefix", "query_padding", "segments", "window",
            "Mask.__and__", "Mask.of_call", "Mask.resolved", "Mask.with_arrays")  # fmt: skip
_OF_CACHE = ("KVCache.create", "KVCache.with_memory", "KVCache.update", "KVCache.rewind", "KVCache.copy")
# What functions and methods return where the code does not say it in simple types.
_RETURNS = {
    **dict.fromkeys(_OF_MASK, "Mask"),
    **dict.fromkeys(_OF_CACHE, "KVCache"),
    "PagedKVCache.create": "PagedKVCache",
    "Mask.parts": "Parts",
    "can_use_fused": "Support",
    "allow_tf32": "bool",
    "convert": "_Model",
    "revert": "_Model",
    "patched": "AbstractContextManager[None]",
    "attention": "ModelAttention",
    "viewer": "Viewer",
    "__bool__": "bool",
    "__iter__": "Iterator[Any]",
    "__len__": "int",
}
_HEAD = "# Written by tests/package/stub.py, which tests compare it with.\n"
_FROM = {"collections.abc": ["Iterator"], "contextlib": ["AbstractContextManager"], "typing": ["Any", "NamedTuple", "TypeVar"]}


def path(module: str) -> Path:
    """Where the stub of a module lies."""
    return Path(attn_ops.__file__).parent.joinpath(*filter(None, module.split(".")), "__init__.pyi")


def stub(module: str) -> str:
    """What it says."""
    of, imports, defined = importlib.import_module(full(module)), [], []

    def order(name):
        """Functions, classes, and what is another name of one."""
        value = getattr(of, name)
        return inspect.isclass(value), inspect.isclass(value) and value.__name__ != name, name

    for name in sorted(of.__all__, key=order):
        value = getattr(of, name)
        if inspect.ismodule(value):
            imports.append(f"from {value.__name__.rpartition('.')[0]} import {name} as {name}")
        elif (home := _home(name, value)) != module:
            imports.append(f"from {full(home)} import {name} as {name}")
        elif inspect.isclass(value):
            defined.append(f"{name} = {value.__name__}" if value.__name__ != name else _class(value))
        elif callable(value):
            defined.append(_function(name, name, value))
        else:
            defined.append(f"{name}: {'tuple[str, ...]' if isinstance(value, tuple) else type(value).__name__}")
    text = "\n".join([f"__all__ = {list(of.__all__)!r}\n", *defined])
    if "_Model" in text:
        text = f'_Model = TypeVar("_Model")\n{text}'
    first = ["import keras"] if "(keras." in text else []
    for home, names in _FROM.items():
        used = [name for name in names if re.search(rf"\b{name}\b", text)]
        first += [f"from {home} import {', '.join(used)}"] if used else []
    return "\n".join([_HEAD, *first, "", *sorted(imports), "" if not imports else "\n", text, ""]).replace("\n\n\n", "\n\n")


def full(module: str) -> str:
    """Its whole name."""
    return f"attn_ops.{module}" if module else "attn_ops"


def _home(name, value):
    """The first of the modules that has a class under its name, or the one of another value."""
    for module in MODULES:
        of = importlib.import_module(full(module))
        if name in of.__all__ and getattr(of, name) is value:
            return module
    raise KeyError(name)


def _class(cls) -> str:
    keras_base = next((base for base in cls.__mro__[1:] if base.__module__.startswith("keras.")), None)
    lines = []
    if keras_base is not None:
        import keras

        [base] = [name for name, of in vars(keras.layers).items() if of is keras_base]
        head, members = f"class {cls.__name__}(keras.layers.{base}):", ["__init__", "call"]
    elif hasattr(cls, "_fields"):
        head = f"class {cls.__name__}(NamedTuple):"
        lines = [f"    {name}: Any{' = ...' if name in cls._field_defaults else ''}" for name in cls._fields]
        members = _public(cls)
    else:
        head = f"class {cls.__name__}{f'({cls.__base__.__name__})' if cls.__base__ in (tuple, ValueError) else ''}:"
        attributes = {**_assigned(cls), **vars(cls).get("__annotations__", {})}
        lines = [f"    {name}: {_simple(kind)}" for name, kind in attributes.items()]
        members = ["__init__", *_public(cls)]
    attributes = [line.strip().partition(":")[0] for line in lines]
    return "\n".join([head, *lines, *(_member(cls, name) for name in members if name not in attributes)])


def _assigned(cls):
    """The public attributes that methods set."""
    nodes = ast.walk(ast.parse(inspect.getsource(cls)))
    names = [x.attr for x in nodes if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)]
    return {name: "Any" for name in names if not name.startswith("_")}


def _public(cls):
    skipped = getattr(cls, "_fields", ())
    own = [name for base in cls.__mro__ if base.__module__.startswith("attn_ops.") for name in vars(base)]
    return [name for name in dict.fromkeys(own) if name not in skipped and (name[0] != "_" or name in _OPERATORS)]


def _member(cls, name) -> str:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, classmethod):
        return "    @classmethod\n" + _function(name, f"{cls.__name__}.{name}", value.__func__, "    ")
    if isinstance(value, property):
        return f"    @property\n    def {name}(self) -> {_simple(inspect.signature(value.fget).return_annotation)}: ..."
    if inspect.isclass(value):
        return f"    class {name}({value.__base__.__name__}): ..."
    if callable(value):
        of = cls if name == "__init__" else value  # which knows what it hands on
        return _function(name, f"{cls.__name__}.{name}", of, "    ")
    return f"    @property\n    def {name}(self) -> Any: ..."


def _function(name, qualified, function, indent="") -> str:
    signature = inspect.signature(function)
    given, keywords = list(signature.parameters.values()), False
    parameters = ["self"] if name == "__init__" else [given.pop(0).name] if indent else []
    for parameter in given:
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            parameters.append("*")
        keywords |= parameter.kind is parameter.VAR_POSITIONAL
        parameters.append(_parameter(parameter, hasattr(function, "__signature__")))
    told = _RETURNS.get(qualified) or _RETURNS.get(name if indent else "")
    returns = "None" if name == "__init__" else told or _simple(signature.return_annotation)
    if returns == "_Model":
        parameters = [f"{next(iter(signature.parameters))}: _Model"]
    line = f"{indent}def {name}({', '.join(parameters)}) -> {returns}: ..."
    if len(line) <= 120:
        return line
    return "\n".join([f"{indent}def {name}(", *(f"{indent}    {x}," for x in parameters), f"{indent}) -> {returns}: ..."])


def _parameter(parameter, takes_options) -> str:
    prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = parameter.default
    kind = _simple(parameter.annotation)
    if takes_options and parameter.name in _TYPES:
        kind = _simple(_TYPES[parameter.name])
        if default is None and kind != "Any" and "None" not in kind:
            kind += " | None"
    elif kind == "Any" and isinstance(default, bool):
        kind = "bool"
    default = str(default) if isinstance(default, str) else default  # "top_left" is of a class of its own
    return f"{prefix}{parameter.name}: {kind}{'' if default is parameter.empty else f' = {default!r}'}"


def _simple(annotation) -> str:
    """An annotation, where it is of simple types alone."""
    text = getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", None) or str(annotation)
    if not _SIMPLE.fullmatch(text):
        return "Any"
    for bare, whole in _GENERIC.items():
        text = re.sub(rf"\b{bare}\b(?!\[)", whole, text)
    return text


if __name__ == "__main__":
    for name in MODULES:
        path(name).write_text(stub(name))
