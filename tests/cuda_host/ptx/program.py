"""The text of a kernel's PTX as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

_REGISTER_TYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32, "b64": np.uint64}
_STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")


class PtxError(RuntimeError):
    """PTX that the interpreter does not know, or that did what a kernel must not do."""


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers operands;`, where it is."""

    number: int
    text: str
    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode[0]

    @property
    def type(self) -> str:
        return self.opcode[-1]


@dataclass(eq=False)
class Program:
    """One kernel."""

    name: str
    threads: int
    parameter_bytes: int
    registers: dict[str, type] = field(default_factory=dict)  # by name without number, or whole: the type of its bits
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str, name: str) -> Program:
    """The kernel `name` of a module, or of a part of one that has no other kernel of this name."""
    header = re.search(rf"\.entry\s+{name}\((.*?)\)(.*?)\n\{{", text, re.DOTALL)
    if header is None:
        raise PtxError(f"no kernel {name} in the PTX")
    threads = int(re.search(r"\.maxntid\s+(\d+)", header[2])[1])
    program = Program(name, threads, int(re.search(r"\[(\d+)\]", header[1])[1]))
    body = text[header.end() :].split(".entry", 1)[0]
    _Reader(program).read(re.sub(r"//[^\n]*", "", body))
    return program


class _Reader:
    """Reads statements. Registers that an inner scope declares anew get names of their own."""

    def __init__(self, program: Program):
        self.program = program
        self.scopes: list[dict[str, str]] = []
        self.renamed = 0

    def read(self, body: str):
        at = 0
        while match := _STATEMENT.match(body, at):
            at = match.end()
            brace, label, statement = match.groups()
            if brace == "{":
                self.scopes.append({})
            elif brace == "}" and not self.scopes:
                return  # the kernel ends
            elif brace == "}":
                self.scopes.pop()
            elif label:
                self.program.labels[label] = len(self.program.instructions)
            elif statement.startswith("."):
                self.declare(statement.split())
            elif statement:
                self.add(statement.strip())
        raise PtxError(f"{self.program.name}: cannot read {body[at : at + 80]!r}")

    def declare(self, words: list[str]):
        if words[0] == ".pragma":
            return
        if words[0] != ".reg":
            raise PtxError(f"{self.program.name}: what is {' '.join(words)}?")
        kind = _REGISTER_TYPES[words[1].lstrip(".")]
        for name in " ".join(words[2:]).replace(" ", "").split(","):
            if self.scopes:
                self.renamed += 1
                self.scopes[-1][name] = f"%scoped{self.renamed}"
                name = self.scopes[-1][name]
            self.program.registers[re.sub(r"<\d+>$", "", name)] = kind

    def add(self, text: str):
        guard, negated, opcode, rest = re.match(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", text, re.DOTALL).group(
            2, 1, 3, 4
        )
        operands = tuple(split_operands(rest))
        if self.scopes:
            operands = tuple(map(self.own_name, operands))
            guard = guard and self.own_name(guard)
        number = len(self.program.instructions)
        short = re.sub(r"\{([^,{}]+,)(?:[^,{}]+,){7,}([^,{}]+)\}", r"{\1 ..\2}", text)  # for people
        self.program.instructions.append(
            Instruction(number, short, guard, bool(negated), tuple(opcode.split(".")), operands)
        )

    def own_name(self, operand: str) -> str:
        for scope in reversed(self.scopes):
            operand = re.sub(r"%?\w+", lambda word: scope.get(word[0], word[0]), operand)
        return operand


def split_operands(text: str) -> list[str]:
    """By the commas outside braces and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
