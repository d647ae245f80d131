"""Where attention happens in classes that are not ours, and what stands in for it there.

A seam is one method of one class, as it was known when its adapter was written. It is checked each time it is used: where
the method takes other arguments or has other code now, or a subclass does a step of the computation itself, the layer is
left alone and the reason is told. The adapters are in adapters/, the table of them in adapters/table.py, those of users in
`registered`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable

from attn_ops.layers.base import replaced_in

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclasses.dataclass(frozen=True)
class Seam:
    """A method that an adapter stands in for.

    Attributes:
        module, name: of the class. It is never imported from here: who has a layer of it has imported it.
        method: its name.
        parameters: the names of its arguments, without self, as they are known; a release may have fewer of them. None
            for whatever they are.
        adapter: called as `adapter(layer, stock, *args, **kwargs)` in place of `layer.method(*args, **kwargs)`, where
            `stock` is the method itself, for what the adapter does not take over.
        steps: other methods whose work the adapter does: with one of them overridden, a subclass is left alone.
        codes: the :func:`fingerprint`s of the method and steps that the adapter was checked against; empty for any code.
        attends: whether this is an attention; else it makes the masks for one.
        needed: whether the layer is left alone where this one does not fit; else only this one is left out.
    """

    module: str
    name: str
    method: str
    parameters: tuple[str, ...] | None
    adapter: Callable
    steps: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    attends: bool = True
    needed: bool = True

    def cls(self):
        """The class, or None where its module is not imported or has no such class."""
        return getattr(sys.modules.get(self.module), self.name, None)

    def reason_against(self, kind) -> str | None:
        """Why the adapter does not fit layers of the class ``kind``, which is this one's or a subclass; or None."""
        cls = self.cls()
        found = getattr(cls, self.method, None)
        if found is None:
            return f"{self.name} has no method {self.method}"
        step = self.overridden_by(kind)
        if step is not None:
            return f"{kind.__name__} overrides {step}"
        names = parameter_names(getattr(found, "stock", found))
        if self.parameters is not None and names != self.parameters[: len(names)]:
            return f"{self.name}.{self.method} takes ({', '.join(names)}), and ({', '.join(self.parameters)}) is known"
        if self.codes and self.fingerprint() not in self.codes:
            return f"the code of {self.name}.{self.method} is not the one that is known"
        return None

    def overridden_by(self, kind) -> str | None:
        """The first of the method and the steps that the subclass ``kind`` has another one of, or None."""
        cls = self.cls()
        names = (self.method, *self.steps)
        return next((name for name in names if getattr(kind, name, None) is not getattr(cls, name, None)), None)

    def replaced_in(self, layer) -> str | None:
        """The first of the method and the steps that somebody has put another one of into this very layer, or None."""
        return replaced_in(layer, self.method, *self.steps)

    def fingerprint(self) -> str:
        """That of the code of the method and of the steps, as the class has them now."""
        functions = (getattr(self.cls(), name) for name in (self.method, *self.steps))
        return fingerprint(*(getattr(function, "stock", function) for function in functions))


# Those of users, by class: attn_ops.models.register.
registered: dict[type, list[Seam]] = {}


def register(cls, adapter, method="call"):
    """Makes :func:`attn_ops.convert`, :func:`attn_ops.patched` and :func:`attn_ops.explain` know a class of attention.

    For layers of your own, or of a library that attn_ops does not know. The adapter decides what it takes over::

        def attend(layer, stock, query, key, value, mask=None):
            if mask is not None and mask.dtype != "bool":
                return stock(query, key, value, mask)  # what the layer would have done
            return attn_ops.scaled_dot_product_attention(query, key, value, mask=mask, scale=layer.scale)

        attn_ops.models.register(MyAttention, attend, method="_attend")
        attn_ops.convert(model)

    A subclass of `cls` that overrides the method is left alone. A second registration of a method replaces the first.

    Args:
        cls: A subclass of `keras.layers.Layer`.
        adapter: Called as `adapter(layer, stock, *args, **kwargs)` in place of the method of a converted layer; `stock` is
            the method itself, bound to the layer.
        method: The name of the method of `cls`.

    Raises:
        TypeError: `cls` is not a class, or the adapter cannot be called.
        ValueError: `cls` has no such method.
    """
    if not isinstance(cls, type):
        raise TypeError(f"attn_ops.models.register: cls must be a class of Keras layers, got {cls!r}")
    if not callable(adapter):
        raise TypeError(f"attn_ops.models.register: adapter must be callable, got {adapter!r}")
    if not callable(getattr(cls, method, None)):
        raise ValueError(f"attn_ops.models.register: {cls.__name__} has no method {method!r}")
    seam = Seam(cls.__module__, cls.__qualname__, method, None, adapter)
    others = [known for known in registered.get(cls, ()) if known.method != method]
    registered[cls] = [*others, _OfClass(**vars(seam), owner=cls)]


@dataclasses.dataclass(frozen=True)
class _OfClass(Seam):
    """A seam of a class that is known itself, which may be in no module under its name."""

    owner: type = None

    def cls(self):
        return self.owner


def parameter_names(function) -> tuple[str, ...]:
    """The names of the arguments of a method, without self."""
    return tuple(inspect.signature(function).parameters)[1:]


@functools.cache
def fingerprint(*functions) -> str:
    """Tells the code of functions from any other, whatever their comments, documentation and layout; "" where there is no
    source."""
    try:
        return fingerprint_of_source(*(inspect.getsource(function) for function in functions))
    except (OSError, TypeError):
        return ""


def fingerprint_of_source(*sources) -> str:
    """The :func:`fingerprint` of functions with these sources."""
    text = []
    for source in map(textwrap.dedent, sources):
        function = ast.parse(source).body[0]
        docstring = function.body[0] if ast.get_docstring(function) is not None else None
        inside = range(docstring.lineno, docstring.end_lineno + 1) if docstring else ()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        text += [t.string for t in tokens if t.type not in _LAYOUT and t.start[0] not in inside]
    return hashlib.sha256(" ".join("".join(text).split()).encode()).hexdigest()[:12]


def install(seam, layer):
    """Puts the adapter in the place of the method of one layer. The layer keeps its class, and is saved as before."""
    method = seam.method

    def stock(*args, **kwargs):
        return getattr(type(layer), method)(layer, *args, **kwargs)

    @functools.wraps(getattr(layer, method))
    def adapted(*args, **kwargs):
        if seam.replaced_in(layer):  # since then
            return stock(*args, **kwargs)
        return seam.adapter(layer, stock, *args, **kwargs)

    adapted.seam = seam
    adapted.put_by_attn_ops = True
    vars(layer)[method] = adapted  # not setattr, which Keras tracks


def uninstall(layer) -> bool:
    """Takes away what :func:`install` put into the layer; whether there was anything."""
    seams = installed(layer)
    for seam in seams:
        del vars(layer)[seam.method]
    return bool(seams)


def installed(layer) -> list[Seam]:
    """The seams that are in effect in this layer, by :func:`install`."""
    # Under the method's own name: what wraps it elsewhere in the layer, as a traced function does, has its attributes too.
    found = ((name, getattr(x, "seam", None)) for name, x in vars(layer).items())
    return [seam for name, seam in found if isinstance(seam, Seam) and seam.method == name]


def in_effect(layer) -> bool:
    """Whether an adapter stands in for this layer's attention, its own or that of its class."""
    kind = type(layer)
    return bool(installed(layer)) or any(
        issubclass(kind, cls) and hasattr(getattr(kind, method), "stock") for cls, method, _ in _in_classes
    )


_in_classes: list[tuple[type, str, Callable]] = []


def install_in_class(seam):
    """Puts the adapter in the place of the method of the class, for all its layers, also those to come.

    Layers that have an adapter themselves, and subclasses that the adapter does not fit, go on as before.
    """
    cls, method = seam.cls(), seam.method
    stock = getattr(cls, method)

    @functools.wraps(stock)
    def adapted(self, *args, **kwargs):
        if method in vars(self) or seam.overridden_by(type(self)) or seam.replaced_in(self):
            return stock(self, *args, **kwargs)
        return seam.adapter(self, functools.partial(stock, self), *args, **kwargs)

    adapted.stock, adapted.inherited = stock, method not in vars(cls)
    setattr(cls, method, adapted)
    _in_classes.append((cls, method, adapted))


def uninstall_in_classes():
    """Undoes :func:`install_in_class` wherever it was done; a function that somebody else put there since stays."""
    while _in_classes:
        cls, method, adapted = _in_classes.pop()
        if vars(cls).get(method) is adapted:
            if adapted.inherited:
                delattr(cls, method)
            else:
                setattr(cls, method, adapted.stock)
