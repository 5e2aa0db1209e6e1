"""The text of one PTX entry as a list of instructions (PTX ISA, chapters 4 and 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class UnknownForm(Exception):
    """An instruction form, operand or directive that this interpreter does not know."""


@dataclass
class Instruction:
    guard: str | None
    negated: bool
    opcode: str
    operands: list[str]
    text: str
    line: int
    source: str

    def __str__(self):
        return f"{self.text} (PTX line {self.line}, {self.source})"


@dataclass
class Entry:
    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # by register prefix; a predicate has 1 bit
    parameters: dict[str, int] = field(default_factory=dict)  # name -> offset in the parameter block


_SILENT = (".loc", ".pragma", ".reqntid", ".maxntid", ".maxnreg", ".minnctapersm")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*)", re.S)


def split(operands: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(operands):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append(operands[start:at].strip())
            start = at + 1
    last = operands[start:].strip()
    return [*parts, last] if last else parts


def width_of(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind))


def parse(ptx: str) -> Entry:
    """The only entry of a module; a second one, a function or a call is an error."""
    entry, source, inside, end = Entry(), "no source line", False, 0
    for number, raw in enumerate(ptx.splitlines(), 1):
        code, _, comment = raw.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.strip() or source
        if not entry.name:
            if match := re.match(r"\.visible \.entry (\w+)\(", code):
                entry.name = match[1]
            continue
        if not inside:
            if match := re.match(r"\.param \.(\w+)(?: [^,]*)? (\w+),?$", code):
                size = width_of(match[1]) // 8
                offset = -(-end // size) * size
                entry.parameters[match[2]] = offset
                end = offset + size
            inside = code == "{"
            continue
        if raw.startswith("}"):
            return entry
        if match := re.match(r"(\$\w+):$", code):
            entry.labels[match[1]] = len(entry.instructions)
            continue
        for statement in code.split(";"):
            _statement(entry, statement.strip(), number, source)
    raise UnknownForm("the text has no entry with an end")


def _statement(entry: Entry, text: str, number: int, source: str) -> None:
    if text.startswith("{"):
        text = text[1:].strip()
    if text in ("", "}") or text.startswith(_SILENT):
        return
    if match := re.match(r"\.reg \.(\w+)\s+([%\w]+?)(?:<\d+>)?$", text):
        entry.widths[match[2]] = width_of(match[1])
        return
    match = _STATEMENT.fullmatch(text)
    if match is None or text.startswith("."):
        raise UnknownForm(f"line {number}: {text}")
    entry.instructions.append(
        Instruction(match[2], match[1] == "!", match[3], split(match[4]), " ".join(text.split()), number, source)
    )
