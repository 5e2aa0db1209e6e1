"""Which backend a call would run on, how, and why: the same choice the call makes, without making it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor

from otkern import backends
from otkern.arguments import read_costs, read_points
from otkern.calls import Call, read_call
from otkern.debiasing import check_kind
from otkern.solve import solve, solve_sample


class Explanation(NamedTuple):
    """How a call would be served; ``str()`` of it is a short text."""

    backend: str
    regime: str  # what the backend does with problems of this size
    reason: str  # why this backend

    def __str__(self) -> str:
        return f"{self.backend}: {self.regime}\nwhy: {self.reason}"


def explain(
    X_a: Tensor, X_b: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None, **options: Any
) -> Explanation:
    """Backend, regime and reason of a call of `solve_sample`, or of `solve` where ``X_b`` is None.

    Args:
        X_a: points as `solve_sample` takes them, or costs as `solve` takes them.
        X_b: points; None: ``X_a`` holds costs.
        a: weights.
        b: weights.
        **options: the keyword arguments of the call, ``reg`` among them.

    Returns:
        `Explanation`: ``backend``, ``regime`` and ``reason``.

    Raises:
        ValueError: what the call itself would raise about shapes and options, an unavailable ``backend`` included.

    Example:
        >>> import torch, otkern
        >>> otkern.explain(torch.zeros(4, 3), torch.zeros(5, 3), reg=0.1, grad="unrolled").backend
        'reference'
    """
    call = _read(X_a, X_b, a, b, options)
    reason = "it was asked for"
    if options.get("backend") is None:
        refused = [
            f"not {name}, because {why}"
            for name, why in backends.refusals(
                call.inputs.device.type,
                call.iterations.update,
                call.iterations.overrelaxation,
                call.differentiation.grad,
                backends.size_of(
                    call.inputs.device, call.inputs.primary.dtype, max(call.inputs.max_a, call.inputs.max_b)
                ),
            )
        ]
        reason = "; ".join(["the fastest that serves this call here", *refused])
    return Explanation(call.backend, backends.load(call.backend).regime(call.inputs, call.iterations.schedule), reason)


def _read(X_a: Tensor, X_b: Tensor | None, a: Tensor | None, b: Tensor | None, options: dict[str, Any]) -> Call:
    if X_b is None:
        given = inspect.signature(solve).bind(X_a, a, b, **options)
        given.apply_defaults()
        p = given.arguments
        inputs, batched = read_costs(p["M"], a, b, p["reg"], p["lengths_a"], p["lengths_b"])
    else:
        given = inspect.signature(solve_sample).bind(X_a, X_b, a, b, **options)
        given.apply_defaults()
        p = given.arguments
        layout = ("lengths_a", "lengths_b", "cu_seqlens_a", "cu_seqlens_b", "max_seqlen_a", "max_seqlen_b")
        inputs, batched = read_points(X_a, X_b, a, b, p["reg"], p["metric"], *(p[name] for name in layout))
    call = read_call(
        inputs,
        batched,
        p["reg"],
        p["reg_type"],
        (p["unbalanced"], p["mass"], p["null_cost"]),
        p["max_iter"],
        p["tol"],
        (p["scaling"], p["update"], p["overrelaxation"]),
        p["potentials_init"],
        (p["grad"], p["implicit_tol"], p["implicit_max_iter"]),
        p["backend"],
        p["check"],
    )
    if p.get("debias"):
        check_kind(call.inputs)
        # The larger cloud with itself is the largest problem.
        longest = max(call.inputs.max_a, call.inputs.max_b)
        call = call._replace(inputs=call.inputs._replace(max_a=longest, max_b=longest))
    return call
