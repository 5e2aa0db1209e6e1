"""Every instruction form that the tested kernels contain, as a function over the lanes' registers.

The semantics are those of the PTX ISA's opcodes of the same name. A form that is not in these tables is an error.
"""

from __future__ import annotations

import re
import struct

import numpy as np

from .arithmetic import extremum, flush, fma32, fma64
from .memory import SHARED_BASE, Fault
from .parse import Entry, Instruction, UnknownForm, split

BITS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    "pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "u16": np.uint16, "u32": np.uint32,
    "u64": np.uint64, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32,
    "f64": np.float64,
}  # fmt: skip


def _shift_left(a, count):
    """Amounts above the width give zero."""
    width = a.dtype.itemsize * 8
    return np.where(count < width, a << np.minimum(count, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a, count):
    """Amounts above the width are the width; a signed value keeps its sign."""
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < width, shifted, a.dtype.type(0))


def _bfe(a, position, length):
    """``length`` bits from ``position`` on; both are read modulo 256."""
    wide = a.astype(np.uint64) >> np.minimum(position & 255, 63).astype(np.uint64)
    return (wide & ((np.uint64(1) << np.minimum(length & 255, 32).astype(np.uint64)) - np.uint64(1))).astype(np.uint32)


def _bfe_signed(a, position, length):
    """Sign-extended from the field's top bit, or from bit 31 where the field passes it."""
    position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    top = np.minimum(position + length, 32)
    moved = a.astype(np.int64) << (64 - top)
    return np.where(length == 0, 0, moved >> np.minimum(64 - top + position, 63)).astype(np.int32)


def _rcp_approx(a):
    """From the upper word alone, and the result's lower word is zero; subnormals are flushed."""
    upper = np.uint64(0xFFFFFFFF00000000)
    result = 1 / flush((a.view(np.uint64) & upper).view(np.float64))
    return flush((result.view(np.uint64) & upper).view(np.float64))


def _ex2(a):
    """To 2 units in the last place; here rounded from float64."""
    return flush(np.exp2(flush(a).astype(np.float64)).astype(np.float32))


def _wide(a):
    return a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)


# opcode -> (types of the operands after the destination, type of the destination, function)
FORMS: dict[str, tuple] = {}


def _form(names: str, sources, result, function) -> None:
    for name in names.split():
        FORMS[name] = (sources, result, function)


for _kind in ("f32", "f64"):
    _form(f"add.{_kind} add.rn.{_kind}", (_kind,) * 2, _kind, lambda a, b: a + b)
    _form(f"sub.{_kind} sub.rn.{_kind}", (_kind,) * 2, _kind, lambda a, b: a - b)
    _form(f"mul.{_kind} mul.rn.{_kind}", (_kind,) * 2, _kind, lambda a, b: a * b)
    _form(f"max.{_kind}", (_kind,) * 2, _kind, lambda a, b: extremum(a, b, True))
    _form(f"min.{_kind}", (_kind,) * 2, _kind, lambda a, b: extremum(a, b, False))
    _form(f"neg.{_kind}", (_kind,), _kind, lambda a: -a)
    _form(f"abs.{_kind}", (_kind,), _kind, np.abs)
    _form(f"div.rn.{_kind}", (_kind,) * 2, _kind, lambda a, b: a / b)
    _form(f"sqrt.rn.{_kind}", (_kind,), _kind, np.sqrt)
_form("fma.rn.f32", ("f32",) * 3, "f32", fma32)
_form("fma.rn.ftz.f32", ("f32",) * 3, "f32", lambda a, b, c: flush(fma32(flush(a), flush(b), flush(c))))
_form("fma.rn.f64", ("f64",) * 3, "f64", fma64)
_form("abs.ftz.f32", ("f32",), "f32", lambda a: flush(np.abs(a)))
_form("div.full.f32", ("f32",) * 2, "f32", lambda a, b: a / b)  # to 2 units in the last place
_form("ex2.approx.ftz.f32", ("f32",), "f32", _ex2)
_form("sqrt.approx.ftz.f32", ("f32",), "f32", lambda a: flush(np.sqrt(flush(a))))
_form("rcp.approx.ftz.f64", ("f64",), "f64", _rcp_approx)
for _kind in ("s32", "u32", "s64", "u64"):
    _form(f"add.{_kind}", (_kind,) * 2, _kind, lambda a, b: a + b)
    _form(f"sub.{_kind}", (_kind,) * 2, _kind, lambda a, b: a - b)
    _form(f"mul.lo.{_kind}", (_kind,) * 2, _kind, lambda a, b: a * b)
    _form(f"max.{_kind}", (_kind,) * 2, _kind, np.maximum)
    _form(f"min.{_kind}", (_kind,) * 2, _kind, np.minimum)
    _form(f"shr.{_kind}", (_kind, "u32"), _kind, _shift_right)
for _kind in ("s32", "u32"):
    _long = _kind.replace("32", "64")
    _form(f"mul.wide.{_kind}", (_kind,) * 2, _long, lambda a, b: _wide(a) * _wide(b))
    _form(f"mad.wide.{_kind}", (_kind, _kind, _long), _long, lambda a, b, c: _wide(a) * _wide(b) + c)
for _kind in ("b32", "b64", "pred"):
    _form(f"and.{_kind}", (_kind,) * 2, _kind, lambda a, b: a & b)
    _form(f"or.{_kind}", (_kind,) * 2, _kind, lambda a, b: a | b)
    _form(f"xor.{_kind}", (_kind,) * 2, _kind, lambda a, b: a ^ b)
    _form(f"not.{_kind}", (_kind,), _kind, lambda a: ~a)
for _kind in ("b32", "b64"):
    _form(f"shl.{_kind}", (_kind, "u32"), _kind, _shift_left)
for _kind in ("b16", "b32", "b64", "f32", "f64", "s32", "s64", "u32", "u64"):
    _form(f"selp.{_kind}", (_kind, _kind, "pred"), _kind, lambda a, b, p: np.where(p, a, b))
_form("neg.s32", ("s32",), "s32", lambda a: -a)
for _kind in ("s32", "u32", "s64", "u64"):
    _form(f"mad.lo.{_kind}", (_kind,) * 3, _kind, lambda a, b, c: a * b + c)
_form("bfe.s32", ("s32", "u32", "u32"), "s32", _bfe_signed)
_form("bfe.u32", ("u32",) * 3, "u32", _bfe)
for _from, _to in (("u32", "u64"), ("u64", "u32"), ("s32", "s64"), ("s64", "s32")):
    _form(f"cvt.{_to}.{_from}", (_from,), _to, lambda a, to=TYPES[_to]: a.astype(to))
for _from, _to in (("s32", "f32"), ("u32", "f32"), ("s32", "f64"), ("u32", "f64"), ("f64", "f32")):
    _form(f"cvt.rn.{_to}.{_from}", (_from,), _to, lambda a, to=TYPES[_to]: a.astype(to))
_form("cvt.f64.f32", ("f32",), "f64", lambda a: a.astype(np.float64))

_ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for _name, _compare in _ORDER.items():
    for _kind in ("s32", "u32", "s64", "u64", "b32", "b64"):
        if _kind[0] != "b" or _name in ("eq", "ne"):
            _form(f"setp.{_name}.{_kind}", (_kind,) * 2, "pred", _compare)
    for _kind in ("f32", "f64"):
        # Without u: false where an operand is NaN, for ne as well. With u: true there.
        _form(
            f"setp.{_name}.{_kind}", (_kind,) * 2, "pred",
            lambda a, b, compare=_compare: compare(a, b) & ~(np.isnan(a) | np.isnan(b)),
        )  # fmt: skip
        _form(
            f"setp.{_name}u.{_kind}", (_kind,) * 2, "pred",
            lambda a, b, compare=_compare: compare(a, b) | np.isnan(a) | np.isnan(b),
        )  # fmt: skip
for _kind in ("f32", "f64"):
    _form(f"setp.nan.{_kind}", (_kind,) * 2, "pred", lambda a, b: np.isnan(a) | np.isnan(b))


def literal(text: str, kind: str):
    """A constant (4.5) as a scalar of ``kind``; None: it is no constant."""
    if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
        bits, floating = (np.uint32, np.float32) if match[1] == "f" else (np.uint64, np.float64)
        value = np.array(int(match[2], 16), bits)
        wanted = np.dtype(TYPES[kind])
        if (wanted.kind == "f" and wanted != floating) or wanted.itemsize != value.itemsize:
            raise UnknownForm(f"constant {text} as {kind}")
        return value.view(wanted)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
        value = int(text, 0)
        if kind == "pred":
            return np.array(value != 0)
        if kind[0] == "f":
            raise UnknownForm(f"constant {text} as {kind}")
        size = np.dtype(TYPES[kind]).itemsize
        return np.array(value & ((1 << 8 * size) - 1), BITS[8 * size]).view(TYPES[kind])
    return None


def reader(text: str, kind: str, instruction: Instruction):
    """A function of (unit, mask) that gives an operand as an array of ``kind``."""
    dtype = np.dtype(TYPES[kind])
    constant = literal(text, kind)
    if constant is not None:
        return lambda unit, mask: np.full(unit.count, constant)
    if text == "global_smem":
        return lambda unit, mask: np.full(unit.count, SHARED_BASE, dtype)
    if text == "%tid.x":
        return lambda unit, mask: unit.lanes.astype(dtype)
    if re.fullmatch(r"%(n?ctaid|n?tid)\.[xyz]", text):
        return lambda unit, mask: np.full(unit.count, unit.block.special[text], dtype)
    if not re.fullmatch(r"%?[a-z]+\d*", text):
        raise UnknownForm(f"operand {text}: {instruction}")

    def read(unit, mask):
        value = unit.read(text, mask, instruction)
        if value.dtype.itemsize != dtype.itemsize or (value.dtype == bool) != (kind == "pred"):
            raise UnknownForm(f"operand {text} as {kind}: {instruction}")
        return value.view(dtype)

    return read


def write(unit, name: str, value, mask, instruction) -> None:
    """Stores bits; a value of another width than the register's is an error."""
    if name == "_":
        return
    bits = BITS[unit.width(name)]
    if value.dtype.itemsize != np.dtype(bits).itemsize:
        raise UnknownForm(f"{value.dtype} into {name}: {instruction}")
    unit.write(name, value.view(bits), mask)


def build(entry: Entry, instruction: Instruction):
    """(instruction, its guard or None, its execution, its effect on the program counter or None)."""
    guard = None
    if instruction.guard:
        read = reader(instruction.guard, "pred", instruction)
        guard = (lambda unit, mask: ~read(unit, mask)) if instruction.negated else read
    opcode, operands = instruction.opcode, instruction.operands
    control = _control(entry, opcode, operands, instruction)
    if control is not None:
        return instruction, guard, None, control
    if opcode in FORMS:
        return instruction, guard, _simple(instruction), None
    for pattern, make in _SPECIAL:
        if match := re.fullmatch(pattern, opcode):
            return instruction, guard, make(entry, instruction, *match.groups()), None
    raise UnknownForm(str(instruction))


def _control(entry, opcode, operands, instruction):
    if opcode in ("bra", "bra.uni"):
        return "bra", entry.labels[operands[0]]
    if opcode == "ret":
        return "ret", 0
    if opcode == "bar.sync" and len(operands) == 1:  # 9.7.13.1, all threads of the block
        return "barrier", int(operands[0])
    return None


def _simple(instruction: Instruction):
    sources, result, function = FORMS[instruction.opcode]
    target, *rest = instruction.operands
    if len(rest) != len(sources):
        raise UnknownForm(str(instruction))
    reads = [reader(text, kind, instruction) for text, kind in zip(rest, sources, strict=True)]
    dtype = np.dtype(TYPES[result])

    def execute(unit, mask):
        value = function(*(read(unit, mask) for read in reads))
        if value.dtype != dtype:
            raise UnknownForm(f"{value.dtype} instead of {dtype}: {instruction}")
        write(unit, target, value, mask, instruction)

    return execute


def _move(entry, instruction, kind):
    """mov: a register, a constant, an address; or halves packed and unpacked, the low one first."""
    target, source = instruction.operands
    if source.startswith("{"):
        half = f"b{int(kind[1:]) // 2}"
        low, high = (reader(text, half, instruction) for text in split(source[1:-1]))

        def execute(unit, mask):
            pair = np.stack([low(unit, mask), high(unit, mask)], 1)
            write(unit, target, pair.view(TYPES[kind])[:, 0], mask, instruction)

        return execute
    read = reader(source, kind, instruction)
    if target.startswith("{"):
        names = split(target[1:-1])
        if len(names) != 2 or kind == "pred":
            raise UnknownForm(str(instruction))
        dtype = TYPES[f"b{int(kind[1:]) // 2}"]

        def unpack(unit, mask):
            halves = np.ascontiguousarray(read(unit, mask)).view(dtype).reshape(-1, 2)
            for at, name in enumerate(names):
                write(unit, name, np.ascontiguousarray(halves[:, at]), mask, instruction)

        return unpack
    return lambda unit, mask: write(unit, target, read(unit, mask), mask, instruction)


def _load_parameter(entry, instruction, kind):
    """ld.param."""
    target, source = instruction.operands
    name = source[1:-1]
    if name not in entry.parameters:
        raise UnknownForm(str(instruction))
    dtype = np.dtype(TYPES[kind])

    def execute(unit, mask):
        value = struct.unpack_from(
            "<I" if dtype.itemsize == 4 else "<Q", unit.block.parameters, entry.parameters[name]
        )[0]
        write(unit, target, np.full(unit.count, value, dtype), mask, instruction)

    return execute


def _address(text: str, space: str, instruction):
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if match is None:
        raise UnknownForm(str(instruction))
    name, offset = match[1], int(match[2] or 0)
    read = reader(name, "b64" if space == "global" else "b32", instruction)
    return lambda unit, mask: read(unit, mask)[mask].astype(np.uint64) + np.uint64(offset & (1 << 64) - 1)


def _names(text: str, count: int, instruction) -> list[str]:
    names = split(text[1:-1]) if text.startswith("{") else [text]
    if len(names) != count:
        raise UnknownForm(str(instruction))
    return names


def _load(entry, instruction, space, vector, kind):
    """ld: an address is a multiple of the whole access."""
    dtype = np.dtype(TYPES[kind])
    count = int(vector or 1)
    names = _names(instruction.operands[0], count, instruction)
    address = _address(instruction.operands[1], space, instruction)

    def execute(unit, mask):
        if not mask.any():
            return
        values = unit.block.memory[space].load(address(unit, mask), count * dtype.itemsize, instruction).view(dtype)
        for at, name in enumerate(names):
            value = np.zeros(unit.count, dtype)
            value[mask] = values[:, at]
            write(unit, name, value, mask, instruction)

    return execute


def _store(entry, instruction, space, vector, kind):
    """st."""
    count = int(vector or 1)
    address = _address(instruction.operands[0], space, instruction)
    reads = [reader(text, kind, instruction) for text in _names(instruction.operands[1], count, instruction)]

    def execute(unit, mask):
        if not mask.any():
            return
        values = np.stack([read(unit, mask)[mask] for read in reads], 1).view(np.uint8)
        unit.block.memory[space].store(address(unit, mask), values, instruction)

    return execute


def _together(unit, mask, members, instruction) -> None:
    """The warp-wide forms wait for all members; here they must arrive together, and they are the whole warp."""
    if not (members == np.uint32(0xFFFFFFFF))[mask].all():
        raise UnknownForm(f"a member mask of less than the warp: {instruction}")
    warps = mask.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise Fault(f"lanes of a warp arrive apart: {instruction}")


def _shuffle(entry, instruction, mode):
    """shfl.sync over whole warps: a clamp of 31 and no segments."""
    target, *rest = instruction.operands
    if "|" in target or len(rest) != 4:
        raise UnknownForm(str(instruction))
    value, lane, clamp, members = (reader(text, "b32", instruction) for text in rest)

    def execute(unit, mask):
        _together(unit, mask, members(unit, mask), instruction)
        if (clamp(unit, mask) != 31)[mask].any():
            raise UnknownForm(f"a clamp other than 31: {instruction}")
        own, other = np.arange(unit.count), lane(unit, mask).astype(np.int64) & 31
        source = own ^ other if mode == "bfly" else (own & ~31) | other
        write(unit, target, value(unit, mask)[source], mask, instruction)

    return execute


def _reduce(entry, instruction):
    """redux.sync.add.s32: the sum over the warp, modulo 2^32, in every lane."""
    target, source, members = instruction.operands
    value, names = reader(source, "b32", instruction), reader(members, "b32", instruction)

    def execute(unit, mask):
        _together(unit, mask, names(unit, mask), instruction)
        total = value(unit, mask).reshape(-1, 32).sum(1, dtype=np.uint32)
        write(unit, target, np.repeat(total, 32), mask, instruction)

    return execute


def _warp_barrier(entry, instruction):
    members = reader(instruction.operands[0], "b32", instruction)
    return lambda unit, mask: _together(unit, mask, members(unit, mask), instruction)


_SPECIAL = [
    (r"mov\.(pred|[bu]32|[bu]64|b16|f32|f64)", _move),
    (r"ld\.param\.([bu]32|[bu]64|f32|f64)", _load_parameter),
    (r"ld\.(global|shared)(?:\.v([24]))?\.([bu]32|[bu]64|f32|f64|b16)", _load),
    (r"st\.(global|shared)(?:\.v([24]))?\.([bu]32|[bu]64|f32|f64|b16)", _store),
    (r"shfl\.sync\.(bfly|idx)\.b32", _shuffle),
    (r"redux\.sync\.add\.s32", _reduce),
    (r"bar\.warp\.sync", _warp_barrier),
]
