"""A call of the public solvers: its options read and checked, its op called, its result wrapped."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otkern import backends, ops, precision
from otkern.arguments import is_number, read_potential, read_relaxation
from otkern.precision import Doubled, Solved
from otkern.problem import Inputs, cost_scale, item_sizes, item_sums, masses, row_mask
from otkern.result import OTResult

REG_TYPES = ("KL", "entropy")
UPDATES = ("alternating", "symmetric")
GRADS = ("envelope", "implicit", "unrolled", "detach")


class Call(NamedTuple):
    """A call of the public functions, read and ready to run."""

    inputs: Inputs
    batched: bool
    reg_type: str
    iterations: ops.Iterations
    differentiation: ops.Differentiation
    tol: float | None
    backend: str
    check: bool
    may_exceed: bool  # whether potentials may pass what float32 holds, see `otkern.precision`

    @property
    def float64_fits(self) -> bool:
        """Whether the backend takes problems of this size in float64."""
        inputs = self.inputs
        return backends.holds_float64(self.backend, inputs.device, max(inputs.max_a, inputs.max_b))

    def error_with_rounding(self, error: Tensor, potentials: list[tuple[bool, Tensor]]) -> Tensor:
        """The marginal error, where it cannot be made small in float64: at least what rounded potentials leave."""
        if self.inputs.compute_dtype == torch.float32 and (not self.may_exceed or self.float64_fits):
            return error
        rounding = precision.rounding(self.inputs, potentials)
        return error if rounding is None else torch.maximum(error, rounding)

    def in_float64(self, value: Tensor, potentials: list[tuple[bool, Tensor]]) -> tuple[Doubled, Call] | None:
        """The items whose potentials in float32, given here, lack digits, and the call that solves them in float64."""
        fits = self.may_exceed and self.float64_fits
        doubled = precision.doubled(self.inputs, value, potentials) if fits else None
        if doubled is None:
            return None
        problem, iterations = doubled.problem(), self.iterations
        iterations = iterations._replace(
            g_init=doubled.rows(False, iterations.g_init), eps_start=doubled.per_item(iterations.eps_start)
        )
        differentiation = self.differentiation
        if differentiation.iterations is not None:
            differentiation = differentiation._replace(iterations=iterations)
        call = self._replace(
            inputs=problem,
            batched=True,
            iterations=iterations,
            differentiation=differentiation,
            tol=None,  # the whole batch's result warns
            check=False,
            may_exceed=False,
        )
        return doubled, call


def read_call(
    inputs: Inputs,
    batched: bool,
    reg: float | Tensor,
    reg_type: str,
    relaxation: tuple,
    max_iter: int,
    tol: float | None,
    schedule: tuple,
    potentials_init: tuple[Tensor, Tensor] | None,
    how: tuple,
    backend: str | None,
    check: bool | None,
) -> Call:
    """Check the options that all public functions share, and choose the backend."""
    # In any case of letters, as POT takes it.
    reg_type = {name.lower(): name for name in REG_TYPES}.get(str(reg_type).lower(), reg_type)
    if reg_type not in REG_TYPES:
        raise ValueError(f"reg_type must be one of {', '.join(REG_TYPES)}, but was {reg_type!r}")
    unbalanced, mass, null_cost = relaxation
    inputs = read_relaxation(inputs, unbalanced, mass, null_cost, entropy=reg_type == "entropy")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be an integer of at least 1, but was {max_iter!r}")
    if tol is not None and not (is_number(tol) and 0 <= tol < math.inf):
        raise ValueError(f"tol must be None or a finite number of at least 0, but was {tol!r}")
    if check is not None and not isinstance(check, bool):
        raise ValueError(f"check must be None or a bool, but was {check!r}")
    refuse_forward_mode(inputs)
    differentiation = _read_differentiation(*how)
    if differentiation.grad == "detach":
        inputs = inputs.detach()
    g_init = _read_warm_start(potentials_init, inputs, batched)
    iterations = _read_iterations(inputs, g_init, max_iter, tol, *schedule)
    backend = backends.choose(
        backend,
        inputs.device.type,
        iterations.update,
        iterations.overrelaxation,
        differentiation.grad,
        backends.size_of(inputs.device, inputs.primary.dtype, max(inputs.max_a, inputs.max_b)),
    )
    if differentiation.grad == "unrolled":
        differentiation = differentiation._replace(iterations=iterations)
    check = inputs.device.type == "cpu" if check is None else check
    may_exceed = precision.may_exceed(inputs, reg)
    return Call(inputs, batched, reg_type, iterations, differentiation, tol, backend, check, may_exceed)


def run(call: Call) -> OTResult:
    """Call the op and wrap what it returns."""
    inputs, backend = call.inputs, call.backend
    value, f, g, multipliers, marginal_error, n_iters = ops.sinkhorn(
        inputs, call.iterations, call.differentiation, call.check, backend
    )
    potentials = [(True, f), (False, g)]
    marginal_error = call.error_with_rounding(marginal_error, potentials)
    again = call.in_float64(value, potentials)
    if again is not None:
        f = precision.without_plan(inputs, f, again[0].wide)
    # Where entropy and KL regularise to the same plan, their values differ by this.
    constant = _entropy_of_weights(inputs) if call.reg_type == "entropy" and not inputs.entropy else None
    return OTResult(
        inputs=inputs,
        value=value,
        f=f,
        g=g,
        multipliers=multipliers,
        marginal_error=marginal_error,
        n_iters=n_iters,
        tol=call.tol,
        batched=call.batched,
        backend=backend,
        differentiation=call.differentiation,
        constant=constant,
        in_float64=None if again is None else Solved(again[0], run(again[1])),
    )


def _read_iterations(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float | None,
    scaling: float | None,
    update: str,
    overrelaxation: float | str | None,
) -> ops.Iterations:
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)}, but was {update!r}")
    factor = _read_overrelaxation(overrelaxation)
    if update == "symmetric" and factor != 1:
        raise ValueError(f"overrelaxation must be None with update='symmetric', but was {overrelaxation!r}")
    if inputs.kind == "partial" and (update == "symmetric" or factor != 1):
        name = "update" if update == "symmetric" else "overrelaxation"
        raise NotImplementedError(f"{name}: problems with a given mass take alternating, plain updates only")
    tol = -1.0 if tol is None else tol
    if scaling is None:
        return ops.Iterations(g_init, None, max_iter, tol, 1.0, update, factor)
    if not is_number(scaling) or not 0 < scaling < 1:
        raise ValueError(f"scaling must be None or a number between 0 and 1, but was {scaling!r}")
    power = 2 if inputs.metric == "sqeuclidean" else 1
    return ops.Iterations(g_init, cost_scale(inputs.detach()), max_iter, tol, scaling**power, update, factor)


def _read_overrelaxation(overrelaxation: float | str | None) -> float:
    """The factor; 0 for "auto"."""
    if overrelaxation is None:
        return 1.0
    if overrelaxation == "auto":
        return 0.0
    if isinstance(overrelaxation, str) or not is_number(overrelaxation) or not 1 <= overrelaxation < 2:
        raise ValueError(f"overrelaxation must be None, 'auto' or a number in [1, 2), but was {overrelaxation!r}")
    return overrelaxation


def _read_differentiation(grad: str, implicit_tol: float | None, implicit_max_iter: int) -> ops.Differentiation:
    if grad not in GRADS:
        raise ValueError(f"grad must be one of {', '.join(GRADS)}, but was {grad!r}")
    if implicit_tol is not None and not (is_number(implicit_tol) and 0 < implicit_tol < 1):
        raise ValueError(f"implicit_tol must be None or a number between 0 and 1, but was {implicit_tol!r}")
    if isinstance(implicit_max_iter, bool) or not isinstance(implicit_max_iter, int) or implicit_max_iter < 1:
        raise ValueError(f"implicit_max_iter must be an integer of at least 1, but was {implicit_max_iter!r}")
    return ops.Differentiation(grad, implicit_tol, implicit_max_iter)


def _read_warm_start(potentials_init: tuple[Tensor, Tensor] | None, inputs: Inputs, batched: bool) -> Tensor | None:
    if potentials_init is None:
        return None
    if not isinstance(potentials_init, (tuple, list)) or len(potentials_init) != 2:
        got = type(potentials_init).__name__
        got += f" of length {len(potentials_init)}" if isinstance(potentials_init, (tuple, list)) else ""
        raise ValueError(f"potentials_init must be a pair (f, g), but was a {got}")
    read_potential("potentials_init[0]", potentials_init[0], inputs.shape_f, inputs, batched)
    return read_potential("potentials_init[1]", potentials_init[1], inputs.shape_g, inputs, batched)


def _entropy_of_weights(inputs: Inputs) -> Tensor:
    """What ``reg_type="entropy"`` adds to the value: ε (Σ a log a + Σ b log b + m - Σa Σb), equation (11); (B,)."""
    total = torch.zeros_like(inputs.reg)
    mass_a, mass_b = masses(inputs, True), masses(inputs, False)
    for side_a, weights in ((True, inputs.a), (False, inputs.b)):
        if weights is None:
            total = total - item_sizes(inputs, side_a).clamp(min=1).to(total.dtype).log()
        else:
            # 0 log 0 = 0. Its derivative, -inf, is left out: normalised weights would carry it on as NaN.
            inside = torch.where(row_mask(inputs, side_a) & (weights > 0), weights, 1)
            total = total - item_sums(inputs, side_a, torch.special.entr(inside))
    if inputs.kind == "null":
        # the null points' own weights, equation (17)
        for mass in (mass_a, mass_b):
            total = total - torch.special.entr(torch.where(mass > 0, mass, 1))
        mass_a = mass_b = mass_a + mass_b
    return inputs.reg * (total + (mass_a + mass_b) / 2 - mass_a * mass_b)


def refuse_forward_mode(inputs: Inputs) -> None:
    """Raise `NotImplementedError` where a tensor carries a tangent."""
    # A custom op would drop the tangent without a word. Outside forward mode this costs one comparison.
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in (inputs.x_a, inputs.x_b, inputs.cost, inputs.a, inputs.b, inputs.reg, inputs.relaxation):
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "forward-mode derivatives of an entropic OT problem are not supported; use reverse mode"
            )
