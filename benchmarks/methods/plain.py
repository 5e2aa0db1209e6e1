"""What a user writes in torch without a package: dense loops, eager and compiled, and the yardsticks."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.methods import Absent, Method
from benchmarks.problems import Answer, pairwise

CHECK_EVERY = 10  # iterations between two looks at the marginal error; each look costs one transfer on a GPU


class Dense(Method):
    """Dense cost, iterations without graph, envelope gradient: <P, C> with P held fixed."""

    linear = True
    inner = 1  # iterations in one call of ``steps_of``

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.a, self.b = (w[:, :, None] for w in clouds.weights())
        self.cost_of = pairwise

    def initial(self, cost: Tensor):
        """What the iterations read, and their first state."""
        raise NotImplementedError

    def iterate(self, fixed, state):
        """``inner`` full iterations."""
        raise NotImplementedError

    def rows(self, fixed, state) -> Tensor:
        """The plan's row sums (B, N, 1)."""
        raise NotImplementedError

    def finish(self, fixed, state) -> tuple[Tensor, Tensor, Tensor]:
        """The plan and the potentials f (B, N, 1), g (B, M, 1)."""
        raise NotImplementedError

    def _solve(self, cost: Tensor) -> Tensor:
        case = self.case
        fixed, state = self.initial(cost)
        done = 0
        while done < case.iterations:
            state = self.iterate(fixed, state)
            done += self.inner
            if case.tol is not None and done % CHECK_EVERY == 0:
                error = (self.rows(fixed, state) - self.a).abs().sum((1, 2)).max()
                if not float(error) > case.tol:
                    break
        self.steps = done
        plan, self.f, self.g = self.finish(fixed, state)
        return plan

    def values(self, x, y):
        cost = self.cost_of(self.computing(x), self.computing(y), self.case.metric)
        with torch.no_grad():
            plan = self._solve(cost)
        return (plan * cost).sum((1, 2))

    def potentials(self):
        return self.f[..., 0], self.g[..., 0]


class KernelDomain(Dense):
    """u = 1 / K (b v), v = 1 / K' (a u) by batched matrix-vector products."""

    def initial(self, cost):
        kernel = torch.exp(-cost / self.reg)
        return (kernel, kernel.mT, self.a, self.b), (torch.ones_like(self.a), torch.ones_like(self.b))

    def iterate(self, fixed, state):
        return kernel_step(*fixed, *state, self.inner)

    def rows(self, fixed, state):
        kernel, _, a, b = fixed
        return a * state[0] * torch.bmm(kernel, b * state[1])

    def finish(self, fixed, state):
        u, v = state
        plan = fixed[0] * (self.a * u) * (self.b * v).mT
        return plan, self.reg * u.log(), self.reg * v.log()


class LogDomain(Dense):
    """f and g by logsumexp."""

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.log_a, self.log_b = self.a.log(), self.b.mT.log()

    def initial(self, cost):
        start = (torch.zeros_like(self.log_a), torch.zeros_like(self.log_b))
        return (-cost / self.reg, self.log_a, self.log_b), start

    def iterate(self, fixed, state):
        return log_step(*fixed, *state, self.inner)

    def rows(self, fixed, state):
        scaled, log_a, log_b = fixed
        f, g = state
        return torch.exp(log_a + f + torch.logsumexp(log_b + g + scaled, 2, keepdim=True))

    def finish(self, fixed, state):
        f, g = state
        plan = torch.exp(f + g + fixed[0] + self.log_a + self.log_b)
        return plan, self.reg * f, self.reg * g.mT


def kernel_step(kernel, transposed, a, b, u, v, count: int):
    for _ in range(count):
        u = 1 / torch.bmm(kernel, b * v)
        v = 1 / torch.bmm(transposed, a * u)
    return u, v


def log_step(scaled, log_a, log_b, f, g, count: int):
    for _ in range(count):
        f = -torch.logsumexp(log_b + g + scaled, 2, keepdim=True)
        g = -torch.logsumexp(log_a + f + scaled, 1, keepdim=True)
    return f, g


class _Compiled(Dense):
    """The same with cost and iterations through torch.compile, several iterations a graph."""

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        if case.iterations % 5:
            raise Absent("compiled for blocks of five iterations")
        self.inner = 5
        self.setting = "torch.compile (inductor), 5 iterations a graph"
        self.cost_of = torch.compile(pairwise, dynamic=False)
        self._step = torch.compile(self.step, dynamic=False)

    def iterate(self, fixed, state):
        return self._step(*fixed, *state, self.inner)


class CompiledKernelDomain(_Compiled, KernelDomain):
    """`KernelDomain` compiled."""

    step = staticmethod(kernel_step)


class CompiledLogDomain(_Compiled, LogDomain):
    """`LogDomain` compiled."""

    step = staticmethod(log_step)


class CostAlone(Method):
    """A yardstick: the cost and its backward in torch, without any iteration. Padded like the peers."""

    linear = True

    def values(self, x, y):
        return pairwise(self.computing(x), self.computing(y), self.case.metric).sum((1, 2))


class ThreeProducts(Method):
    """A yardstick: x y', P y and P' x by torch.bmm and nothing else, in the dtype of the points."""

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        if case.part != "both":
            raise Absent("three products are a forward and a backward")
        self.plan = torch.rand(case.batch, case.n, case.m, device=case.device).to(clouds.x.dtype)

    def both(self) -> Answer:
        x, y = self.clouds.x, self.clouds.y
        cost = torch.bmm(x, y.mT)
        return Answer(cost, True, torch.bmm(self.plan, y), torch.bmm(self.plan.mT, x))
