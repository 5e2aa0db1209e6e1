"""The torch.library ops: schema, fake kernels, autograd. The only place that knows autograd.

    otkern::sinkhorn           solves a batch
    otkern::sinkhorn_backward  sums over the plan for the gradient of the values
    otkern::plan_backward      sums over the plan with any weights
    otkern::implicit           the adjoint of the fixed point
    otkern::unrolled           the adjoint of the iterations
    otkern::symmetric          the annealed loop of GeomLoss
    otkern::apply_plan, otkern::plan   products with the plan, and the plan itself

Each calls the function of that name of the backend's module (`sinkhorn`: `forward`, `sinkhorn_backward`: `backward`).
What the derivatives are made of is in `otkern.gradients`; here they are tied to tensors.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from otkern import backends, dispatch, gradients, precision, second_order
from otkern.convergence import ConvergenceWarning
from otkern.gradients import Gradients
from otkern.problem import Inputs, PlanWeights, Schedule, check_values, check_warm_start, item_sums, padded

_PROBLEM = (
    "Tensor? x_a, Tensor? x_b, Tensor? cost, Tensor? a, Tensor? b, Tensor reg, Tensor? relaxation, "
    "Tensor? lengths_a, Tensor? lengths_b, Tensor? cu_seqlens_a, Tensor? cu_seqlens_b, "
    "SymInt max_a, SymInt max_b, str metric, str kind, bool entropy, SymInt first_self"
)
_N_PROBLEM = len(Inputs._fields)
_N_TENSORS = Inputs._fields.index("max_a")
_N_DIFFERENTIABLE = Inputs._fields.index("lengths_a")
_ITERATIONS = (
    "Tensor? g_init, Tensor? eps_start, int max_iter, float tol, float eps_factor, str update, float overrelaxation"
)
_SUMS = "(Tensor dx_a, Tensor dx_b, Tensor dcost, Tensor sum_a, Tensor sum_b, Tensor sum_reg)"

_library = torch.library.Library("otkern", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class Iterations(NamedTuple):
    """How a batch is iterated: what the forward is called with beside the problem."""

    g_init: Tensor | None = None
    eps_start: Tensor | None = None
    max_iter: int = 100
    tol: float = -1.0  # negative: no stopping
    eps_factor: float = 1.0
    update: str = "alternating"
    overrelaxation: float = 1.0

    @property
    def schedule(self) -> Schedule | None:
        """None for the plain iteration."""
        schedule = Schedule(self.eps_start, self.eps_factor, self.update, self.overrelaxation)
        plain = self.eps_start is None and self.update == "alternating" and self.overrelaxation == 1
        return None if plain else schedule


class Differentiation(NamedTuple):
    """How what follows from the potentials is differentiated."""

    grad: str = "envelope"  # or "implicit", "unrolled", "detach"
    tol: float | None = None  # of the implicit solve, relative; None: that of the dtype
    max_iter: int = 1000
    iterations: Iterations | None = None  # of "unrolled"

    def tolerance(self, dtype: torch.dtype) -> float:
        """What the implicit solve is asked for: what the arithmetic reaches, with room to spare."""
        return self.tol if self.tol is not None else 1e-10 if dtype == torch.float64 else 1e-5


def sinkhorn(inputs: Inputs, iterations: Iterations, how: Differentiation, check: bool, backend: str):
    """(value, f, g, multipliers, marginal_error, n_iters) of a batch; ``value`` carries the envelope gradient.

    Of ``how`` the implicit solve's bounds are taken: a second derivative needs it.
    """
    solver = how.tolerance(inputs.compute_dtype), how.max_iter
    arguments = (*inputs, *iterations, *solver, check, backend)
    if dispatch.is_needed(inputs):
        return dispatch.call("sinkhorn", *arguments)
    return (_Sinkhorn.apply if dispatch.is_recorded(inputs) else _sinkhorn)(*arguments)


def apply_plan(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool, backend: str):
    """P @ v or P^T @ v; differentiable with respect to v, the problem and the potentials.

    With ``times_cost`` (P o C) @ v, which is differentiable with respect to v alone.
    """
    arguments = (*inputs, f, g, v, transpose, times_cost, backend)
    return dispatch.call("apply_plan", *arguments)


def plan(inputs: Inputs, f: Tensor, g: Tensor, backend: str):
    """The dense plans (B, max_a, max_b), 0 in the padding; differentiable."""
    return dispatch.call("plan", *inputs, f, g, backend)


def linear_value(inputs: Inputs, f: Tensor, g: Tensor, backend: str) -> Tensor:
    """<P, C> over the real points, (B,); differentiable."""
    return _LinearValue.apply(*inputs, f, g, backend)


def dual_value(inputs: Inputs, value: Tensor, f: Tensor, g: Tensor, multipliers: Tensor, backend: str) -> Tensor:
    """The value as a function of the problem and of differentiable potentials."""
    return _DualValue.apply(*inputs, value.detach(), f, g, multipliers, backend)


def potentials(inputs: Inputs, f: Tensor, g: Tensor, multipliers: Tensor, how: Differentiation, backend: str):
    """(f, g, multipliers) with derivatives with respect to the problem."""
    if inputs.kind == "null" and how.grad != "unrolled":
        enlarged = second_order.with_null(inputs)
        f, g = second_order.potentials_with_null(inputs, f.detach(), g.detach(), multipliers.detach())
        f, g, _ = _Potentials.apply(*enlarged, f, g, torch.zeros_like(multipliers), how, backend)
        return second_order.potentials_without_null(inputs, f, g)
    return _Potentials.apply(*inputs, f.detach(), g.detach(), multipliers.detach(), how, backend)


def symmetric(
    inputs: Inputs,
    eps_start: Tensor,
    n_steps: Tensor,
    eps_factor: float,
    cost_floor: float,
    check: bool,
    backend: str,
):
    """(s_a, s_b, ...) of GeomLoss's loop; s_a is differentiable with respect to x_a, s_b to x_b, equation (24)."""
    loop = (eps_start, n_steps, eps_factor, cost_floor)
    outputs = dispatch.call("symmetric", *inputs, *loop, check, backend)
    if inputs.compute_dtype == torch.float64:
        return outputs
    sides = (True, False, True, False, True, False)
    found = zip(sides[:4], outputs[:4], strict=True)
    doubled = precision.doubled(inputs, None, found, precision.ANNEALED_LIMIT)
    if doubled is None:
        return outputs
    if not backends.holds_float64(backend, inputs.device, max(inputs.max_a, inputs.max_b)):
        return outputs
    problem, loop = (
        doubled.problem(),
        (doubled.chosen(eps_start).double(), doubled.chosen(n_steps), eps_factor, cost_floor),
    )
    again = dispatch.call("symmetric", *problem, *loop, False, backend)
    return tuple(doubled.merged(*three) for three in zip(outputs, again, sides, strict=True))


def _over_batch(info, in_dims, args, apply):
    """The rule of `torch.vmap`: a batch of batches is one batch. Packed batches, and clouds with themselves among
    pairs, are solved one after the other."""
    size, inputs = info.batch_size, Inputs(*args[:_N_PROBLEM])
    tensors = {
        k: (arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0))
        for k, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
        if isinstance(arg, Tensor)
    }
    if inputs.cu_seqlens_a is not None or inputs.first_self > 0:
        slices = ([tensors[k][i] if k in tensors else arg for k, arg in enumerate(args)] for i in range(size))
        results = [apply(*slice_) for slice_ in slices]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
    result = apply(*(tensors[k].flatten(0, 1) if k in tensors else arg for k, arg in enumerate(args)))

    def unfolded(part: Tensor) -> Tensor:
        # An empty tensor stands for what is not needed.
        return part.unflatten(0, (size, -1)) if part.numel() else part.new_empty((size, *part.shape))

    if isinstance(result, Tensor):
        return unfolded(result), 0
    return tuple(map(unfolded, result)), (0,) * len(result)


class _Function(torch.autograd.Function):
    """A function of a batch of problems, whose tensors have one entry an item first, or are packed."""

    @classmethod
    def vmap(cls, info, in_dims, *args):
        return _over_batch(info, in_dims, args, cls.apply)


def _saved(ctx) -> tuple:
    """The saved tensors, and not the shells that `torch.func.vjp` leaves of them when it has returned."""
    functorch = torch._C._functorch
    return tuple(
        functorch.unwrap_if_dead(t) if t is not None and functorch.is_functorch_wrapped_tensor(t) else t
        for t in ctx.saved_tensors
    )


class _Refused(torch.autograd.Function):
    """The identity in the first tensors; differentiating it with respect to any of them or of the others raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message, n_outputs, *tensors):
        return tuple(t.clone() for t in tensors[:n_outputs])

    @staticmethod
    def setup_context(ctx, args, outputs):
        ctx.message = args[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.message)


def _refusing(grads, message: str, behind) -> tuple:
    """The gradients; where a graph is asked for, one that raises when it is differentiated with respect to `behind`."""
    given = [grad for grad in grads if grad is not None]
    if not torch.is_grad_enabled() or not given:
        return tuple(grads)
    refused = iter(_Refused.apply(message, len(given), *given, *(t for t in behind if t is not None)))
    return tuple(None if grad is None else next(refused) for grad in grads)


def _define(name: str, signature: str, kernel, fake) -> None:
    _library.define(name + signature, tags=_tags)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"otkern::{name}", fake, lib=_library)


def _split(args):
    """The problem and what follows it."""
    return Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]


# ---- the solve -------------------------------------------------------------------------------------------------------


def _sinkhorn(*args):
    inputs, rest = _split(args)
    iterations, (check, name) = Iterations(*rest[:-4]), rest[-2:]
    backend = dispatch.serving(inputs, name, iterations.schedule)
    if check:
        # Inside the op, where data may be read without breaking a compiled graph.
        check_values(inputs)
        check_warm_start(inputs, iterations.g_init)
    return backend.forward(inputs, iterations.g_init, iterations.max_iter, iterations.tol, iterations.schedule, check)


def _sinkhorn_fake(*args):
    inputs, _ = _split(args)
    new, dtype = inputs.primary.new_empty, inputs.compute_dtype
    value, marginal_error = new((inputs.batch,), dtype=dtype), new((inputs.batch,), dtype=dtype)
    f, g = new(inputs.shape_f, dtype=dtype), new(inputs.shape_g, dtype=dtype)
    multipliers, n_iters = new((inputs.batch, 2), dtype=dtype), new((inputs.batch,), dtype=torch.int32)
    return value, f, g, multipliers, marginal_error, n_iters


class _Sinkhorn(_Function):
    """The op below autograd, and its envelope gradient."""

    @staticmethod
    def forward(*args):
        if dispatch.is_needed(args):
            with torch._C._AutoDispatchBelowAutograd():
                return _sinkhorn_op(*args)
        return _sinkhorn(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        value, *rest = outputs
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_N_TENSORS], *rest[:3], value)
        ctx.sizes, ctx.backend = args[_N_TENSORS:_N_PROBLEM], args[-1]
        ctx.how = Differentiation(tol=args[-4], max_iter=args[-3])

    @staticmethod
    def backward(ctx, dvalue, *_):
        need = ctx.needs_input_grad
        if dvalue is None:
            return (None,) * len(need)
        *tensors, f, g, multipliers, value = _saved(ctx)
        inputs = Inputs(*tensors, *ctx.sizes)
        # A problem without a feasible plan has a constant value, +inf, around it.
        dvalue = torch.where(torch.isfinite(value), dvalue, 0)
        if torch.is_grad_enabled():
            f = precision.without_plan(inputs, f, precision.beyond(inputs, [(True, f), (False, g)]) & (dvalue == 0))
            # The gradient is to be differentiated again, and then the potentials move with the problem.
            f, g, multipliers = potentials(inputs, f, g, multipliers, ctx.how, ctx.backend)
            # second_order differentiates the sums of each side by itself: neither may stand for both.
            inputs = inputs._replace(first_self=-1)
        grads = gradients.of_value(
            inputs, f, g, multipliers, dvalue.contiguous(), list(need[:_N_DIFFERENTIABLE]), False, ctx.backend
        )
        return _for_problem(grads, need)


def _for_problem(grads: Gradients, need) -> tuple:
    """The gradients of a problem's tensors where they are needed, and None for all that is behind them."""
    wanted = (g if n else None for g, n in zip(grads[:_N_DIFFERENTIABLE], need, strict=False))
    return (*wanted, *(None for _ in need[_N_DIFFERENTIABLE:]))


# ---- sums over the plan ----------------------------------------------------------------------------------------------


def _present(f: Tensor, tensors) -> tuple[Tensor, ...]:
    # A schema cannot say "Tensor or None" for an output: what is not needed is an empty tensor.
    return tuple(f.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _sinkhorn_backward(*args):
    inputs, (f, g, dvalue, needs, name) = _split(args)
    return _present(f, dispatch.serving(inputs, name).backward(inputs, f, g, dvalue, tuple(needs)))


def _plan_backward(*args):
    inputs, (f, g, *weights, needs, name) = _split(args)
    return _present(f, dispatch.serving(inputs, name).plan_backward(inputs, f, g, PlanWeights(*weights), tuple(needs)))


def _sums_fake(*args):
    inputs, (f, g, *_, needs, _) = _split(args)
    like = (inputs.x_a, inputs.x_b, inputs.cost, f, g, inputs.reg)
    wanted = (needs[0], needs[1], needs[2], needs[3], needs[3], needs[4])
    return tuple(f.new_empty(0) if not w else t.new_empty(t.shape) for t, w in zip(like, wanted, strict=True))


class _SinkhornBackward(_Function):
    """The sums for the value's gradient; their derivative is formed densely, in torch."""

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _sinkhorn_backward_op(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        f, g, dvalue, needs, _ = args[_N_PROBLEM:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_N_TENSORS], f, g, dvalue)
        ctx.sizes, ctx.needs = args[_N_TENSORS:_N_PROBLEM], needs

    @staticmethod
    def backward(ctx, *cotangents):
        if dispatch.is_transformed():
            raise NotImplementedError(
                "second derivatives of an entropic OT value are not supported within torch.func; use "
                "torch.autograd.grad with create_graph=True"
            )
        if torch.is_grad_enabled():
            raise NotImplementedError("third derivatives of an entropic OT value are not supported")
        *tensors, f, g, dvalue = _saved(ctx)
        inputs = Inputs(*tensors, *ctx.sizes)
        of_problem, df, dg, ddvalue = second_order.of_value_sums(inputs, f, g, dvalue, ctx.needs, cotangents)
        nothing = (None,) * (_N_PROBLEM - _N_DIFFERENTIABLE)
        return (*of_problem, *nothing, df, dg, ddvalue, None, None)


# ---- products with the plan ------------------------------------------------------------------------------------------


def _apply_plan(*args):
    inputs, (f, g, v, transpose, times_cost, name) = _split(args)
    return dispatch.serving(inputs, name).apply(inputs, f, g, v, transpose, times_cost)


def _apply_plan_fake(*args):
    inputs, (f, _, v, transpose, _, _) = _split(args)
    return f.new_empty((*(inputs.shape_g if transpose else inputs.shape_f), v.shape[-1]))


def _plan(*args):
    inputs, (f, g, name) = _split(args)
    return dispatch.serving(inputs, name).plan(inputs, f, g)


def _plan_fake(*args):
    inputs, (f, _, _) = _split(args)
    return f.new_empty((inputs.batch, inputs.max_a, inputs.max_b))


class _ApplyPlan(_Function):
    """The op below autograd: linear in v, and a function of the problem and the potentials through the plan."""

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _apply_plan_op(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        f, g, v, transpose, times_cost, backend = args[_N_PROBLEM:]
        ctx.save_for_backward(*args[:_N_TENSORS], f, g, v)
        ctx.sizes, ctx.rest = args[_N_TENSORS:_N_PROBLEM], (transpose, times_cost, backend)

    @staticmethod
    def backward(ctx, dout):
        *tensors, f, g, v = _saved(ctx)
        inputs, (transpose, times_cost, backend) = Inputs(*tensors, *ctx.sizes), ctx.rest
        need, dout, dv = ctx.needs_input_grad, dout.contiguous(), None
        if need[_N_PROBLEM + 2]:
            dv = apply_plan(inputs, f, g, dout, not transpose, times_cost, backend)
        if not any((*need[:_N_DIFFERENTIABLE], *need[_N_PROBLEM : _N_PROBLEM + 2])):
            return (*(None for _ in range(_N_PROBLEM + 2)), dv, None, None, None)
        if times_cost:
            raise NotImplementedError("(P o C) v is differentiable with respect to v alone")
        _refuse_second(gradient_of="a product with the plan")
        at_rows, at_columns = (v, dout) if transpose else (dout, v)
        dplan = padded(inputs, True, at_rows) @ padded(inputs, False, at_columns).mT
        grads = gradients.of_plan(inputs, f, g, dplan, list(need[:_N_DIFFERENTIABLE]), backend)
        return (*_for_problem(grads, need[:_N_PROBLEM]), grads.f, grads.g, dv, None, None, None)


class _Plan(_Function):
    """The op below autograd, and the derivative of the dense plan."""

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _plan_op(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        ctx.save_for_backward(*args[:_N_TENSORS], *args[_N_PROBLEM : _N_PROBLEM + 2])
        ctx.sizes, ctx.backend = args[_N_TENSORS:_N_PROBLEM], args[-1]

    @staticmethod
    def backward(ctx, dplan):
        _refuse_second(gradient_of="a plan")
        *tensors, f, g = _saved(ctx)
        inputs, need = Inputs(*tensors, *ctx.sizes), ctx.needs_input_grad
        grads = gradients.of_plan(inputs, f, g, dplan, list(need[:_N_DIFFERENTIABLE]), ctx.backend)
        return (*_for_problem(grads, need[:_N_PROBLEM]), grads.f, grads.g, None)


class _LinearValue(_Function):
    """<P, C>, and its derivative at fixed potentials and with respect to them."""

    @staticmethod
    def forward(*args):
        # Counted from the end, here and below: where nothing needs a gradient, torch.compile puts a context first.
        inputs, (f, g, backend) = _split(args[-_N_PROBLEM - 3 :])
        ones = f.new_ones((*inputs.shape_g, 1))
        rows = apply_plan(inputs, f, g, ones, False, True, backend).squeeze(-1)
        return item_sums(inputs, True, rows)

    @staticmethod
    def setup_context(ctx, args, outputs):
        f, g, backend = args[_N_PROBLEM:]
        ctx.save_for_backward(*args[:_N_TENSORS], f, g)
        ctx.sizes, ctx.backend = args[_N_TENSORS:_N_PROBLEM], backend

    @staticmethod
    def backward(ctx, d):
        _refuse_second(gradient_of="value_linear")
        *tensors, f, g = _saved(ctx)
        inputs, need = Inputs(*tensors, *ctx.sizes), ctx.needs_input_grad
        d = d.contiguous()
        grads = gradients.of_linear_value(inputs, f, g, d, list(need[:_N_DIFFERENTIABLE]), ctx.backend)
        return (*_for_problem(grads, need[:_N_PROBLEM]), grads.f, grads.g, None)


def _refuse_second(gradient_of: str) -> None:
    # The transforms of torch.func always ask for a graph. There the ops below, which have no formula, refuse.
    if torch.is_grad_enabled() and not dispatch.is_transformed():
        raise NotImplementedError(
            f"the gradient of {gradient_of} is not differentiable again; second derivatives exist of value"
        )


# ---- the potentials as functions of the problem ----------------------------------------------------------------------


def _implicit(*args):
    inputs, (*rest, name) = _split(args)
    return dispatch.serving(inputs, name).implicit(inputs, *rest)


def _implicit_fake(*args):
    inputs, (f, g, *_) = _split(args)
    n_iters = f.new_empty((inputs.batch,), dtype=torch.int32)
    return f.new_empty(f.shape), g.new_empty(g.shape), inputs.reg.new_empty(inputs.reg.shape), n_iters


def _unrolled(*args):
    inputs, rest = _split(args)
    iterations, (df, dg, dmultipliers, name) = Iterations(*rest[:-4]), rest[-4:]
    backend = dispatch.serving(inputs, name, iterations.schedule)
    return _present(
        df,
        backend.unrolled(
            inputs, iterations.g_init, iterations.max_iter, iterations.tol, iterations.schedule, df, dg, dmultipliers
        ),
    )


def _unrolled_fake(*args):
    inputs, _ = _split(args)
    return tuple(
        inputs.reg.new_empty(0 if t is None else t.shape, dtype=None if t is None else t.dtype)
        for t in inputs[:_N_DIFFERENTIABLE]
    )


class _Potentials(_Function):
    """The identity in the potentials; its backward leads to the problem."""

    @staticmethod
    def forward(*args):
        f, g, multipliers, _, _ = args[-5:]
        return f.clone(), g.clone(), multipliers.clone()

    @staticmethod
    def setup_context(ctx, args, outputs):
        f, g, multipliers, how, backend = args[_N_PROBLEM:]
        ctx.set_materialize_grads(False)
        unrolled = how.iterations if how.grad == "unrolled" else None
        ctx.save_for_backward(*args[:_N_TENSORS], f, g, multipliers, *(unrolled[:2] if unrolled else (None, None)))
        ctx.sizes, ctx.how, ctx.backend = args[_N_TENSORS:_N_PROBLEM], how, backend

    @staticmethod
    def backward(ctx, df, dg, dmultipliers):
        *tensors, f, g, multipliers, g_init, eps_start = _saved(ctx)
        inputs, how, need = Inputs(*tensors, *ctx.sizes), ctx.how, ctx.needs_input_grad
        if df is None and dg is None and dmultipliers is None:
            return (None,) * len(need)
        _refuse_second(gradient_of="the potentials")
        df, dg, dmultipliers = (
            torch.zeros_like(like) if given is None else given.contiguous()
            for given, like in ((df, f), (dg, g), (dmultipliers, multipliers))
        )
        if how.grad == "unrolled":
            iterations = how.iterations._replace(g_init=g_init, eps_start=eps_start)
            out = torch.ops.otkern.unrolled(*inputs, *iterations, df, dg, dmultipliers, ctx.backend)
            return _for_problem(Gradients(*out), need)
        needs, tol = list(need[:_N_DIFFERENTIABLE]), how.tolerance(f.dtype)
        grads, residual, n_iters = gradients.of_potentials(
            inputs, f, g, multipliers, df, dg, dmultipliers, needs, tol, how.max_iter, ctx.backend
        )
        if residual.device.type == "cpu" and not torch.compiler.is_compiling():
            _warn_of_residual(residual, n_iters, how)
        return _for_problem(grads, need)


def _warn_of_residual(residual: Tensor, n_iters: Tensor, how: Differentiation) -> None:
    # What fp32 cannot reach is not the caller's mistake.
    allowed = max(10 * how.tolerance(residual.dtype), 100 * torch.finfo(residual.dtype).eps)
    if bool((residual > allowed).any()):
        worst = int(residual.argmax())
        warnings.warn(
            f"otkern: the implicit gradient of item {worst} has a relative residual of {float(residual[worst]):.3g} "
            f"after {int(n_iters[worst])} iterations; raise implicit_max_iter, implicit_tol or reg",
            ConvergenceWarning,
            stacklevel=2,
        )


class _DualValue(_Function):
    """The identity in the value; its backward leads to the problem and to the potentials."""

    @staticmethod
    def forward(*args):
        return args[-5].clone()

    @staticmethod
    def setup_context(ctx, args, outputs):
        value, f, g, multipliers, backend = args[_N_PROBLEM:]
        ctx.save_for_backward(*args[:_N_TENSORS], value, f, g, multipliers)
        ctx.sizes, ctx.backend = args[_N_TENSORS:_N_PROBLEM], backend

    @staticmethod
    def backward(ctx, dvalue):
        _refuse_second(gradient_of='a value with grad="implicit" or "unrolled"')
        *tensors, value, f, g, multipliers = _saved(ctx)
        inputs, need = Inputs(*tensors, *ctx.sizes), ctx.needs_input_grad
        dvalue = torch.where(torch.isfinite(value), dvalue, 0).contiguous()
        needs = list(need[:_N_DIFFERENTIABLE])
        grads = gradients.of_value(inputs, f, g, multipliers, dvalue, needs, True, ctx.backend)
        return (*_for_problem(grads, need[:_N_PROBLEM]), None, grads.f, grads.g, grads.multipliers, None)


# ---- the loop of GeomLoss --------------------------------------------------------------------------------------------


def _symmetric(*args):
    inputs, (*loop, check, name) = _split(args)
    backend = dispatch.serving(inputs, name)
    if check:
        check_values(inputs, equal_masses=False)
    return backend.symmetric(inputs, *loop, check)


def _symmetric_fake(*args):
    inputs, _ = _split(args)
    shapes = (inputs.shape_f, inputs.shape_g) * 3
    return tuple(inputs.primary.new_empty(shape, dtype=inputs.compute_dtype) for shape in shapes)


class _Symmetric(_Function):
    """The op below autograd; each soft minimum as a function of its own points, all else held fixed."""

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _symmetric_op(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        s_a, s_b, *rest = outputs
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_N_TENSORS], s_a, s_b, *rest)
        ctx.sizes, ctx.backend = args[_N_TENSORS:_N_PROBLEM], args[-1]

    @staticmethod
    def backward(ctx, ds_a, ds_b, *_):
        need = ctx.needs_input_grad
        if ds_a is None and ds_b is None:
            return (None,) * len(need)
        *tensors, s_a, s_b, f, g, r_a, r_b = _saved(ctx)
        inputs, dx_a, dx_b = Inputs(*tensors, *ctx.sizes), None, None
        with torch.no_grad():
            if need[0] and ds_a is not None:
                dx_a = gradients.of_soft_minimum(inputs, s_a, g, r_a, ds_a, True, ctx.backend)
            if need[1] and ds_b is not None:
                dx_b = gradients.of_soft_minimum(inputs, f, s_b, r_b, ds_b, False, ctx.backend)
        # Not refused here: torch.func.vjp asks for a graph that nobody may use.
        message = "the gradient of GeomLoss's loop is not differentiable again; second derivatives exist of value"
        dx_a, dx_b = _refusing((dx_a, dx_b), message, (inputs.x_a, inputs.x_b, ds_a, ds_b))
        return (dx_a, dx_b, *(None for _ in need[2:]))


# ---- registration ----------------------------------------------------------------------------------------------------

_define(
    "sinkhorn",
    f"({_PROBLEM}, {_ITERATIONS}, float implicit_tol, int implicit_max_iter, bool check, str backend)"
    " -> (Tensor value, Tensor f, Tensor g, Tensor multipliers, Tensor marginal_error, Tensor n_iters)",
    _sinkhorn,
    _sinkhorn_fake,
)
_define(
    "sinkhorn_backward",
    f"({_PROBLEM}, Tensor f, Tensor g, Tensor dvalue, bool[] needs, str backend) -> {_SUMS}",
    _sinkhorn_backward,
    _sums_fake,
)
_define(
    "plan_backward",
    f"({_PROBLEM}, Tensor f, Tensor g, Tensor scale, Tensor? cost_scale, Tensor? dense, Tensor? row, Tensor? col, "
    f"bool[] needs, str backend) -> {_SUMS}",
    _plan_backward,
    _sums_fake,
)
_define(
    "implicit",
    f"({_PROBLEM}, Tensor f, Tensor g, Tensor? slope_a, Tensor? slope_b, Tensor? extra_a, Tensor? extra_b, "
    "Tensor u_a, Tensor u_b, bool singular, float tol, int max_iter, str backend)"
    " -> (Tensor p, Tensor q, Tensor residual, Tensor n_iters)",
    _implicit,
    _implicit_fake,
)
_define(
    "unrolled",
    f"({_PROBLEM}, {_ITERATIONS}, Tensor df, Tensor dg, Tensor dmultipliers, str backend)"
    " -> (Tensor dx_a, Tensor dx_b, Tensor dcost, Tensor da, Tensor db, Tensor dreg, Tensor drelaxation)",
    _unrolled,
    _unrolled_fake,
)
_define(
    "apply_plan",
    f"({_PROBLEM}, Tensor f, Tensor g, Tensor v, bool transpose, bool times_cost, str backend) -> Tensor",
    _apply_plan,
    _apply_plan_fake,
)
_define("plan", f"({_PROBLEM}, Tensor f, Tensor g, str backend) -> Tensor", _plan, _plan_fake)
_define(
    "symmetric",
    f"({_PROBLEM}, Tensor eps_start, Tensor n_steps, float eps_factor, float cost_floor, bool check, "
    "str backend) -> (Tensor s_a, Tensor s_b, Tensor f, Tensor g, Tensor r_a, Tensor r_b)",
    _symmetric,
    _symmetric_fake,
)
# Kernels of the autograd key, and not torch.library.register_autograd: that reads the schema anew in every call, which
# takes longer than a small problem.
for _name, _function in (
    ("sinkhorn", _Sinkhorn),
    ("sinkhorn_backward", _SinkhornBackward),
    ("apply_plan", _ApplyPlan),
    ("plan", _Plan),
    ("symmetric", _Symmetric),
):
    _library.impl(_name, _function.apply, "Autograd")
    dispatch.FUNCTIONS[_name] = _function
for _name in ("plan_backward", "implicit", "unrolled"):
    _op = getattr(torch.ops.otkern, _name).default
    torch.library.register_vmap(
        f"otkern::{_name}", lambda info, in_dims, *args, _op=_op: _over_batch(info, in_dims, args, _op), lib=_library
    )
_sinkhorn_op, _sinkhorn_backward_op, _apply_plan_op, _plan_op, _symmetric_op = (
    torch.ops.otkern.sinkhorn.default,
    torch.ops.otkern.sinkhorn_backward.default,
    torch.ops.otkern.apply_plan.default,
    torch.ops.otkern.plan.default,
    torch.ops.otkern.symmetric.default,
)
