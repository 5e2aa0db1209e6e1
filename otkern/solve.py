"""The public functions: read the arguments into `Inputs`, call the op, wrap what it returns in an `OTResult`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otkern import backends, debiasing, ops, precision
from otkern.arguments import is_number, read_costs, read_points, read_potential, read_relaxation
from otkern.precision import Doubled, Solved
from otkern.problem import Inputs, cost_scale, item_sizes, item_sums, masses, row_mask
from otkern.result import OTResult

Integers = Tensor | Sequence[int]
Number = float | Tensor
REG_TYPES = ("KL", "entropy")
GRADS = ("envelope", "implicit", "unrolled", "detach")
UPDATES = ("alternating", "symmetric")


def solve(
    M: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    reg_type: str = "KL",
    lengths_a: Integers | None = None,
    lengths_b: Integers | None = None,
    unbalanced: Number | tuple[Number | None, Number | None] | None = None,
    mass: Number | None = None,
    null_cost: Number | None = None,
    max_iter: int = 100,
    tol: float | None = None,
    scaling: float | None = None,
    update: str = "alternating",
    overrelaxation: float | str | None = None,
    potentials_init: tuple[Tensor, Tensor] | None = None,
    grad: str = "envelope",
    implicit_tol: float | None = None,
    implicit_max_iter: int = 1000,
    backend: str | None = None,
    check: bool | None = None,
) -> OTResult:
    r"""Entropic optimal transport between weights ``a`` and ``b`` for given costs.

    Minimises :math:`\langle P, C\rangle + \varepsilon\,\mathrm{KL}(P \mid a\otimes b)` over plans with
    :math:`P\mathbf 1 = a`, :math:`P^\top\mathbf 1 = b` by Sinkhorn's iterations in the log domain (Cuturi 2013;
    Peyré and Cuturi 2019, section 4.4; equations (2) to (6) of ``docs/derivations.md``). At most one of ``unbalanced``,
    ``mass`` and ``null_cost`` relaxes the marginals (equations (12) to (17)).

    Args:
        M: the cost C, (N, M) or (B, N, M); float64, float32, bfloat16 or float16. ``+inf`` forbids a pair.
        a: weights of the rows, (N,) or (B, N), non-negative; None: uniform, 1 / length.
        b: weights of the columns, (M,) or (B, M), with the total mass of ``a``; None: uniform.
        reg: epsilon, in the unit of the cost, > 0; a number or a (B,) tensor.
        reg_type: ``"KL"`` (reference measure a ⊗ b) or ``"entropy"`` (ε Σ P log P, POT's convention); potentials and
            plan are those of ``"KL"`` in both cases, as the plan is the same. At a weight of 0 the entropy's own
            derivative, -inf, is left out of the gradient.
        lengths_a: (B,) integers, true number of rows of each item of a padded batch. What stands in the padding,
            NaN included, has no influence and gets a gradient of exactly 0. None: all N.
        lengths_b: (B,) integers, true number of columns.
        unbalanced: rho in ρ_a KL(P1 | a) + ρ_b KL(Pᵀ1 | b), which then stand in place of the constraints, in the unit
            of the cost, > 0: a number or a (B,) tensor for both sides, or a pair for one each. ``inf`` (or None in a
            pair) keeps that side balanced. Total masses may differ unless both sides are balanced.
        mass: total mass to move, a number or a (B,) tensor, > 0 and at most the smaller total of ``a`` and ``b``:
            the marginals are then at most ``a`` and ``b`` (partial transport).
        null_cost: price, in the unit of the cost, at which a point may stay unmatched: one more row of mass Σb and one
            more column of mass Σa, with this cost everywhere and 0 in their corner. A number or a (B,) tensor.
            ``plan``, potentials and marginals are those of the real points.
        max_iter: full iterations at most, and exactly that many without ``tol``; >= 1.
        tol: stop each problem by itself once the L1 gap between the plan's marginals and those that the potentials
            ask for, (a, b) in a balanced problem, is <= ``tol``.
            None: no stopping.
        scaling: in (0, 1): epsilon starts at the scale of the cost (the squared or plain diameter of the clouds'
            bounding box, the range of the other metrics, or the largest finite cost) and falls by this factor for
            each unit of length (its square for ``"sqeuclidean"``) until ``reg``, one iteration for each value. The
            last of ``max_iter`` is always done at ``reg``, and ``tol`` counts from there on.
        update: ``"alternating"``, f from g and then g from f; or ``"symmetric"``, both at once and averaged with those
            before, as GeomLoss does; the last iteration is alternating in both.
        overrelaxation: factor in [1, 2) by which each update goes beyond the plain one; ``"auto"``: plain iterations
            until the rate of convergence is known, then the factor that is best for it, less if errors rise. None: 1.
        potentials_init: warm start, a pair (f, g) of potentials in cost units. An iteration begins with f from g,
            so only g has an influence (``"symmetric"`` and ``overrelaxation`` included, where f follows from it first).
        grad: how results depend on M, a, b and tensors among ``reg``, ``unbalanced``, ``mass`` and ``null_cost``.
            ``"envelope"``: ``value`` as the dual objective at fixed potentials, everything else by implicit
            differentiation of the fixed point; ``"implicit"``: the value as well; ``"unrolled"``: everything by the
            exact derivative of the iterations that ran (only the potentials of each are kept); ``"detach"``: nothing
            is differentiable. The table in ``docs/gradients.md`` says what is exact when.
        implicit_tol: relative residual at which the linear solve of an implicit gradient stops; None: 1e-10 in
            float64, else 1e-5.
        implicit_max_iter: its iterations at most; on CPU a solve that ends far from its tolerance warns.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; None: the fastest that can run here.
        check: whether to check the values of the arguments, not only their shapes. Default: where that does not
            synchronise an accelerator, which is on CPU tensors.

    Returns:
        `OTResult`; unbatched costs give unbatched results. ``value`` is float64 for float64 costs, else float32.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: options that do not go together: ``mass`` with symmetric or over-relaxed updates.

    Note:
        An item's result is bitwise the same alone, in a batch, and from run to run.

    Example:
        >>> import torch, otkern
        >>> result = otkern.solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1)
        >>> result.plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    inputs, batched = read_costs(M, a, b, reg, lengths_a, lengths_b)
    relaxation = (unbalanced, mass, null_cost)
    schedule = (scaling, update, overrelaxation)
    how = (grad, implicit_tol, implicit_max_iter)
    call = read_call(
        inputs, batched, reg, reg_type, relaxation, max_iter, tol, schedule, potentials_init, how, backend, check
    )
    return run(call)


def solve_sample(
    X_a: Tensor,
    X_b: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "sqeuclidean",
    reg: float | Tensor,
    reg_type: str = "KL",
    lengths_a: Integers | None = None,
    lengths_b: Integers | None = None,
    cu_seqlens_a: Integers | None = None,
    cu_seqlens_b: Integers | None = None,
    max_seqlen_a: int | None = None,
    max_seqlen_b: int | None = None,
    unbalanced: Number | tuple[Number | None, Number | None] | None = None,
    mass: Number | None = None,
    null_cost: Number | None = None,
    max_iter: int = 100,
    tol: float | None = None,
    scaling: float | None = None,
    update: str = "alternating",
    overrelaxation: float | str | None = None,
    potentials_init: tuple[Tensor, Tensor] | None = None,
    grad: str = "envelope",
    implicit_tol: float | None = None,
    implicit_max_iter: int = 1000,
    debias: bool = False,
    backend: str | None = None,
    check: bool | None = None,
) -> OTResult:
    r"""Entropic optimal transport between point clouds; the cost is formed, and differentiated, inside the kernels.

    The objective and every argument not listed here are those of `solve`.

    Args:
        X_a: points (N, D), a padded batch (B, N, D), or a packed batch (sum of lengths, D) with ``cu_seqlens_a``;
            float64, float32, bfloat16 or float16.
        X_b: points (M, D), (B, M, D) or (sum of lengths, D); dtype and device of ``X_a``.
        a: weights of the points of ``X_a``: (N,), (B, N) or (sum of lengths,); None: uniform.
        b: weights of the points of ``X_b``.
        metric: the cost of a pair: ``"sqeuclidean"`` :math:`|x-y|^2`, ``"euclidean"`` :math:`|x-y|` (subgradient 0
            where points coincide), ``"cosine"`` :math:`1 - \langle x,y\rangle/(|x||y|)` (a zero vector has cost 1 and
            gradient 0), ``"dot"`` :math:`-\langle x,y\rangle`.
        cu_seqlens_a: (B + 1,) int32 offsets of the items in a packed ``X_a``, from 0 to its number of rows.
        cu_seqlens_b: (B + 1,) int32 offsets in ``X_b``.
        max_seqlen_a: the longest length in ``X_a`` as a host integer; None: read from ``cu_seqlens_a``, which on an
            accelerator costs one transfer to the host.
        max_seqlen_b: the longest length in ``X_b``.
        debias: take from the value what it is within each cloud, OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2, which makes
            it the Sinkhorn divergence (equation (22); see `sinkhorn_divergence`). The three problems are solved in
            one call; ``marginal_error``, ``n_iters`` and ``converged`` are the worst of them, while plan, potentials
            and ``value_linear`` are those between the clouds. Not with ``mass`` or ``null_cost``.

    Returns:
        `OTResult`, whose ``value`` is differentiable with respect to X_a, X_b, a, b and a tensor ``reg``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: options that do not go together: ``mass`` with symmetric or over-relaxed updates.

    Example:
        >>> import torch, otkern
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> otkern.solve_sample(x, torch.tensor([[0.0], [3.0]]), reg=0.5).value.backward()
        >>> x.grad[1].round(decimals=1)
        tensor([-2.])
    """
    inputs, batched = read_points(
        X_a, X_b, a, b, reg, metric, lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b, max_seqlen_a, max_seqlen_b
    )
    relaxation = (unbalanced, mass, null_cost)
    schedule = (scaling, update, overrelaxation)
    how = (grad, implicit_tol, implicit_max_iter)
    call = read_call(
        inputs, batched, reg, reg_type, relaxation, max_iter, tol, schedule, potentials_init, how, backend, check
    )
    return debiasing.run_debiased(call) if debias else run(call)


def solve_batch(
    M: Tensor, reg: float | Tensor, a: Tensor | None = None, b: Tensor | None = None, **options: Any
) -> OTResult:
    """`solve` for a batch of costs (B, N, M), in POT's order of arguments.

    Raises:
        ValueError: ``M`` is not a batch, or as `solve`.

    Example:
        >>> import torch, otkern
        >>> otkern.solve_batch(torch.ones(2, 3, 4), 0.1).value
        tensor([1., 1.])
    """
    if isinstance(M, Tensor) and M.dim() != 3:
        raise ValueError(f"M must have shape (B, N, M), but has shape {tuple(M.shape)}")
    return solve(M, a, b, reg=reg, **options)


def solve_sample_batch(
    X_a: Tensor,
    X_b: Tensor,
    reg: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    **options: Any,
) -> OTResult:
    """`solve_sample` for a batch of point clouds, padded (B, N, D) or packed, in POT's order of arguments.

    Raises:
        ValueError: ``X_a`` is not a batch, or as `solve_sample`.

    Example:
        >>> import torch, otkern
        >>> otkern.solve_sample_batch(torch.zeros(2, 1, 3), torch.ones(2, 1, 3), 0.1).value
        tensor([3., 3.])
    """
    if isinstance(X_a, Tensor) and X_a.dim() != 3 and options.get("cu_seqlens_a") is None:
        raise ValueError(f"X_a must have shape (B, N, D), or come with cu_seqlens_a, but has shape {tuple(X_a.shape)}")
    return solve_sample(X_a, X_b, a, b, reg=reg, **options)


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
        if not self.may_exceed or self.float64_fits:
            return error
        return torch.maximum(error, precision.rounding(self.inputs, potentials))

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
