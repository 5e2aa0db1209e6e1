"""One known answer per backend: ``python -m otkern.selftest``.

The problem, solved by hand. Two points on each side with weights 1/2, ``cost = [[0, 0], [0, h]]`` and
``h = 2 reg log 3``. The marginals leave one unknown, p: ``P = [[p, 1/2 - p], [1/2 - p, p]]``. Because
``P_ij = a_i b_j exp((f_i + g_j - cost_ij) / reg)``, the potentials cancel in

    P_11 P_22 / (P_12 P_21) = (p / (1/2 - p))^2 = exp(-h / reg) = 1/9,

so ``p / (1/2 - p) = 1/3`` and ``p = 1/8``. The value is

    <P, cost> + reg KL(P | a b) = p h + reg (2 p log(4 p) + 2 (1/2 - p) log(4 (1/2 - p)))
                                = reg (log(3)/4 - log(2)/4 + 3/4 log(3/2)) = reg log(3/2),

and by the envelope theorem its gradient with respect to the cost is P. With the metric ``"dot"`` the points
``x = (0, s)`` and ``y = (0, -s)`` with ``s^2 = h`` have this cost; their gradients are ``-P y = (3/8 s, 1/8 s)`` and
``-P^T x = (-3/8 s, -1/8 s)``.
"""

from __future__ import annotations

import math
import os
import sys

import torch

import otkern
from otkern.backends import BACKENDS, unavailable

REG = 0.5
VALUE = REG * math.log(3 / 2)
PLAN = ((1 / 8, 3 / 8), (3 / 8, 1 / 8))
# Half a unit in the sixth digit: single precision with room for the exponentials' own rounding.
TOLERANCE = 5e-6


def largest_error(backend: str, device: str) -> float:
    """The largest absolute error of value, plan and gradients on ``backend``, for the cost and for the points."""
    corner = 2 * REG * math.log(3)
    side = math.sqrt(corner)
    cost = torch.tensor([[0.0, 0.0], [0.0, corner]], device=device, requires_grad=True)
    x = torch.tensor([[0.0], [side]], device=device, requires_grad=True)
    y = torch.tensor([[0.0], [-side]], device=device, requires_grad=True)
    by_cost = otkern.solve(cost, reg=REG, max_iter=50, backend=backend)
    by_points = otkern.solve_sample(x, y, metric="dot", reg=REG, max_iter=50, backend=backend)
    dcost, dx, dy = torch.autograd.grad(by_cost.value + by_points.value, (cost, x, y))

    plan, value = torch.tensor(PLAN, device="cpu"), torch.tensor(VALUE, device="cpu")
    slope = torch.tensor([[3 / 8 * side], [1 / 8 * side]], device="cpu")
    pairs = [
        (by_cost.value, value),
        (by_cost.plan, plan),
        (dcost, plan),
        (by_points.value, value),
        (by_points.plan, plan),
        (dx, slope),
        (dy, -slope),
    ]
    # A NaN must not pass as a small error, and max() of Python would let it.
    errors = torch.stack([(got.detach().cpu() - wanted).abs().max() for got, wanted in pairs])
    return math.inf if errors.isnan().any() else errors.max().item()


def run() -> tuple[list[str], bool]:
    """One sentence per backend and device type, and whether every answer was right; an absent backend is not wrong."""
    sentences, right = [], True
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for backend in BACKENDS:
        reasons = {device: unavailable(backend, device) for device in devices}
        if all(reasons.values()):
            sentences.append(f"{backend}: absent, {reasons[devices[-1]]}.")
        for device in (device for device, reason in reasons.items() if reason is None):
            try:
                error = largest_error(backend, device)
            except Exception as problem:  # a backend that claims to run and raises has given a wrong answer
                sentences.append(f"{backend} on {device} tensors: WRONG, it raised {type(problem).__name__}: {problem}")
                right = False
                continue
            good = error <= TOLERANCE
            right = right and good
            sentences.append(
                f"{backend} on {device} tensors: {'right' if good else 'WRONG'}, value, plan and gradients of the "
                f"2x2 problem are within {error:.1e} of the answer by hand (at most {TOLERANCE:.0e} allowed)."
            )
    return sentences, right


def main() -> int:
    """Print the sentences; the exit status is 1 if an answer was wrong."""
    if not torch.cuda.is_available():
        # Triton reads this when it is first imported, which is later than here: its kernels then run on CPU tensors.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sentences, right = run()
    print("\n".join(sentences))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
