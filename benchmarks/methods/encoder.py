"""What a loss adds to a training step: a transformer encoder reads both sides of sentence pairs, forward and backward.

The encoder is random: its time does not depend on its weights. The points of the loss are its outputs, so that what is
verified is the value on those very outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.methods import Method
from benchmarks.methods.ours import Otkern
from benchmarks.methods.plain import KernelDomain
from benchmarks.problems import Answer


class Alone(Method):
    """The step without a loss on the points: encode both sides, mean square of the outputs, backward."""

    single: type[Method] | None = None
    linear = False  # the solver's value is <P, C>

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        layers, width = case.encoder
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(case.device, clouds.x.dtype)
        self.solver = None if self.single is None else self.single(case, clouds)
        self.setting = "" if self.solver is None else self.solver.setting

    def begin(self):
        x, y = self.model(self.clouds.x), self.model(self.clouds.y)
        loss = x.float().square().mean() + y.float().square().mean()
        value = x.new_zeros(self.case.batch, dtype=torch.float32)
        if self.solver is not None:
            self.encoded = self.clouds._replace(x=x.detach(), y=y.detach())
            self.solver.leaves = lambda: (x, y)
            value, _ = self.solver.begin()
            loss = loss + value.mean()

        def backward() -> Answer:
            loss.backward()
            self.model.zero_grad(set_to_none=True)
            return Answer(value.detach(), self.linear)

        return value, backward

    def solved(self):
        return self.encoded

    def truth(self):
        key, solve = self.solver.truth()
        # Two runs of an encoder round differently: everyone is judged on its own outputs.
        return f"{type(self).__name__} {key}", solve


class WithOtkern(Alone):
    """The step with `otkern.solve_sample`."""

    single = Otkern


class WithTorch(Alone):
    """The step with the dense kernel-domain loop, whose value is <P, C>."""

    single = KernelDomain
    linear = True
