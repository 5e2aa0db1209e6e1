"""A yardstick for call overhead: a torch.library op with autograd that does next to nothing."""

from __future__ import annotations

import torch

from benchmarks.methods import Method

_LIBRARY = torch.library.Library("otkern_benchmarks", "DEF")
_LIBRARY.define("bare(Tensor x, Tensor y) -> Tensor")
_LIBRARY.define("bare_backward(Tensor dvalue, Tensor x, Tensor y) -> (Tensor, Tensor)")


def _bare(x, y):
    return x.new_zeros(len(x))


def _bare_backward(dvalue, x, y):
    return torch.zeros_like(x), torch.zeros_like(y)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("bare", _bare, _key)
    _LIBRARY.impl("bare_backward", _bare_backward, _key)

torch.library.register_autograd(
    "otkern_benchmarks::bare",
    lambda ctx, dvalue: torch.ops.otkern_benchmarks.bare_backward(dvalue, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)


class BareOp(Method):
    """``Library.define``, ``impl`` and ``register_autograd``, the backward an op of its own."""

    setting = "allocates its results and returns"
    linear = True

    def values(self, x, y):
        return torch.ops.otkern_benchmarks.bare(x, y)
