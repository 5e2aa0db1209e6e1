"""The definition of the op, in plain PyTorch, for every dtype and device.

Equation numbers refer to ``docs/derivations.md``. Every other backend is tested against this one, in fp64.

    items.py          one problem at its true size, and its cost
    relaxation.py     what one side's marginal constraint does to an update and to the dual objective
    forward.py        the iterations
    plan_backward.py  everything that needs the plan: gradients and products
    implicit.py       the adjoint of the fixed point
    unrolled.py       the adjoint of the iterations that ran
    symmetric.py      the annealed loop of GeomLoss
"""

from __future__ import annotations

from otkern.problem import Inputs, Schedule

from .forward import forward
from .implicit import implicit
from .plan_backward import apply, backward, plan, plan_backward
from .symmetric import symmetric
from .unrolled import unrolled

__all__ = [
    "apply",
    "backward",
    "can_run",
    "forward",
    "implicit",
    "plan",
    "plan_backward",
    "regime",
    "symmetric",
    "unrolled",
]


def can_run(inputs: Inputs, schedule: Schedule | None = None) -> str | None:
    """None: the reference serves every call."""
    return None


def regime(inputs: Inputs, schedule: Schedule | None) -> str:
    """What is done with problems of this size, in a sentence."""
    return "item by item in torch, in the log domain, each cost held whole"
