"""The public functions: read the arguments into `Inputs`, call the op, wrap what it returns in an `OTResult`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otkern import backends, ops
from otkern.problem import Inputs, item_sizes, item_sums, masses, read_costs, read_points, read_potential, row_mask
from otkern.result import OTResult

Integers = Tensor | Sequence[int]
REG_TYPES = ("KL", "entropy")
GRADS = ("envelope", "detach")

# Options of the interface that this release does not serve, and what each would be.
_LATER = {
    "unbalanced": "unbalanced transport (KL-relaxed marginals)",
    "mass": "partial transport of a fixed mass",
    "null_cost": "a null row and column",
    "scaling": "an epsilon schedule",
}


def solve(
    M: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    reg_type: str = "KL",
    lengths_a: Integers | None = None,
    lengths_b: Integers | None = None,
    unbalanced: None = None,
    mass: None = None,
    null_cost: None = None,
    max_iter: int = 100,
    tol: float | None = None,
    scaling: float | None = None,
    update: str = "alternating",
    potentials_init: tuple[Tensor, Tensor] | None = None,
    grad: str = "envelope",
    backend: str | None = None,
    check: bool | None = None,
) -> OTResult:
    r"""Entropic optimal transport between weights ``a`` and ``b`` for given costs.

    Minimises :math:`\langle P, C\rangle + \varepsilon\,\mathrm{KL}(P \mid a\otimes b)` over plans with
    :math:`P\mathbf 1 = a`, :math:`P^\top\mathbf 1 = b` by Sinkhorn's iterations in the log domain (Cuturi 2013;
    Peyré and Cuturi 2019, section 4.4; equations (2) to (6) of ``docs/derivations.md``).

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
        unbalanced: not in this release; must be None.
        mass: not in this release; must be None.
        null_cost: not in this release; must be None.
        max_iter: full iterations at most, and exactly that many without ``tol``; >= 1.
        tol: stop each problem by itself once the L1 gap between the plan's marginals and (a, b) is <= ``tol``.
            None: no stopping.
        scaling: not in this release; must be None.
        update: ``"alternating"``; ``"symmetric"`` is not in this release.
        potentials_init: warm start, a pair (f, g) of potentials in cost units. An iteration begins with f from g,
            so only g has an influence.
        grad: ``"envelope"``: ``value`` is differentiable with respect to M, a, b and a tensor ``reg``, as the dual
            objective at fixed potentials; ``"detach"``: nothing is. ``"implicit"`` and ``"unrolled"`` are not in this
            release.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; None: the fastest that can run here.
        check: whether to check the values of the arguments, not only their shapes. Default: where that does not
            synchronise an accelerator, which is on CPU tensors.

    Returns:
        `OTResult`; unbatched costs give unbatched results. ``value`` is float64 for float64 costs, else float32.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: an option of a later release.

    Note:
        An item's result is bitwise the same alone, in a batch, and from run to run.

    Example:
        >>> import torch, otkern
        >>> result = otkern.solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1)
        >>> result.plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    _refuse_later(unbalanced=unbalanced, mass=mass, null_cost=null_cost, scaling=scaling, update=update, grad=grad)
    inputs, batched = read_costs(M, a, b, reg, lengths_a, lengths_b)
    return _solve(inputs, batched, reg_type, max_iter, tol, potentials_init, grad, backend, check)


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
    unbalanced: None = None,
    mass: None = None,
    null_cost: None = None,
    max_iter: int = 100,
    tol: float | None = None,
    scaling: float | None = None,
    update: str = "alternating",
    potentials_init: tuple[Tensor, Tensor] | None = None,
    grad: str = "envelope",
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

    Returns:
        `OTResult`, whose ``value`` is differentiable with respect to X_a, X_b, a, b and a tensor ``reg``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: an option of a later release.

    Example:
        >>> import torch, otkern
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> otkern.solve_sample(x, torch.tensor([[0.0], [3.0]]), reg=0.5).value.backward()
        >>> x.grad[1].round(decimals=1)
        tensor([-2.])
    """
    _refuse_later(unbalanced=unbalanced, mass=mass, null_cost=null_cost, scaling=scaling, update=update, grad=grad)
    inputs, batched = read_points(
        X_a, X_b, a, b, reg, metric, lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b, max_seqlen_a, max_seqlen_b
    )
    return _solve(inputs, batched, reg_type, max_iter, tol, potentials_init, grad, backend, check)


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


def _solve(
    inputs: Inputs,
    batched: bool,
    reg_type: str,
    max_iter: int,
    tol: float | None,
    potentials_init: tuple[Tensor, Tensor] | None,
    grad: str,
    backend: str | None,
    check: bool | None,
) -> OTResult:
    if reg_type not in REG_TYPES:
        raise ValueError(f"reg_type must be one of {', '.join(REG_TYPES)}, but was {reg_type!r}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be an integer of at least 1, but was {max_iter!r}")
    number = isinstance(tol, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)) and not isinstance(tol, bool)
    if tol is not None and not (number and 0 <= tol < math.inf):
        raise ValueError(f"tol must be None or a finite number of at least 0, but was {tol!r}")
    if check is not None and not isinstance(check, bool):
        raise ValueError(f"check must be None or a bool, but was {check!r}")
    _refuse_forward_mode(inputs)
    if grad == "detach":
        inputs = inputs.detach()
    backend = backends.choose(backend, inputs.device.type)
    check = inputs.device.type == "cpu" if check is None else check
    g_init = _read_warm_start(potentials_init, inputs, batched)
    value, f, g, marginal_error, n_iters = ops.sinkhorn(inputs, g_init, max_iter, tol, check, backend)
    if reg_type == "entropy":
        # Without a feasible plan the value is +inf around it, and its gradient 0.
        value = torch.where(value.isposinf(), value, value + _entropy_of_weights(inputs))
    return OTResult(
        inputs=inputs,
        value=value,
        f=f,
        g=g,
        marginal_error=marginal_error,
        n_iters=n_iters,
        tol=tol,
        batched=batched,
        backend=backend,
    )


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
    for side_a, weights in ((True, inputs.a), (False, inputs.b)):
        if weights is None:
            total = total - item_sizes(inputs, side_a).clamp(min=1).to(total.dtype).log()
        else:
            # 0 log 0 = 0. Its derivative, -inf, is left out: normalised weights would carry it on as NaN.
            inside = torch.where(row_mask(inputs, side_a) & (weights > 0), weights, 1)
            total = total - item_sums(inputs, side_a, torch.special.entr(inside))
    mass_a, mass_b = masses(inputs, True), masses(inputs, False)
    return inputs.reg * (total + (mass_a + mass_b) / 2 - mass_a * mass_b)


def _refuse_later(*, update: str, grad: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name}: {_LATER[name]} is not in this release; leave it at None")
    if update == "symmetric":
        raise NotImplementedError('update: symmetric (averaged) updates are not in this release; use "alternating"')
    if update != "alternating":
        raise ValueError(f"update must be 'alternating' or 'symmetric', but was {update!r}")
    if grad in ("implicit", "unrolled"):
        raise NotImplementedError(f'grad: the {grad} gradient is not in this release; use "envelope" or "detach"')
    if grad not in GRADS:
        raise ValueError(f"grad must be one of envelope, implicit, unrolled, detach, but was {grad!r}")


def _refuse_forward_mode(inputs: Inputs) -> None:
    # A custom op would drop the tangent without a word. Outside forward mode this costs one comparison.
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in (inputs.x_a, inputs.x_b, inputs.cost, inputs.a, inputs.b, inputs.reg):
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("forward-mode derivatives of an entropic OT value are not in this release")
