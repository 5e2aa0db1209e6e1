"""GeomLoss's `SamplesLoss`, by its own conventions: model code that uses it changes the import."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from otkern import backends, debiasing, ops
from otkern.arguments import is_number, read_points, read_relaxation
from otkern.problem import Inputs, bounding_box, item_sums, masses, weights_of
from otkern.solve import Integers, solve_sample

# Where GeomLoss names a way of computing, the fastest backend serves it: the answer is the same.
GEOMLOSS_BACKENDS = ("auto", "tensorized", "online")
# With p = 1 GeomLoss takes a distance for at least this much.
LEAST_DISTANCE = 1e-4
# More steps than any sensible ladder has: a diameter that is not finite must not hang the loop.
MOST_STEPS = 1 << 20


class SamplesLoss(nn.Module):
    r"""The Sinkhorn divergence as GeomLoss computes it: the same call forms, values and gradients.

    The cost of a pair is :math:`C = |x - y|^p / p`, :math:`\varepsilon = \mathrm{blur}^p`,
    :math:`\rho = \mathrm{reach}^p`. By default the loss is that of GeomLoss's annealed loop, equations (23) to (26) of
    ``docs/derivations.md``: one step at each epsilon from :math:`\mathrm{diameter}^p` down by
    :math:`\mathrm{scaling}^p`, which leaves an error that grows as ``scaling`` falls. With ``tol`` it is solved to that
    marginal error instead.

    Args:
        loss: ``"sinkhorn"``.
        p: exponent of the cost, 1 or 2.
        blur: :math:`\varepsilon^{1/p}`, in the unit of the points, > 0.
        reach: :math:`\rho^{1/p}`, in the unit of the points, > 0: how far mass travels before it is created or
            destroyed instead; None: the balanced problem.
        diameter: where the ladder of epsilons starts, in the unit of the points. None: for each item the diagonal of
            the box around its two clouds; ``"batch"``: of the box around all of a batch, as GeomLoss has it, which
            makes an item's loss depend on the others of its batch.
        scaling: the ratio of two blurs of the ladder, in (0, 1).
        truncate, kernel, cluster_scale, verbose: without effect, as in GeomLoss's dense computation.
        cost: None; another cost is not supported.
        debias: :math:`S = \mathrm{OT}(a,b) - \mathrm{OT}(a,a)/2 - \mathrm{OT}(b,b)/2 + \varepsilon(\sum a-\sum b)^2/2`;
            False: :math:`\mathrm{OT}(a, b)`, less :math:`\varepsilon\,(\sum a\sum b - (\sum a + \sum b)/2)`.
        potentials: return a pair (F, G) of functions on the two clouds in place of the loss: the potentials between
            the clouds, with ``debias`` less those within each. In the balanced case they are the derivatives of the
            loss with respect to the weights.
        backend: ``"auto"``, ``"tensorized"`` or ``"online"``: the fastest that can run here; or a backend of
            `otkern.solve_sample` by its name.
        tol: L1 gap between the marginals of the plans and the weights; None: the annealed loop.
        max_iter: with ``tol``: iterations at most.

    Shape:
        ``loss(x, y)`` or ``loss(a, x, b, y)``: x (N, D) or (B, N, D), y (M, D) or (B, M, D), a (N,) or (B, N),
        b (M,) or (B, M), uniform where not given; ``lengths_a``, ``lengths_b`` (B,): true sizes of a padded batch.
        Returns a scalar or (B,), float64 for float64 points, else float32; with ``potentials`` (B, N) and (B, M), or
        (1, N) and (1, M) as GeomLoss does.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: another ``loss`` or ``cost``, labels of clusters, second derivatives of the loop.

    Note:
        The gradient with respect to the points is that of the loop's last step, with the potentials that went into it
        held fixed; with respect to the weights, the partial one at those potentials. With ``reach`` GeomLoss's
        gradients lack a factor of (ρ + ε) / (ρ + ε/2), which these have. The potentials are differentiable with
        respect to their own cloud (with ``tol``: not at all). With p = 1 distances below 1e-4 count as that much, as
        in GeomLoss (not with ``tol``); their gradient is that of the distance.

    Example:
        >>> import torch, otkern
        >>> loss = otkern.SamplesLoss("sinkhorn", p=2, blur=0.05)
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> value = loss(x, x.detach() + 2)
        >>> value
        tensor(2., grad_fn=<SqueezeBackward1>)
        >>> value.backward()
        >>> x.grad.squeeze().round(decimals=3)
        tensor([-1., -1.])
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | str | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost=None,
        kernel=None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float | None = None,
        max_iter: int = 1000,
    ):
        super().__init__()
        _check_options(loss, p, blur, reach, diameter, scaling, cost, backend)
        self.loss, self.p, self.blur, self.reach, self.diameter, self.scaling = loss, p, blur, reach, diameter, scaling
        self.truncate, self.cost, self.kernel, self.cluster_scale = truncate, cost, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend
        self.tol, self.max_iter = tol, max_iter

    def forward(
        self, *args: Tensor, lengths_a: Integers | None = None, lengths_b: Integers | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of (x, y) or (a, x, b, y)."""
        a, x, b, y = _read_arguments(args)
        # The kernels' squared distance is twice GeomLoss's cost, and so are all quantities in its unit.
        unit = float(self.p)
        eps, rho = unit * self.blur**self.p, None if self.reach is None else unit * self.reach**self.p
        metric = "sqeuclidean" if self.p == 2 else "euclidean"
        backend = None if self.backend in GEOMLOSS_BACKENDS else self.backend
        if self.tol is not None:
            return self._converged(a, x, b, y, metric, eps, rho, backend, lengths_a, lengths_b)
        inputs, batched = read_points(x, y, a, b, eps, metric, lengths_a, lengths_b, None, None, None, None)
        inputs = read_relaxation(inputs, rho, None, None, entropy=False)
        f, g, f_self, g_self = self._loop(inputs, unit, backends.choose(backend, inputs.device.type))
        if self.potentials:
            pair = (f - f_self, g - g_self) if self.debias else (f, g)
            return pair[0] / unit, pair[1] / unit
        value = _value(inputs, eps, rho, f, g, f_self, g_self) / unit
        return value if batched else value.squeeze(0)

    def extra_repr(self) -> str:
        names = ("loss", "p", "blur", "reach", "diameter", "scaling", "debias", "potentials", "backend", "tol")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _loop(self, inputs: Inputs, unit: float, backend: str):
        """The potentials (f, g) between the clouds and (f, g) within them, the latter None without ``debias``."""
        check, floor = inputs.device.type == "cpu", LEAST_DISTANCE if self.p == 1 else 0.0
        eps_start, n_steps = self._ladder(inputs, unit)

        def solve(problem: Inputs) -> tuple[Tensor, ...]:
            copies = problem.batch // max(inputs.batch, 1)
            loop = (eps_start.repeat(copies), n_steps.repeat(copies), self.scaling**self.p, floor)
            s_a, s_b, _, _, r_a, r_b = ops.symmetric(problem, *loop, check, backend)
            # A point that reaches nothing has an infinite soft minimum; 0 stands for it, also where there is no weight.
            return tuple(
                torch.where((ratio == 0) & (weights_of(problem, side_a) > 0), math.inf, s)
                for s, ratio, side_a in ((s_a, r_a, True), (s_b, r_b, False))
            )

        if self.debias:
            pair, (f_self, _), (g_self, _) = debiasing.solve_three(inputs, check, backend, solve, ("row", "column"))
        else:
            pair, f_self, g_self = solve(inputs), None, None
        # equation (13)
        damping = 1.0 if self.reach is None else 1 / (1 + (self.blur / self.reach) ** self.p)
        return tuple(None if s is None else damping * s for s in (*pair, f_self, g_self))

    def _ladder(self, inputs: Inputs, unit: float) -> tuple[Tensor, Tensor]:
        """The first epsilon of each item and how many lie between it and the last one, equation (23); (B,) each."""
        if self.diameter is not None and self.diameter != "batch":
            given = float(self.diameter)
            start, end, step = (self.p * math.log(v) for v in (given, self.blur, self.scaling))
            count = min(max(math.ceil((end - start) / step), 0), MOST_STEPS)
            n_steps = torch.full((inputs.batch,), count, dtype=torch.int32, device=inputs.device)
            return torch.full_like(inputs.reg, unit * given**self.p), n_steps
        if inputs.batch == 0 or inputs.max_a == 0 or inputs.max_b == 0:
            return inputs.reg, torch.zeros_like(inputs.reg, dtype=torch.int32)
        low, top = bounding_box(inputs.detach())
        if self.diameter == "batch":
            low, top = low.amin(0, keepdim=True), top.amax(0, keepdim=True)
        diameter = torch.where(top >= low, top - low, 0).norm(dim=1).double().expand(inputs.batch)
        end, step = self.p * math.log(self.blur), self.p * math.log(self.scaling)
        steps = ((end - self.p * diameter.log()) / step).ceil().nan_to_num(0).clamp(0, MOST_STEPS)
        eps_start = (unit * diameter**self.p).to(inputs.reg.dtype)
        # Where all points coincide every epsilon gives the same.
        usable = (eps_start > torch.finfo(eps_start.dtype).tiny) & eps_start.isfinite()
        return torch.where(usable, eps_start, inputs.reg), steps.to(torch.int32)

    def _converged(self, a, x, b, y, metric, eps, rho, backend, lengths_a, lengths_b):
        """The loss at a marginal error of at most ``tol``."""
        result = solve_sample(
            x,
            y,
            a,
            b,
            metric=metric,
            reg=eps,
            lengths_a=lengths_a,
            lengths_b=lengths_b,
            unbalanced=rho,
            max_iter=self.max_iter,
            tol=self.tol,
            scaling=self.scaling,
            debias=self.debias,
            backend=backend,
        )
        if self.potentials:
            f, g = (potential.detach() for potential in result.potentials)
            if result.self_potentials is not None:
                f, g = f - result.self_potentials[0], g - result.self_potentials[1]
            f, g = (f, g) if x.dim() == 3 else (f.unsqueeze(0), g.unsqueeze(0))
            return f / self.p, g / self.p
        value = result.value
        if not self.debias:
            mass_a, mass_b = (masses(result._inputs, side_a).reshape(value.shape) for side_a in (True, False))
            value = value + eps * ((mass_a + mass_b) / 2 - mass_a * mass_b)
        return value / self.p


def _value(inputs: Inputs, eps: float, rho: float | None, f, g, f_self, g_self) -> Tensor:
    """Equation (25), (B,): the loss at given potentials, with the gradient of equation (26)."""

    def terms(potential: Tensor) -> Tensor:
        return potential if rho is None else -torch.expm1(-potential / rho)

    def sums(side_a: bool, between: Tensor, within: Tensor | None) -> Tensor:
        difference = terms(between) if within is None else terms(between) - terms(within)
        weights = weights_of(inputs, side_a)
        # Where nothing is reached the balanced loss is infinite, and infinite less infinite is no loss.
        difference = torch.where(between.isposinf() & (rho is None), between, difference)
        return item_sums(inputs, side_a, weights * difference)

    total = sums(True, f, f_self) + sums(False, g, g_self)
    if rho is None:
        return total
    value = (rho + eps / 2) * total.detach() + (rho + eps) * (total - total.detach())
    if f_self is None:
        mass = masses(inputs, True) + masses(inputs, False)
        value = value - eps / 2 * (mass - mass.detach())
    return value


def _read_arguments(args: tuple) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """(a, x, b, y) of GeomLoss's call forms; weights may have one more axis, of size 1."""
    if len(args) == 6:
        labels_x, a, x, labels_y, b, y = args
        if labels_x is not None or labels_y is not None:
            raise NotImplementedError("labels of clusters are not supported: clouds are never clustered here")
    elif len(args) == 4:
        a, x, b, y = args
    elif len(args) == 2:
        (x, y), a, b = args, None, None
    else:
        raise ValueError(
            f"a SamplesLoss takes (x, y), (a, x, b, y) or (None, a, x, None, b, y), not {len(args)} tensors"
        )
    if isinstance(x, Tensor):
        a, b = (
            w.squeeze(-1) if isinstance(w, Tensor) and w.dim() == x.dim() and w.shape[-1] == 1 else w for w in (a, b)
        )
    return a, x, b, y


def _check_options(loss, p, blur, reach, diameter, scaling, cost, backend) -> None:
    if loss != "sinkhorn":
        if loss in ("energy", "gaussian", "laplacian", "hausdorff"):
            raise NotImplementedError(
                f"loss={loss!r} is a kernel norm and no optimal transport: use geomloss.SamplesLoss for it"
            )
        raise ValueError(f"loss must be 'sinkhorn', but was {loss!r}")
    if cost is not None:
        raise NotImplementedError("cost: form your cost as a tensor M and use otkern.solve(M, a, b, reg=...)")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, but was {p!r}")
    for name, value in (("blur", blur), ("reach", reach), ("diameter", diameter)):
        optional = name != "blur" and (value is None or (name == "diameter" and value == "batch"))
        if not optional and not (is_number(value) and 0 < value < math.inf):
            allowed = {"blur": "", "reach": "None or ", "diameter": "None, 'batch' or "}[name]
            raise ValueError(f"{name} must be {allowed}a positive, finite number, but was {value!r}")
    if not is_number(scaling) or not 0 < scaling < 1:
        raise ValueError(f"scaling must be a number between 0 and 1, but was {scaling!r}")
    if backend == "multiscale":
        raise NotImplementedError("backend='multiscale' is an approximation; use backend='auto', which is exact")
    if backend not in (*GEOMLOSS_BACKENDS, *backends.BACKENDS):
        names = ", ".join((*GEOMLOSS_BACKENDS, *backends.BACKENDS))
        raise ValueError(f"backend must be one of {names}, but was {backend!r}")
