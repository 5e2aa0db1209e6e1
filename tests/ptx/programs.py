"""Small PTX programs for the tests of single instruction forms."""

from __future__ import annotations

import numpy as np
import torch

from .machine import program_of, run_grid
from .parse import parse

_TEXT = """
.visible .entry probe(
	.param .u64 .ptr .global .align 1 probe_param_0,
	.param .u64 .ptr .global .align 1 probe_param_1
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<19>;
	ld.param.b64 	%rd11, [probe_param_0];
	ld.param.b64 	%rd12, [probe_param_1];
	mov.u32 	%r8, %tid.x;
	mul.wide.u32 	%rd13, %r8, 8;
	add.s64 	%rd14, %rd12, %rd13;
{body}
	ret;
}
"""


def run(body: str, inputs=(), threads: int = 32, shared: int = 64, order=None) -> np.ndarray:
    """Runs ``body``: %rd11 addresses the inputs as 64-bit words, %r8 is the thread, %rd14 its own 64-bit result."""
    source = torch.from_numpy(np.array([*inputs, 0], np.uint64).view(np.int64).copy())
    result = torch.full((threads,), -1, dtype=torch.int64)
    entry = parse(_TEXT.replace("{body}", body))
    parameters = np.array([source.data_ptr(), result.data_ptr()], np.uint64).tobytes()
    run_grid(entry, program_of(entry), (1, 1, 1), parameters, [source, result], threads, shared, order)
    return result.numpy().view(np.uint64)


_REGISTERS = {"pred": "%p", "16": "%rs", "32": "%r", "64": "%rd"}


def apply(opcode: str, sources, result: str, *values) -> int:
    """The bits that one instruction gives for operands given as bits, each loaded from memory."""
    width = {kind: _REGISTERS["pred" if kind == "pred" else kind[1:]] for kind in (*sources, result)}
    lines = []
    for at, kind in enumerate(sources):
        if kind == "pred":
            lines += [f"ld.global.b32 %r7, [%rd11+{8 * at}];", f"setp.ne.b32 %p{at}, %r7, 0;"]
        else:
            lines.append(f"ld.global.b{kind[1:]} {width[kind]}{at}, [%rd11+{8 * at}];")
    operands = ", ".join(f"{width[kind]}{at}" for at, kind in enumerate(sources))
    lines.append(f"{opcode} {width[result]}6, {operands};")
    if result == "pred":
        lines += ["selp.b32 %r6, 1, 0, %p6;"]
    size = "64" if width[result] == "%rd" else "32"
    lines.append(f"st.global.b{size} [%rd14], {_REGISTERS[size]}6;")
    out = run("\n".join(lines), values)
    assert len(set(out.tolist())) == 1
    return int(out[0]) & ((1 << int(size)) - 1)
