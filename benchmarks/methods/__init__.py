"""Who is measured. A method is a class whose instances solve one case; ``find`` takes its name in a suite.

A method computes in fp32 for 16-bit points, as otkern does: peers get the points converted, within their time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problems import Answer, Clouds, Solve, alternating

# Module of this folder and class.
METHODS = {
    "otkern": "ours:Otkern",
    "otkern again": "ours:Otkern",
    "otkern cuda": "ours:OtkernCuda",
    "otkern triton": "ours:OtkernTriton",
    "otkern three solves": "ours:OtkernThreeSolves",
    "torch kernel domain": "plain:KernelDomain",
    "torch logsumexp": "plain:LogDomain",
    "torch kernel domain compiled": "plain:CompiledKernelDomain",
    "torch logsumexp compiled": "plain:CompiledLogDomain",
    "torch cost and its backward": "plain:CostAlone",
    "torch three products": "plain:ThreeProducts",
    "bare op": "bare:BareOp",
    "POT solve_batch log": "pot:SolveBatchLog",
    "POT solve_batch kernel": "pot:SolveBatchKernel",
    "POT solve_sample_batch": "pot:SolveSampleBatch",
    "POT sinkhorn loop": "pot:SinkhornLoop",
    "POT sinkhorn_log loop": "pot:SinkhornLogLoop",
    "GeomLoss tensorized": "geom:Tensorized",
    "GeomLoss online": "geom:Online",
    "OTT-JAX log": "ott:LogDomain",
    "OTT-JAX kernel": "ott:KernelDomain",
    "OTT-JAX momentum": "ott:Momentum",
    "OTT-JAX online": "ott:Online",
    "flash-sinkhorn": "flash:FlashSinkhorn",
    "encoder alone": "encoder:Alone",
    "encoder alone again": "encoder:Alone",
    "with otkern": "encoder:WithOtkern",
    "with torch kernel domain": "encoder:WithTorch",
    "with GeomLoss": "geom:WithGeomLoss",
}

# The first of a pair is the second once more: their difference is the noise floor.
AGAIN = {"otkern again": "otkern", "encoder alone again": "encoder alone"}
OURS = ("otkern again", "otkern", "otkern cuda", "otkern triton", "otkern three solves", "with otkern")
# Yardsticks that compute no transport: never verified, never "the fastest peer".
YARDSTICKS = ("torch cost and its backward", "torch three products", "bare op", "encoder alone", "encoder alone again")


class Absent(Exception):
    """This method cannot do this case here, for the reason that the message gives."""


class Method:
    """One way to solve one case. ``values`` is the least that a subclass in torch defines; others define the rest.

    Attributes:
        setting: one phrase on how it runs, for the record.
        linear: its value is <P, C>, without the entropy.
        steps: what ``iterations_done`` returns unless it asks the package.
        gradient_slack: relative error of the gradients allowed in cases with a ``tol``, where it is larger than usual.
        debiases: it has the divergence of a debiased case, or says itself that it has not.
        exact_iterations: ``iterations_done`` is counted by the package and must be what was asked for.
    """

    setting = ""
    linear = False
    steps: int | None = None
    gradient_slack = 0.0
    debiases = False
    exact_iterations = False

    def __init__(self, case: Case, clouds: Clouds):
        self.case, self.clouds, self.reg = case, clouds, case.reg
        self.steps = case.iterations if case.tol is None else None

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        """The values (B,) of points, differentiable where the points ask for it."""
        raise NotImplementedError

    def begin(self) -> tuple[Tensor, Callable[[], Answer]]:
        """The differentiable forward, and the function that does the backward and returns the answer."""
        x, y = self.leaves()
        value = self.values(x, y)

        def backward() -> Answer:
            value.sum().backward()
            return Answer(value.detach(), self.linear, x.grad, y.grad)

        return value, backward

    def forward(self) -> Answer:
        """The values alone."""
        with torch.no_grad():
            return Answer(self.values(self.clouds.x, self.clouds.y), self.linear)

    def both(self) -> Answer:
        return self.begin()[1]()

    def potentials(self) -> tuple[Tensor, Tensor] | None:
        """(f, g) (B, N), (B, M) in cost units, P = a b exp((f + g - C) / reg), of the last call; not timed."""
        return None

    def tune(self, reaches: Callable[[], bool]) -> None:
        """For a case with ``tol``: choose the cheapest setting for which ``reaches()``; not timed."""

    def solved(self) -> Clouds:
        """The points whose transport the last call computed."""
        return self.clouds

    def truth(self) -> tuple[str, Solve]:
        """What this method should compute in a case of fixed iterations; methods with the same key share the answer."""
        return "alternating", alternating(self.case.iterations)

    def iterations_done(self) -> int | None:
        """Full iterations of the last call, where known; of a batch, the most."""
        return self.steps

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.clouds.x.detach().requires_grad_(), self.clouds.y.detach().requires_grad_()

    def computing(self, x: Tensor) -> Tensor:
        """Points in the dtype of the arithmetic."""
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class ThreeSolves(Method):
    """The Sinkhorn divergence by a method that has none: three solves, combined as its definition says."""

    def __init__(self, single: type[Method], case: Case, clouds: Clouds):
        super().__init__(case, clouds)
        self.solvers = [single(case, clouds.pair(*pair)) for pair in (("x", "y"), ("x", "x"), ("y", "y"))]
        self.setting = "; ".join(part for part in (self.solvers[0].setting, "divergence by three solves") if part)

    def _combine(self, xy: Answer, xx: Answer, yy: Answer) -> Answer:
        value = xy.value - (xx.value + yy.value) / 2
        if xy.dx is None or xx.dx is None or yy.dx is None:
            return Answer(value, xy.linear)
        return Answer(value, xy.linear, xy.dx - (xx.dx + xx.dy) / 2, xy.dy - (yy.dx + yy.dy) / 2)

    def forward(self) -> Answer:
        return self._combine(*(solver.forward() for solver in self.solvers))

    def both(self) -> Answer:
        return self._combine(*(solver.both() for solver in self.solvers))

    def begin(self):
        begun = [solver.begin() for solver in self.solvers]
        return begun[0][0], lambda: self._combine(*(backward() for _, backward in begun))


def find(name: str, candidates: dict[str, str] | None = None) -> type[Method]:
    """The class of a method, imported with its package; ``candidates`` are further ones, "module:Class" by name.

    Raises:
        Absent: its package is not installed.
    """
    path = (candidates or {}).get(name) or f"benchmarks.methods.{METHODS[name]}"
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise Absent(f"not installed: {error}") from error


def make(found: type[Method], case: Case, clouds: Clouds) -> Method:
    """A method ready to solve the case: the divergence by three solves where the method has none.

    Raises:
        Absent: it cannot do this case, and why.
    """
    if case.debias and not found.debiases:
        return ThreeSolves(found, case, clouds)
    return found(case, clouds)
