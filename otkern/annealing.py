"""GeomLoss's annealed loop, from the options of a `SamplesLoss` to the potentials that its value is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otkern import backends, debiasing, kernel_losses, ops
from otkern.arguments import is_number
from otkern.problem import Inputs, bounding_box, padded, padded_mask, unpadded, weights_of

# Where GeomLoss names a way of computing, the fastest backend serves it: the answer is the same.
GEOMLOSS_BACKENDS = ("auto", "tensorized", "online", "multiscale")
# GeomLoss takes a distance for at least this much where it forms matrices, which it does up to so many entries.
LEAST_DISTANCE = 1e-4
MOST_TENSORIZED = 5000**2
# More steps than any sensible ladder has: a diameter that is not finite must not hang the loop.
MOST_STEPS = 1 << 20


class Settings(NamedTuple):
    """The checked options of one call of a `SamplesLoss`."""

    loss: str
    p: float
    blur: float
    reach: float | None
    diameter: float | str | None
    scaling: float
    cost: Callable[[Tensor, Tensor], Tensor] | None
    kernel: Callable[[Tensor, Tensor], Tensor] | None
    debias: bool
    potentials: bool
    geomloss_backend: str | None  # None: `backend` was named
    backend: str | None
    tol: float | None
    max_iter: int

    @property
    def unit(self) -> float:
        """The kernels' cost over GeomLoss's: their squared distance is not halved."""
        return 1.0 if self.cost is not None else float(self.p)

    @property
    def eps(self) -> float:
        # A kernel norm has no epsilon, but its problem is read as every other is.
        return self.unit * self.blur**self.p if self.loss == "sinkhorn" else 1.0

    @property
    def rho(self) -> float | None:
        return None if self.reach is None else self.unit * self.reach**self.p

    @property
    def metric(self) -> str:
        return "euclidean" if self.p == 1 else "sqeuclidean"

    def least_distance(self, inputs: Inputs) -> float:
        """What GeomLoss takes a distance for at least."""
        if self.geomloss_backend == "auto":
            return LEAST_DISTANCE if inputs.max_a * inputs.max_b <= MOST_TENSORIZED else 0.0
        return 0.0 if self.geomloss_backend in ("online", "multiscale") else LEAST_DISTANCE


def read_settings(options: dict[str, Any]) -> Settings:
    """Check the attributes of a `SamplesLoss`.

    Raises:
        ValueError: a value out of its range; the message names it.
        NotImplementedError: what is served by no means, with what to use instead.
    """
    loss, p, scaling, backend = (options[name] for name in ("loss", "p", "scaling", "backend"))
    if loss == "hausdorff":
        raise NotImplementedError("loss='hausdorff' is not served; use loss='sinkhorn' or one of the kernel norms")
    if loss not in ("sinkhorn", *kernel_losses.NAMES):
        raise ValueError(f"loss must be 'sinkhorn' or one of {', '.join(kernel_losses.NAMES)}, but was {loss!r}")
    cost = _read_cost(options["cost"])
    if loss != "sinkhorn":
        p = 2  # no exponent: what is given has no effect
    elif cost is not None:
        if not is_number(p) or not 0 < p < math.inf:
            raise ValueError(f"p must be a positive, finite number, but was {p!r}")
        if options["tol"] is not None:
            raise NotImplementedError(
                "tol: with a cost of your own use otkern.solve(cost(x, y), a, b, reg=..., tol=...)"
            )
    elif p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, but was {p!r}")
    lengths = {name: _read_length(name, options[name]) for name in ("blur", "reach", "diameter")}
    if not is_number(scaling) or not 0 < scaling < 1:
        raise ValueError(f"scaling must be a number between 0 and 1, but was {scaling!r}")
    names = (*GEOMLOSS_BACKENDS, *backends.BACKENDS)
    if backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, but was {backend!r}")
    kernel = options["kernel"]
    if kernel is not None and not callable(kernel):
        raise ValueError(f"kernel must be None or a function of (x, y, blur=...), but was {kernel!r}")
    if kernel is not None:
        user_kernel, blur = kernel, lengths["blur"]

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            return user_kernel(x, y, blur=blur, use_keops=False, ranges=None)

    of_geomloss = backend in GEOMLOSS_BACKENDS
    return Settings(
        loss=loss,
        p=p,
        scaling=scaling,
        cost=cost if loss == "sinkhorn" else None,
        kernel=kernel,
        debias=bool(options["debias"]),
        potentials=bool(options["potentials"]),
        geomloss_backend=backend if of_geomloss else None,
        backend=None if of_geomloss else backend,
        tol=options["tol"] if loss == "sinkhorn" else None,
        max_iter=options["max_iter"],
        **lengths,
    )


def _read_length(name: str, value: Any) -> Any:
    """``blur``, ``reach`` or ``diameter``: a positive number, or a tensor of one element; the latter two optional."""
    if name != "blur" and (value is None or (name == "diameter" and isinstance(value, str) and value == "batch")):
        return value
    number = float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else value
    if not (is_number(number) and 0 < number < math.inf):
        allowed = {"blur": "", "reach": "None or ", "diameter": "None, 'batch' or "}[name]
        raise ValueError(f"{name} must be {allowed}a positive, finite number, but was {value!r}")
    return number


def _read_cost(cost: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if isinstance(cost, (tuple, list)) and len(cost) == 2 and callable(cost[1]):
        cost = cost[1]  # a formula of KeOps, and the function that it stands for
    if isinstance(cost, str):
        raise NotImplementedError(
            f"cost={cost!r} is a formula of KeOps: for a squared distance give p=2, for a distance p=1, for inner "
            'products otkern.SinkhornLoss(metric="cosine") or metric="dot", else a function of (x, y) that returns the '
            "costs (B, N, M)"
        )
    if cost is not None and not callable(cost):
        raise ValueError(f"cost must be None or a function of two clouds, but was {cost!r}")
    return cost


def annealed_potentials(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The potentials (f, g) between the clouds and (f, g) within them, the latter None without ``debias``."""
    backend = backends.choose(settings.backend, inputs.device.type)
    check = inputs.device.type == "cpu"
    floor = settings.least_distance(inputs) if settings.p == 1 and settings.cost is None else 0.0
    eps_start, n_steps = _ladder(settings, inputs)

    def loop(problem: Inputs) -> tuple[Tensor, ...]:
        copies = problem.batch // max(inputs.batch, 1)
        ladder = (eps_start.repeat(copies), n_steps.repeat(copies), settings.scaling**settings.p, floor)
        return ops.symmetric(problem, *ladder, check, backend)

    def solve(problem: Inputs) -> tuple[Tensor, ...]:
        s_a, s_b, _, _, r_a, r_b = loop(problem)
        # A point that reaches nothing has an infinite soft minimum; 0 stands for it, also where there is no weight.
        return tuple(
            torch.where((ratio == 0) & (weights_of(problem, side_a) > 0), math.inf, s)
            for s, ratio, side_a in ((s_a, r_a, True), (s_b, r_b, False))
        )

    f_self: Tensor | None = None
    g_self: Tensor | None = None
    if settings.cost is not None:
        f, g = _with_cost(settings.cost, inputs, loop)
        if settings.debias:
            f_self, g_self = (
                _with_cost(settings.cost, debiasing.within(inputs, side_a), loop)[0] for side_a in (True, False)
            )
    elif settings.debias:
        (f, g), (f_self, _), (g_self, _) = debiasing.solve_three(inputs, check, backend, solve, ("row", "column"))
    else:
        f, g = solve(inputs)
    # equation (13)
    damping = 1.0 if settings.reach is None else 1 / (1 + (settings.blur / settings.reach) ** settings.p)
    f_self, g_self = (None if s is None else damping * s for s in (f_self, g_self))
    return damping * f, damping * g, f_self, g_self


def _with_cost(
    cost: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, loop: Callable[[Inputs], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """(f, g) for a cost that a function forms, as a dense matrix; each is differentiated through its own points.

    The last soft minima are formed in torch, where autograd leads to the cost and from there to the points.
    """
    assert inputs.x_a is not None and inputs.x_b is not None
    x, y = _filled(inputs, True, inputs.x_a), _filled(inputs, False, inputs.x_b)
    between = (_checked(cost(x, y.detach()), x, y), _checked(cost(y, x.detach()), y, x))
    problem = inputs._replace(
        x_a=None, x_b=None, cost=between[0].detach().contiguous(), metric="cost", a=None, b=None, first_self=-1
    )
    a, b = (padded(inputs, side_a, weights_of(inputs, side_a)) for side_a in (True, False))
    problem = problem._replace(a=a.detach().contiguous(), b=b.detach().contiguous())
    _, _, f, g, _, _ = loop(problem)
    eps = inputs.reg.double()[:, None, None]
    potentials = []
    for costs, other, weights, side_a in ((between[0], g, b, True), (between[1], f, a, False)):
        weights = weights.detach()
        log_weights = torch.where(weights > 0, torch.where(weights > 0, weights, 1).log(), -math.inf)
        exponent = (other.double()[:, None, :] - costs.double()) / eps + log_weights.double()[:, None, :]
        reached = (exponent > -math.inf).any(2, keepdim=True)
        soft_min = -eps * torch.logsumexp(torch.where(reached, exponent, 0), 2, keepdim=True)
        own = b if not side_a else a
        unreached = torch.where(own.unsqueeze(2) > 0, math.inf, 0.0)
        potential = torch.where(reached, soft_min, unreached).squeeze(2).to(inputs.compute_dtype)
        potentials.append(unpadded(inputs, side_a, torch.where(padded_mask(inputs, side_a), potential, 0)))
    return potentials[0], potentials[1]


def _filled(inputs: Inputs, side_a: bool, points: Tensor) -> Tensor:
    """The points of a side with each item's first one in its padding: a cost may be undefined at 0, as a cosine is."""
    points = padded(inputs, side_a, points)
    return torch.where(padded_mask(inputs, side_a).unsqueeze(2), points, points[:, :1].detach())


def _checked(costs: Any, x: Tensor, y: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[1], y.shape[1])
    if not isinstance(costs, Tensor) or tuple(costs.shape) != shape:
        got = f"has shape {tuple(costs.shape)}" if isinstance(costs, Tensor) else f"is a {type(costs).__name__}"
        raise ValueError(f"cost must return a tensor of shape {shape} for clouds {x.shape} and {y.shape}, but it {got}")
    return costs.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _ladder(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The first epsilon of each item and how many lie between it and the last one, equation (23); (B,) each."""
    unit = settings.unit
    if settings.diameter is not None and settings.diameter != "batch":
        given = float(settings.diameter)
        start, end, step = (settings.p * math.log(v) for v in (given, settings.blur, settings.scaling))
        count = min(max(math.ceil((end - start) / step), 0), MOST_STEPS)
        n_steps = torch.full((inputs.batch,), count, dtype=torch.int32, device=inputs.device)
        return torch.full_like(inputs.reg, unit * given**settings.p), n_steps
    if inputs.batch == 0 or inputs.max_a == 0 or inputs.max_b == 0:
        return inputs.reg, torch.zeros_like(inputs.reg, dtype=torch.int32)
    low, top = bounding_box(inputs.detach())
    if settings.diameter == "batch":
        low, top = low.amin(0, keepdim=True), top.amax(0, keepdim=True)
    diameter = torch.where(top >= low, top - low, 0).norm(dim=1).double().expand(inputs.batch)
    end, step = settings.p * math.log(settings.blur), settings.p * math.log(settings.scaling)
    steps = ((end - settings.p * diameter.log()) / step).ceil().nan_to_num(0).clamp(0, MOST_STEPS)
    eps_start = (unit * diameter**settings.p).to(inputs.reg.dtype)
    # Where all points coincide every epsilon gives the same.
    usable = (eps_start > torch.finfo(eps_start.dtype).tiny) & eps_start.isfinite()
    return torch.where(usable, eps_start, inputs.reg), steps.to(torch.int32)
