"""The exact derivative of the iterations that ran, from the history of the potentials."""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import Inputs, Schedule

from .forward import State, iterate, iteration, results, self_iteration, with_null
from .items import Item, items
from .plan_backward import points_backward
from .relaxation import sides


def unrolled(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: Schedule | None,
    df: Tensor,
    dg: Tensor,
    dmultipliers: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients (x_a, x_b, cost, a, b, reg, relaxation) of <df, f> + <dg, g> + <dmultipliers, multipliers>.

    The iterations are done again and their potentials kept; going back, one iteration at a time is differentiated, so
    that memory holds n + m numbers an iteration and a few matrices. None where an input is None.
    """
    tensors = (inputs.x_a, inputs.x_b, inputs.cost, inputs.a, inputs.b, inputs.reg, inputs.relaxation)
    grads = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]
    dx_a, dx_b, dcost, da, db, dreg, drelaxation = grads
    with torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            start = torch.zeros_like(item.b) if g_init is None else g_init[item.columns].clone()
            cotangents = df[item.rows], dg[item.columns], dmultipliers[item.index]
            of_cost, of_a, of_b, of_reg, of_relaxation = _item_gradients(
                item, start, max_iter, tol, schedule or Schedule(), cotangents
            )
            if dcost is not None:
                dcost[(item.index, item.rows[-1], item.columns[-1])] = of_cost.to(dcost.dtype)
            else:
                dx, dy = points_backward(item, of_cost, inputs.metric)
                dx_a[item.rows], dx_b[item.columns] = dx.to(dx_a.dtype), dy.to(dx_b.dtype)
            if da is not None:
                da[item.rows] = of_a
            if db is not None:
                db[item.columns] = of_b
            dreg[item.index] = of_reg
            if drelaxation is not None:
                drelaxation[item.index] = of_relaxation
    return dx_a, dx_b, dcost, da, db, dreg, drelaxation


def _item_gradients(item: Item, start: Tensor, max_iter: int, tol: float, schedule: Schedule, cotangents):
    """Gradients of one item's cost, weights, reg and relaxation."""
    relaxation = torch.zeros_like(item.reg).expand(2) if item.relaxation is None else item.relaxation
    leaves = [t.detach().requires_grad_() for t in (item.cost, item.a, item.b, item.reg, relaxation)]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    if item.cost.numel() == 0 and item.kind != "null":
        return totals
    if not any(bool(cotangent.any()) for cotangent in cotangents):
        return totals  # also where the iterations overflow

    def problem() -> Item:
        """The item as a function of the leaves; enlarged anew for each graph."""
        cost, a, b, reg, relax = leaves
        made = item._replace(cost=cost, a=a, b=b, reg=reg, relaxation=None if item.relaxation is None else relax)
        return with_null(made) if item.kind == "null" else made

    with torch.no_grad():
        enlarged = problem()
        g = torch.cat([start, start.new_zeros(1)]) if item.kind == "null" else start
        history, _ = iterate(enlarged, g, max_iter, tol, schedule)

    def back(outputs, state_leaves, cotangents):
        """Add to the totals; the cotangents of the state."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], [*leaves, *state_leaves], [c for _, c in pairs], allow_unused=True
        )
        for total, grad in zip(totals, grads, strict=False):
            if grad is not None:
                total += grad
        return [
            torch.zeros_like(s) if g is None else g for s, g in zip(state_leaves, grads[len(leaves) :], strict=True)
        ]

    with torch.enable_grad():
        state, state_leaves = _leaves(history[-1].after)
        _, f, g, multipliers = results(problem(), state, False)
        if item.kind == "null":
            df, dg, dm = cotangents
            cotangents = (torch.cat([df, dm[:1]]), torch.cat([dg, dm[1:]]), torch.zeros_like(dm))
        state_cotangents = back((f, g, multipliers), state_leaves, cotangents)
        for k in range(len(history) - 1, 0, -1):
            step = history[k]
            state, state_leaves = _leaves(history[k - 1].after)
            made = problem()
            eps = made.reg if bool(step.eps == item.reg) else step.eps
            if item.same:
                after = self_iteration(made, sides(made)[0], state, eps)
            else:
                symmetric = schedule.update == "symmetric" and not step.last
                after = iteration(made, *sides(made), state, eps, symmetric, step.factor, k - 1)
            state_cotangents = back((after.f, after.g, after.mass_multiplier), state_leaves, state_cotangents)
    return totals


def _leaves(state: State) -> tuple[State, list[Tensor]]:
    """The state before an iteration as leaves of a new graph; its ratio of the columns enters nothing."""
    leaves = [t.detach().requires_grad_() for t in (state.f, state.g, state.mass_multiplier)]
    return State(*leaves, state.column_ratio), leaves
