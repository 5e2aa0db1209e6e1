"""Instruction forms against values worked out by hand, one fault of each kind, and a witness of Triton's own.

The values are not yet checked against the PTX ISA manual, section by section.
"""

import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .instructions import FORMS
from .memory import Fault
from .parse import UnknownForm
from .programs import apply, run


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f64(value: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", value))[0]


NAN, INF, TINY = float("nan"), float("inf"), 2.0**-140
NEGATIVE = 0xFFFFFFFF  # -1
VALUES = [
    ("add.s32", (0x7FFFFFFF, 1), 0x80000000),
    ("mul.wide.s32", (NEGATIVE, 3), 2**64 - 3),
    ("mul.wide.u32", (NEGATIVE, 3), 3 * NEGATIVE),
    ("mul.lo.s64", (2**63, 3), 2**63),
    ("mad.wide.s32", (NEGATIVE, 4, 10), 6),
    ("max.s32", (NEGATIVE, 2), 2),
    ("min.s32", (NEGATIVE, 2), NEGATIVE),
    ("bfe.u32", (0xABCD1234, 8, 4), 2),
    ("bfe.s32", (0x20, 5, 1), NEGATIVE),
    ("add.f32", (f32(1.0), f32(2.0**-24)), f32(1.0)),
    ("fma.rn.f32", (f32(1 + 2.0**-12), f32(1 + 2.0**-12), f32(-1.0)), f32(2.0**-11 + 2.0**-24)),
    ("fma.rn.ftz.f32", (f32(TINY), f32(1.0), f32(-0.0)), f32(0.0)),
    ("fma.rn.f64", (f64(1 + 2.0**-30), f64(1 - 2.0**-30), f64(-1.0)), f64(-(2.0**-60))),
    ("fma.rn.f64", (f64(2.0**600), f64(2.0**600), f64(-INF)), f64(-INF)),
    ("fma.rn.f64", (f64(2.0**-600), f64(2.0**-600), f64(1.0)), f64(1.0)),
    ("div.full.f32", (f32(1.0), f32(4.0)), f32(0.25)),
    ("abs.ftz.f32", (f32(-TINY),), 0),
    ("neg.f64", (f64(0.0),), f64(-0.0)),
    ("min.f32", (f32(NAN), f32(2.0)), f32(2.0)),
    ("min.f32", (f32(0.0), f32(-0.0)), f32(-0.0)),
    ("max.f32", (f32(-0.0), f32(0.0)), 0),
    ("max.f64", (f64(-INF), f64(NAN)), f64(-INF)),
    ("rcp.approx.ftz.f64", (f64(3.0),), f64(1 / 3) & ~NEGATIVE),
    ("sqrt.approx.ftz.f32", (f32(TINY),), 0),
    ("ex2.approx.ftz.f32", (f32(-3.0),), f32(0.125)),
    ("ex2.approx.ftz.f32", (f32(-INF),), 0),
    ("setp.lt.s32", (NEGATIVE, 0), 1),
    ("setp.lt.u32", (NEGATIVE, 0), 0),
    ("setp.ne.f32", (f32(NAN), f32(1.0)), 0),
    ("setp.neu.f32", (f32(NAN), f32(1.0)), 1),
    ("setp.nan.f64", (f64(1.0), f64(NAN)), 1),
    ("selp.f32", (f32(1.0), f32(2.0), 0), f32(2.0)),
    ("shl.b32", (1, 32), 0),
    ("shr.s32", (0x80000000, 40), NEGATIVE),
    ("shr.u32", (0x80000000, 32), 0),
    ("cvt.u64.u32", (NEGATIVE,), NEGATIVE),
    ("cvt.s64.s32", (NEGATIVE,), 2**64 - 1),
    ("cvt.rn.f32.s32", (0x7FFFFFFF,), f32(2.0**31)),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "operands", "expected"), VALUES)
def test_a_form_gives_what_was_worked_out_by_hand(opcode, operands, expected):
    sources, result, _ = FORMS[opcode]
    assert apply(opcode, sources, result, *operands) == expected


def test_fma_rounds_once():
    tie = (f32(2.0**-24), f32(1 + 2.0**-23), f32(1.0))
    assert apply("fma.rn.f32", ("f32",) * 3, "f32", *tie) == f32(1 + 2.0**-23)
    tiny = (f32(2.0**-12 * (1 + 2.0**-23)), f32(2.0**-12 * (1 - 2.0**-23)), f32(1 + 2.0**-23))
    # 1 + 2^-23 + 2^-24 - 2^-70: below the middle; in float64 it is the middle, and would round to the even 1 + 2^-22.
    assert apply("fma.rn.f32", ("f32",) * 3, "f32", *tiny) == f32(1 + 2.0**-23)


def test_words_are_packed_low_first():
    body = "mov.b32 %r0, 1;\nmov.b32 %r1, 2;\nmov.b64 %rd0, {%r0, %r1};\nst.global.b64 [%rd14], %rd0;"
    assert (run(body) == 1 + (2 << 32)).all()
    assert (
        run("mov.b64 %rd0, 8589934593;\nmov.b64 {_, %r0}, %rd0;\ncvt.u64.u32 %rd1, %r0;\nst.global.b64 [%rd14], %rd1;")
        == 2
    ).all()


def test_a_butterfly_shuffle_exchanges_lanes():
    body = "shfl.sync.bfly.b32 %r0, %r8, 5, 31, -1;\ncvt.u64.u32 %rd0, %r0;\nst.global.b64 [%rd14], %rd0;"
    assert run(body).tolist() == [lane ^ 5 for lane in range(32)]


def test_redux_sums_each_warp():
    body = "redux.sync.add.s32 %r0, %r8, -1;\ncvt.u64.u32 %rd0, %r0;\nst.global.b64 [%rd14], %rd0;"
    assert run(body, threads=64).tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


LOOP = """
mov.b32 %r0, 0;
$L_head:
add.s32 %r0, %r0, 1;
setp.lt.u32 %p0, %r0, %r8;
@%p0 bra $L_head;
shfl.sync.bfly.b32 %r1, %r0, 0, 31, -1;
cvt.u64.u32 %rd0, %r1;
st.global.b64 [%rd14], %rd0;
"""


def test_lanes_leave_a_loop_apart_and_meet_behind_it():
    assert run(LOOP).tolist() == [max(lane, 1) for lane in range(32)]


EXCHANGE = """
shl.b32 %r0, %r8, 2;
mov.b32 %r1, global_smem;
add.s32 %r2, %r1, %r0;
st.shared.b32 [%r2], %r8;
{barrier}
xor.b32 %r3, %r8, 32;
shl.b32 %r3, %r3, 2;
add.s32 %r3, %r1, %r3;
ld.shared.b32 %r4, [%r3];
cvt.u64.u32 %rd0, %r4;
st.global.b64 [%rd14], %rd0;
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_warps_meet_at_a_barrier_and_a_missing_one_shows(seed):
    def exchange(barrier):
        order = None if seed is None else np.random.default_rng(seed)
        return run(EXCHANGE.replace("{barrier}", barrier), threads=64, shared=256, order=order).tolist()

    expected = [lane ^ 32 for lane in range(64)]
    assert exchange("bar.sync 0;") == expected
    if seed is not None:
        assert exchange("") != expected  # the first warp reads what shared memory was filled with


FAULTS = [
    ("register %r1 is read before it is written", "add.s32 %r0, %r1, 1;"),
    ("outside of", "ld.global.b64 %rd0, [%rd11+4096];"),
    ("outside of", "mov.b32 %r0, global_smem;\nst.shared.b32 [%r0+64], %r8;"),
    ("not a multiple of 16", "mov.b32 %r0, global_smem;\nst.shared.v4.b32 [%r0+4], {%r8, %r8, %r8, %r8};"),
    ("arrive apart", "setp.lt.u32 %p0, %r8, 7;\n@%p0 bra $L_on;\nbar.warp.sync -1;\n$L_on:"),
    ("different barriers", "setp.lt.u32 %p0, %r8, 7;\n@%p0 bra $L_on;\nbar.sync 0;\n$L_on:"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "body"), FAULTS)
def test_what_hardware_leaves_undefined_is_a_fault(message, body):
    with pytest.raises(Fault, match=message):
        run(body)


@pytest.mark.parametrize(
    "body", ["add.sat.s32 %r0, %r8, 1;", "ld.volatile.shared.b32 %r0, [%r8];", "add.s32 %r0, %rd11, 1;"]
)
def test_an_unknown_form_is_an_error(body):
    with pytest.raises(UnknownForm):
        run(body)


@triton.jit
def sums_kernel(x_ptr, row_ptr, column_ptr, n, N: tl.constexpr, M: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, M)
    x = tl.load(x_ptr + i[:, None] * n + j[None, :], mask=j[None, :] < n, other=0.0)
    tl.store(row_ptr + i, tl.sum(x, 1))
    tl.store(column_ptr + j, tl.max(tl.where(j[None, :] < n, x, float("-inf")), 0), mask=j < n)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_of_a_triton_kernel(dtype, warps, device):
    x = torch.randn(32, 13, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows, columns = x.new_empty(32), x.new_empty(13)
    sums_kernel[(1,)](x, rows, columns, 13, N=32, M=16, num_warps=warps)
    np.testing.assert_allclose(rows, x.numpy().sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns, x.numpy().max(0))
