"""Potentials in the conventions of other packages, to compare with their results or to go on from ours.

Here P = a b exp((f + g - C) / reg). Others leave the weights out of the plan, or count in units of reg. A point without
weight then has the potential -inf (a scaling of 0), and no derivative.
"""

from __future__ import annotations

from torch import Tensor

from otkern.problem import spread, weights_of
from otkern.result import OTResult

# What each means for the plan.
POT_FORMS = ("log", "scaling", "cost", "ratio")


def to_ott(result: OTResult) -> tuple[Tensor, Tensor]:
    """The potentials (f, g) of OTT-JAX, in the unit of the cost, with P = exp((f + g - C) / reg).

    Args:
        result: of any solve of this package.

    Returns:
        Tensors like ``result.potentials``, -inf where the weight is 0; differentiable.

    Example:
        >>> import torch, otkern
        >>> from otkern.interop import to_ott
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> f, g = to_ott(otkern.solve(cost, reg=0.1))
        >>> ((f[:, None] + g - cost) / 0.1).exp().round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    return _converted(result, weights=True, in_reg=False)


def to_pot(result: OTResult, form: str = "log") -> tuple[Tensor, Tensor]:
    """The potentials (u, v) of POT, which has four conventions.

    Args:
        result: of any solve of this package.
        form: which of them, here with reg = r:

            * ``"log"``: P = exp(u + v - C / r). Of ``ot.solve``, ``ot.solve_sample`` and ``ot.solve_batch`` when
              balanced, and of ``ot.sinkhorn(..., method="sinkhorn_log")`` (``log_u``, ``log_v``).
            * ``"scaling"``: P = u v exp(-C / r). Of ``ot.sinkhorn`` (``u``, ``v``); what overflows there does here.
            * ``"cost"``: P = exp((u + v - C) / r). Of ``ot.sinkhorn(..., method="sinkhorn_stabilized")`` (``alpha``,
              ``beta``).
            * ``"ratio"``: P = a b exp(u + v - C / r). Of ``ot.solve(..., unbalanced=...)`` and
              ``ot.unbalanced.sinkhorn_unbalanced`` (``logu``, ``logv``) with ``reg_type="KL"``.

    Returns:
        Tensors like ``result.potentials``; differentiable.

    Raises:
        ValueError: another form.

    Note:
        A balanced problem leaves a constant free, u + t and v - t; compare what does not depend on it.

    Example:
        >>> import torch, otkern
        >>> from otkern.interop import to_pot
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> u, v = to_pot(otkern.solve(cost, reg=0.1), "scaling")
        >>> (u[:, None] * (-cost / 0.1).exp() * v).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    if form not in POT_FORMS:
        raise ValueError(f"form must be one of {', '.join(POT_FORMS)}, but was {form!r}")
    u, v = _converted(result, weights=form != "ratio", in_reg=form != "cost")
    return (u.exp(), v.exp()) if form == "scaling" else (u, v)


def _converted(result: OTResult, weights: bool, in_reg: bool) -> tuple[Tensor, Tensor]:
    """(f, g) / reg + log (a, b), or times reg; without ``weights`` less the logarithm."""
    inputs = result._inputs
    out = []
    for side_a, potential in zip((True, False), result._potentials(), strict=False):
        reg = spread(inputs, side_a, inputs.reg)
        if weights:
            potential = potential + reg * weights_of(inputs, side_a).log()
        out.append(result._squeeze(potential / reg if in_reg else potential))
    return out[0], out[1]
