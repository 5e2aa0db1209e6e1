"""The public functions: read the arguments into `Inputs`, call the op, wrap what it returns in an `OTResult`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from otkern import debiasing
from otkern.arguments import read_costs, read_points
from otkern.calls import read_call, run
from otkern.pot_words import read_pot_words
from otkern.result import OTResult

Integers = Tensor | Sequence[int]
Number = float | Tensor


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
    """`solve` for a batch of costs, in POT's order of arguments; its defaults are those of `solve`, not POT's.

    POT's ``ot.solve_batch`` regularises by the entropy: its numbers come with ``reg_type="entropy"``. Also taken are
    POT's words ``method`` ("auto", "sinkhorn", "log_sinkhorn"), ``unbalanced_type`` ("kl") and ``verbose``, which
    change nothing.

    Raises:
        ValueError: ``M`` is not a batch, or as `solve`.

    Example:
        >>> import torch, otkern
        >>> otkern.solve_batch(torch.ones(2, 3, 4), 0.1).value
        tensor([1., 1.])
    """
    if isinstance(M, Tensor) and M.dim() != 3:
        raise ValueError(f"M must have shape (B, N, M), but has shape {tuple(M.shape)}")
    return solve(M, a, b, reg=reg, **read_pot_words(options))


def solve_sample_batch(
    X_a: Tensor,
    X_b: Tensor,
    reg: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    **options: Any,
) -> OTResult:
    """`solve_sample` for a batch, in POT's order of arguments; its defaults are those of `solve_sample`, not POT's.

    POT's ``ot.solve_sample_batch`` regularises by the entropy: its numbers come with ``reg_type="entropy"``. A batch is
    padded (B, N, D) or packed. POT's words ``method``, ``unbalanced_type`` and ``verbose`` are read as by
    `solve_batch`.

    Raises:
        ValueError: ``X_a`` is not a batch, or as `solve_sample`.

    Example:
        >>> import torch, otkern
        >>> otkern.solve_sample_batch(torch.zeros(2, 1, 3), torch.ones(2, 1, 3), 0.1).value
        tensor([3., 3.])
    """
    if isinstance(X_a, Tensor) and X_a.dim() != 3 and options.get("cu_seqlens_a") is None:
        raise ValueError(f"X_a must have shape (B, N, D), or come with cu_seqlens_a, but has shape {tuple(X_a.shape)}")
    return solve_sample(X_a, X_b, a, b, reg=reg, **read_pot_words(options))
