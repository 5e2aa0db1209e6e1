"""The Sinkhorn divergence: entropic optimal transport, debiased."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from otkern.solve import solve_sample


def sinkhorn_divergence(
    X_a: Tensor,
    X_b: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "sqeuclidean",
    reg: float | Tensor,
    **options: Any,
) -> Tensor:
    r"""How far two clouds of points are apart: entropic optimal transport without its bias.

    :math:`S_\varepsilon(a, b) = \mathrm{OT}_\varepsilon(a, b) - \tfrac12 \mathrm{OT}_\varepsilon(a, a)
    - \tfrac12 \mathrm{OT}_\varepsilon(b, b) + \tfrac\varepsilon2 (\sum a - \sum b)^2`, where the last term is 0 in a
    balanced problem (Feydy et al. 2019; Séjourné et al. 2019, for ``unbalanced``; equation (22) of
    ``docs/derivations.md``). With the costs ``"sqeuclidean"`` and ``"euclidean"`` it is at least 0, and 0 for equal
    measures only; the entropic value itself is smallest for a shrunken copy of the other cloud. The three problems are
    solved in one call, each to its own stop.

    Args:
        X_a: points (N, D), a padded batch (B, N, D), or a packed batch (sum of lengths, D) with ``cu_seqlens_a``.
        X_b: points (M, D), (B, M, D) or (sum of lengths, D).
        a: weights of the points of ``X_a``; None: uniform.
        b: weights of the points of ``X_b``.
        metric: the cost of a pair, as in `otkern.solve_sample`.
        reg: epsilon, in the unit of the cost, > 0; a number or a (B,) tensor.
        **options: further keyword arguments of `otkern.solve_sample`, such as ``max_iter``, ``tol``, ``unbalanced``
            or ``lengths_a``. With a pair (rho_a, rho_b) in ``unbalanced``, OT(a, a) takes rho_a on both sides and
            OT(b, b) takes rho_b.

    Returns:
        (B,), or a scalar for an unbatched call; differentiable with respect to points, weights, reg and unbalanced.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: ``mass`` or ``null_cost``, for which no divergence is defined.

    Note:
        A cloud with itself is solved with one potential, equation (27), which converges much faster than two: with
        iterations cut short at a small ``reg`` OT(a, b) is further from its end than the others, and the divergence may
        be below 0. A ``tol`` says when. Costs cannot be debiased, only points: a cost between two clouds does not say
        what it is within each.

    Example:
        >>> import torch, otkern
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> otkern.sinkhorn_divergence(x, x + 2, reg=0.5)
        tensor(4.)
        >>> otkern.sinkhorn_divergence(x, x, reg=0.5)
        tensor(0.)
    """
    if "debias" in options:
        raise TypeError("debias: a divergence is debiased by definition; otkern.solve_sample takes debias=False")
    return solve_sample(X_a, X_b, a, b, metric=metric, reg=reg, debias=True, **options).value
