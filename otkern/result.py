"""What a solve returns: values and diagnostics at once; plans, marginals and maps when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otkern import alignment, ops, second_order
from otkern.convergence import warn_once_per_call_site
from otkern.precision import Solved
from otkern.problem import Inputs, masses, row_mask

# Without a tolerance of the user's, a problem counts as converged below this marginal error per unit of mass.
DEFAULT_TOLERANCE = 1e-3


class OTResult:
    """The solution of one entropic OT problem or a batch of them.

    Shapes are those of a batch; an unbatched call gives them without their first axis. For a packed batch, what has
    one entry a point is packed as well, and what is a matrix is padded to (B, max_seqlen_a, max_seqlen_b).

    A result can be copied, pickled and sent to another process. The copy keeps its numbers and is detached: what had a
    graph has none.

    Attributes:
        value: (B,), the optimal objective (the dual objective when iterations were cut short); differentiable, twice
            with ``grad="envelope"``. ``+inf`` for a problem without a feasible plan.
        n_iters: (B,) int32, full iterations done.
    """

    def __init__(
        self,
        *,
        inputs: Inputs,
        value: Tensor,
        f: Tensor,
        g: Tensor,
        multipliers: Tensor,
        marginal_error: Tensor,
        n_iters: Tensor,
        tol: float | None,
        batched: bool,
        backend: str,
        differentiation: ops.Differentiation,
        constant: Tensor | None = None,
        self_potentials: tuple[Tensor, Tensor] | None = None,
        in_float64: Solved | None = None,
    ):
        self._inputs, self._how = inputs, differentiation
        # Of (a, a) and (b, b), where the value is debiased; it then comes differentiable as it is to be.
        self._self_potentials = self_potentials
        self._value, self._f, self._g, self._multipliers = value, f, g, multipliers
        self._marginal_error, self._n_iters = marginal_error, n_iters
        self._tol, self._batched, self._backend = tol, batched, backend
        # The items whose potentials float32 does not hold; what is read of them comes from there.
        self._in_float64 = in_float64
        self._plan: Tensor | None = None
        # Tensors made in inference mode count no versions, and traced ones are not changed.
        counted = not torch.compiler.is_compiling() and not any(tensor.is_inference() for _, tensor in self._tensors())
        self._versions = [tensor._version for _, tensor in self._tensors()] if counted else None
        self._warned = tol is None or torch.compiler.is_compiling()
        if self._how.grad in ("implicit", "unrolled") and self_potentials is None:
            attached, f, g, multipliers = self._attached()
            self._value = ops.dual_value(attached, value, f, g, multipliers, backend)
        if constant is not None:
            # No value of +inf changes.
            self._value = torch.where(self._value.isposinf(), self._value, self._value + constant)
        if in_float64 is not None:
            names = ("_value", "_marginal_error", "_n_iters")
            for name in names:
                setattr(self, name, in_float64.merged(getattr(self, name), getattr(in_float64.result, name)))
        if self._f.device.type == "cpu":
            self._warn_where_not_converged()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._versions is not None:
            # A copy is of tensors as they are: a change since the solve has to show now, for no count goes with them.
            self._check_unchanged()
            state["_versions"] = "as copied"
        return {name: _without_graph(value) for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_versions"] is not None:
            self._versions = [tensor._version for _, tensor in self._tensors()]

    def __repr__(self) -> str:
        shape = f"batch={self._inputs.batch}, " if self._batched else ""
        return f"OTResult({shape}max_a={self._inputs.max_a}, max_b={self._inputs.max_b}, backend={self._backend!r})"

    @property
    def value(self) -> Tensor:
        return self._squeeze(self._value)

    @property
    def n_iters(self) -> Tensor:
        return self._squeeze(self._n_iters)

    @property
    def marginal_error(self) -> Tensor:
        """(B,), L1 gap between the plan's marginals and those that the potentials ask for; no gradient.

        These are (a, b) in a balanced problem; else equations (12) and (15) of ``docs/derivations.md`` say which.
        """
        self._warn_where_not_converged()
        return self._squeeze(self._marginal_error)

    @property
    def converged(self) -> Tensor:
        """(B,) bool: a feasible problem whose marginal error is at most ``tol`` (without one: 1e-3 of its mass)."""
        self._warn_where_not_converged()
        return self._squeeze(self._converged())

    @property
    def potential_a(self) -> Tensor:
        """(B, N), f in cost units, with P = a b exp((f + g - C) / reg); 0 in the padding. Differentiable.

        In a balanced problem <a, f> = <b, g>.
        """
        return self._squeeze(self._potentials()[0])

    @property
    def potential_b(self) -> Tensor:
        """(B, M), g in cost units."""
        return self._squeeze(self._potentials()[1])

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        """(f, g); what ``potentials_init`` takes."""
        f, g = self._potentials()
        return self._squeeze(f), self._squeeze(g)

    @property
    def self_potentials(self) -> tuple[Tensor, Tensor] | None:
        """(B, N) of the problem (a, a) and (B, M) of (b, b) where the value is debiased, else None; no gradient."""
        pair = self._self_potentials
        if pair is not None and self._in_float64 is not None:
            again = self._in_float64.result._self_potentials
            assert again is not None
            a, b = again
            pair = self._in_float64.merged(pair[0], a, True), self._in_float64.merged(pair[1], b, False)
        return None if pair is None else (self._squeeze(pair[0]), self._squeeze(pair[1]))

    @property
    def plan(self) -> Tensor:
        """(B, N, M), built on demand, 0 in the padding; differentiable."""
        return self._squeeze(self._dense_plan)

    @property
    def plan_operator(self) -> PlanOperator:
        """The plan as a linear operator that is never built: ``plan_operator @ v``, ``plan_operator.T @ u``."""
        return PlanOperator(self)

    @property
    def marginal_a(self) -> Tensor:
        """(B, N), P 1; differentiable."""
        return self._squeeze(self._apply(self._ones(False), False).squeeze(-1))

    @property
    def marginal_b(self) -> Tensor:
        """(B, M), P^T 1; differentiable."""
        return self._squeeze(self._apply(self._ones(True), True).squeeze(-1))

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """``(marginal_a, marginal_b)``."""
        return self.marginal_a, self.marginal_b

    @property
    def value_linear(self) -> Tensor:
        """(B,), the transport cost <P, C> and of null points, ``+inf`` without a feasible plan; differentiable."""
        self._check_unchanged()
        inputs, f, g, multipliers = self._attached()
        linear = ops.linear_value(inputs, f, g, self._backend)
        if inputs.kind == "null":
            linear = linear + second_order.null_cost_moved(inputs, f, g, multipliers)
        if self._in_float64 is not None:
            linear = self._in_float64.merged(linear, self._in_float64.result.value_linear)
        value = self._value.detach()
        return self._squeeze(torch.where(value.isposinf(), value, linear))

    @property
    def sparse_plan(self) -> Tensor:
        """The dense plan, under POT's name: an entropic plan has no zeros to leave out."""
        return self.plan

    @property
    def lazy_plan(self) -> PlanOperator:
        """`plan_operator`, under POT's name."""
        return self.plan_operator

    @property
    def status(self) -> str:
        """POT's name for how the solve ended: "converged", or how many problems did not."""
        converged = self._converged()
        missing = int((~converged).sum())
        return "converged" if missing == 0 else f"{missing} of {len(converged)} problems not converged"

    @property
    def log(self) -> dict[str, Tensor]:
        """POT's name for the record of the solve: ``n_iters``, ``marginal_error`` and ``converged``."""
        return {"n_iters": self.n_iters, "marginal_error": self.marginal_error, "converged": self.converged}

    def barycentric_map(self, target: Tensor | None = None) -> Tensor:
        """Where each point of side a is sent: the mean of the targets under its row of the plan.

        Args:
            target: values at the points of side b, (B, M, K) or packed (sum of lengths, K); default the points X_b
                themselves; or one value each, (B, M) or (sum of lengths,).

        Returns:
            (B, N, K), or (B, N), in the compute dtype; 0 for a point without mass and in the padding. Differentiable
            with respect to the target and the problem.

        Raises:
            ValueError: no ``target`` for a problem given by costs, or one of another shape.
        """
        if target is None:
            if self._inputs.x_b is None:
                raise ValueError("target must be given for a problem of costs, but was None")
            target = self._squeeze(self._inputs.x_b)
        marginal = self._apply(self._ones(False), False)
        image = self.plan_operator.apply(target, name="target")
        marginal = self._squeeze(marginal)
        marginal = marginal.squeeze(-1) if image.dim() < marginal.dim() else marginal
        return torch.where(marginal > 0, image / torch.where(marginal > 0, marginal, 1), 0)

    def match(self, method: str = "mutual", **options: Any) -> Tensor:
        """Hard alignments of the plan, (B, N, M) bool; methods and options of `otkern.alignment.match`."""
        return self._squeeze(alignment.match(self._dense_plan.detach(), method, **options))

    @property
    def _dense_plan(self) -> Tensor:
        # Not functools.cached_property: its lock cannot be traced by torch.compile before Python 3.12.
        inputs, f, g, _ = self._attached()
        if f.requires_grad:
            # Formed anew each time, so that each can be differentiated.
            self._check_unchanged()
            return self._with_float64_plans(ops.plan(inputs, f, g, self._backend))
        if self._plan is None:
            self._check_unchanged()
            self._plan = self._with_float64_plans(ops.plan(inputs.detach(), f, g, self._backend))
        return self._plan

    def _with_float64_plans(self, plan: Tensor) -> Tensor:
        again = self._in_float64
        return plan if again is None else again.merged(plan, again.result._dense_plan)

    def _potentials(self) -> tuple[Tensor, Tensor]:
        """(f, g), attached to the problem where that asks for gradients."""
        _, f, g, _ = self._attached()
        again = self._in_float64
        if again is None:
            return f, g
        f_again, g_again = again.result._potentials()
        return again.merged(f, f_again, True), again.merged(g, g_again, False)

    def _attached(self) -> tuple[Inputs, Tensor, Tensor, Tensor]:
        """The problem and its potentials, for what is differentiated through both."""
        raw = self._f, self._g, self._multipliers
        if self._how.grad == "detach" or not torch.is_grad_enabled():
            return self._inputs, *raw
        if not any(t.requires_grad for t in self._inputs if isinstance(t, Tensor)):
            return self._inputs, *raw
        # The two ways that a gradient takes nearly cancel: they must meet before anything is rounded to 16 bits.
        inputs = self._inputs.widened()
        return inputs, *ops.potentials(inputs, *raw, self._how, self._backend)

    def _check_unchanged(self) -> None:
        """What is computed on demand needs the tensors as they were; `torch.optim` steps, for one, change points."""
        if self._versions is None:
            return
        for (name, tensor), version in zip(self._tensors(), self._versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} must be unchanged between the solve and the use of its result, but was modified in place; "
                    "read what you need before, or pass a clone"
                )

    def _tensors(self) -> list[tuple[str, Tensor]]:
        inputs = self._inputs
        named = {"X_a": inputs.x_a, "X_b": inputs.x_b, "M": inputs.cost, "a": inputs.a, "b": inputs.b}
        named |= {"reg": inputs.reg, "relaxation": inputs.relaxation, "potential_a": self._f, "potential_b": self._g}
        return [(name, tensor) for name, tensor in named.items() if tensor is not None]

    def _apply(self, v: Tensor, transpose: bool) -> Tensor:
        self._check_unchanged()
        inputs, f, g, _ = self._attached()
        out = ops.apply_plan(inputs, f, g, v, transpose, False, self._backend)
        return out if self._in_float64 is None else self._in_float64.applied(out, v, transpose)

    def _ones(self, side_a: bool) -> Tensor:
        potential = self._f if side_a else self._g
        return torch.ones((*potential.shape, 1), dtype=potential.dtype, device=potential.device)

    def _squeeze(self, tensor: Tensor) -> Tensor:
        return tensor if self._batched else tensor.squeeze(0)

    def _unsqueeze(self, tensor: Tensor) -> Tensor:
        return tensor if self._batched else tensor.unsqueeze(0)

    def _converged(self) -> Tensor:
        tolerance = DEFAULT_TOLERANCE * masses(self._inputs, True) if self._tol is None else self._tol
        return (self._marginal_error <= tolerance) & self._value.detach().isfinite()

    def _warn_where_not_converged(self) -> None:
        if self._warned:
            return
        self._warned = True
        converged = self._converged()
        if bool(converged.all()):
            return
        error = torch.where(converged, -1, self._marginal_error)
        worst = int(error.argmax())
        item = f"{int((~converged).sum())} of {len(converged)} problems, item {worst} worst" if self._batched else "it"
        warn_once_per_call_site(
            f"otkern: not converged to tol={self._tol:g} ({item}): marginal error "
            f"{float(self._marginal_error[worst]):.3g} after {int(self._n_iters[worst])} iterations; "
            "raise max_iter, tol or reg"
        )


def _without_graph(value: Any) -> Any:
    """The same tensors, at any depth, as leaves: no graph can be copied or sent to another process."""
    if isinstance(value, Tensor):
        return value if value.is_leaf else value.detach()
    if isinstance(value, tuple):
        parts = [_without_graph(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class PlanOperator:
    """The transport plan as a linear operator, applied by the backend's kernel without building the plan.

    ``op @ v`` takes v (B, M, K), (B, M) or, for a packed batch, (sum of lengths, K) or (sum of lengths,), of any
    floating dtype, and returns P v in the compute dtype; ``op.T @ u`` returns P^T u. Differentiable with respect to
    v and, through a matrix of the plan's size, to the problem.
    """

    def __init__(self, result: OTResult, transpose: bool = False):
        self._result, self._transpose = result, transpose

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N, M), or (N, M) of an unbatched problem."""
        inputs = self._result._inputs
        sizes = (inputs.max_b, inputs.max_a) if self._transpose else (inputs.max_a, inputs.max_b)
        return (inputs.batch, *sizes) if self._result._batched else sizes

    @property
    def T(self) -> PlanOperator:
        return PlanOperator(self._result, not self._transpose)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(v)

    def apply(self, v: Tensor, *, name: str = "v") -> Tensor:
        """``op @ v`` by name: inside `torch.compile`, which does not trace a matrix product with a Python object."""
        result, potential = self._result, self._result._f if self._transpose else self._result._g
        points = tuple(potential.shape if result._batched else potential.shape[1:])
        if not isinstance(v, Tensor) or tuple(v.shape[: len(points)]) != points or v.dim() > len(points) + 1:
            got = f"has shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"was {type(v).__name__}"
            expected = f"({', '.join(str(size) for size in points)}, K)"
            raise ValueError(f"{name} must be a tensor of shape {tuple(points)} or {expected}, but {got}")
        if v.is_complex():
            raise ValueError(f"{name} must be real, but has dtype {v.dtype}")
        if v.device != potential.device:
            raise ValueError(f"{name} must be on {potential.device} like the problem, but is on {v.device}")
        vector = v.dim() == len(points)
        columns = result._unsqueeze(v.to(potential.dtype))
        columns = columns.unsqueeze(-1) if vector else columns
        # Padding may hold anything, and 0 * NaN is NaN.
        columns = torch.where(row_mask(result._inputs, self._transpose).unsqueeze(-1), columns, 0)
        out = result._squeeze(result._apply(columns, self._transpose))
        return out.squeeze(-1) if vector else out
