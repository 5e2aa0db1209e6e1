"""GeomLoss's `SamplesLoss`, by its own conventions: model code that uses it changes the import."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from otkern import kernel_losses
from otkern.annealing import Settings, annealed_potentials, read_settings
from otkern.arguments import read_points, read_relaxation
from otkern.calls import refuse_forward_mode
from otkern.problem import Inputs, check_points, check_values, item_sums, masses, weights_of
from otkern.solve import Integers, solve_sample


class SamplesLoss(nn.Module):
    r"""The Sinkhorn divergence as GeomLoss computes it: the same call forms, values and gradients.

    The cost of a pair is :math:`C = |x - y|^p / p`, :math:`\varepsilon = \mathrm{blur}^p`,
    :math:`\rho = \mathrm{reach}^p`. By default the loss is that of GeomLoss's annealed loop, equations (23) to (26) of
    ``docs/derivations.md``: one step at each epsilon from :math:`\mathrm{diameter}^p` down by
    :math:`\mathrm{scaling}^p`, which leaves an error that grows as ``scaling`` falls. With ``tol`` it is solved to that
    marginal error instead.

    Args:
        loss: ``"sinkhorn"``; or one of the kernel norms of `otkern.kernel_losses`, ``"energy"``, ``"gaussian"`` and
            ``"laplacian"``, which read ``blur``, ``kernel`` and ``potentials`` alone.
        p: exponent of the cost, 1 or 2; with a ``cost`` of your own any number > 0.
        blur: :math:`\varepsilon^{1/p}`, in the unit of the points, > 0.
        reach: :math:`\rho^{1/p}`, in the unit of the points, > 0: how far mass travels before it is created or
            destroyed instead; None: the balanced problem.
        diameter: where the ladder of epsilons starts, in the unit of the points. None: for each item the diagonal of
            the box around its two clouds; ``"batch"``: of the box around all of a batch, as GeomLoss has it, which
            makes an item's loss depend on the others of its batch.
        scaling: the ratio of two blurs of the ladder, in (0, 1).
        cost: None, or a function that takes clouds (B, N, D) and (B, M, D) and returns costs (B, N, M). Its matrix is
            held in memory, and it must be symmetric, cost(y, x) = cost(x, y) transposed.
        kernel: for a kernel norm: None, or a function ``kernel(x, y, blur=..., use_keops=False, ranges=None)`` that
            returns (B, N, M).
        truncate, cluster_scale, verbose: without effect, as in GeomLoss's dense computation.
        debias: :math:`S = \mathrm{OT}(a,b) - \mathrm{OT}(a,a)/2 - \mathrm{OT}(b,b)/2 + \varepsilon(\sum a-\sum b)^2/2`;
            False: :math:`\mathrm{OT}(a, b)`, less :math:`\varepsilon\,(\sum a\sum b - (\sum a + \sum b)/2)`.
        potentials: return a pair (F, G) of functions on the two clouds in place of the loss: the potentials between
            the clouds, with ``debias`` less those within each. In the balanced case they are the derivatives of the
            loss with respect to the weights.
        backend: ``"auto"``, ``"tensorized"``, ``"online"`` or ``"multiscale"``: the fastest that can run here, and the
            exact answer; or a backend of `otkern.solve_sample` by its name.
        tol: L1 gap between the marginals of the plans and the weights; None: the annealed loop.
        max_iter: with ``tol``: iterations at most.

    Shape:
        ``loss(x, y)``, ``loss(a, x, b, y)`` or ``loss(labels_x, a, x, labels_y, b, y)``, whose labels have no effect:
        x (N, D) or (B, N, D), y (M, D) or (B, M, D), a (N,) or (B, N), b (M,) or (B, M), uniform where not given;
        ``lengths_a``, ``lengths_b`` (B,): true sizes of a padded batch.
        Returns a scalar or (B,), float64 for float64 points, else float32; with ``potentials`` (B, N) and (B, M), or
        (1, N) and (1, M) as GeomLoss does.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        NotImplementedError: ``loss="hausdorff"``, a formula of KeOps as ``cost``, ``tol`` with a ``cost``, second
            derivatives of the loop.

    Note:
        The gradient with respect to the points is that of the loop's last step, with the potentials that went into it
        held fixed; with respect to the weights, the partial one at those potentials. With ``reach`` GeomLoss's
        gradients lack a factor of (ρ + ε) / (ρ + ε/2), which these have. The potentials are differentiable with
        respect to their own cloud (with ``tol``: not at all). With p = 1 distances below 1e-4 count as that much where
        GeomLoss does so (``backend="tensorized"``, and ``"auto"`` up to 25 million pairs; not with ``tol``); their
        gradient is that of the distance. Masses that differ are taken as they are, as in GeomLoss; with ``tol`` they
        are refused. Attributes may be set after construction: each call checks and obeys them. Weights are taken in
        the dtype of the arithmetic, float64 for float64 points and float32 for all others, whatever autocast says.

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
        p: float = 2,
        blur: float | Tensor = 0.05,
        reach: float | Tensor | None = None,
        diameter: float | Tensor | str | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        kernel: Callable[..., Tensor] | None = None,
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
        self.loss, self.p, self.blur, self.reach, self.diameter, self.scaling = loss, p, blur, reach, diameter, scaling
        self.truncate, self.cost, self.kernel, self.cluster_scale = truncate, cost, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend
        self.tol, self.max_iter = tol, max_iter
        self._settings()

    def _settings(self) -> Settings:
        """What the attributes ask for by now: they may have been set since the loss was made."""
        names = ("loss", "p", "blur", "reach", "diameter", "scaling", "cost", "kernel", "debias", "potentials")
        return read_settings({name: getattr(self, name) for name in (*names, "backend", "tol", "max_iter")})

    def forward(
        self, *args: Tensor, lengths_a: Integers | None = None, lengths_b: Integers | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y)."""
        a, x, b, y = _read_arguments(args)
        settings = self._settings()
        if settings.tol is not None:
            return _converged(settings, a, x, b, y, lengths_a, lengths_b)
        eps, rho, metric = settings.eps, settings.rho, settings.metric
        inputs, batched = read_points(x, y, a, b, eps, metric, lengths_a, lengths_b, None, None, None, None)
        if settings.loss != "sinkhorn":
            return _kernel_loss(settings, inputs, batched)
        refuse_forward_mode(inputs)
        inputs = read_relaxation(inputs, rho, None, None, entropy=False)
        f, g, f_self, g_self = annealed_potentials(settings, inputs)
        unit = settings.unit
        if settings.potentials:
            pair = (f, g) if f_self is None or g_self is None else (f - f_self, g - g_self)
            return pair[0] / unit, pair[1] / unit
        value = _value(inputs, eps, rho, f, g, f_self, g_self) / unit
        return value if batched else value.squeeze(0)

    def extra_repr(self) -> str:
        names = ("loss", "p", "blur", "reach", "diameter", "scaling", "debias", "potentials", "backend", "tol")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _converged(settings: Settings, a, x, b, y, lengths_a, lengths_b):
    """The loss at a marginal error of at most ``tol``."""
    result = solve_sample(
        x,
        y,
        a,
        b,
        metric=settings.metric,
        reg=settings.eps,
        lengths_a=lengths_a,
        lengths_b=lengths_b,
        unbalanced=settings.rho,
        max_iter=settings.max_iter,
        tol=settings.tol,
        scaling=settings.scaling,
        debias=settings.debias,
        backend=settings.backend,
    )
    unit = settings.unit
    if settings.potentials:
        f, g = (potential.detach() for potential in result.potentials)
        if result.self_potentials is not None:
            f, g = f - result.self_potentials[0], g - result.self_potentials[1]
        f, g = (f, g) if x.dim() == 3 else (f.unsqueeze(0), g.unsqueeze(0))
        return f / unit, g / unit
    value = result.value
    if not settings.debias:
        mass_a, mass_b = (masses(result._inputs, side_a).reshape(value.shape) for side_a in (True, False))
        value = value + settings.eps * ((mass_a + mass_b) / 2 - mass_a * mass_b)
    return value / unit


def _kernel_loss(settings: Settings, inputs: Inputs, batched: bool) -> Tensor | tuple[Tensor, Tensor]:
    """One of the kernel norms that GeomLoss offers beside transport, or that of the user's kernel."""
    if inputs.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(inputs, equal_masses=False)
        check_points(inputs)
    kernel = settings.kernel
    if kernel is None:
        kernel = kernel_losses.kernel_of(settings.loss, settings.blur, settings.least_distance(inputs))
    if settings.potentials:
        return kernel_losses.kernel_potentials(inputs, kernel)
    value = kernel_losses.kernel_norm(inputs, kernel)
    return value if batched else value.squeeze(0)


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
        # Labels of clusters say how GeomLoss is to approximate; the answer here is the exact one.
        _, a, x, _, b, y = args
    elif len(args) == 4:
        a, x, b, y = args
    elif len(args) == 2:
        (x, y), a, b = args, None, None
    else:
        raise ValueError(
            f"a SamplesLoss takes (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y), not {len(args)} tensors"
        )
    if isinstance(x, Tensor):
        a, b = (
            w.squeeze(-1) if isinstance(w, Tensor) and w.dim() == x.dim() and w.shape[-1] == 1 else w for w in (a, b)
        )
    return a, x, b, y
