"""Potentials in the conventions of POT and OTT-JAX, against those packages."""

import ot
import pytest
import torch

import otkern
from otkern.interop import POT_FORMS, to_ott, to_pot
from tests.problems import Problem, make_batch, make_problem, offsets, pad


def positive(problem: Problem) -> Problem:
    """Without weights of 0, where the logarithms are infinite."""
    a, b = problem.a + 0.02, problem.b + 0.02
    return problem._replace(a=a / a.sum(), b=b / b.sum())


def solve(problem: Problem, backend, device, **options) -> otkern.OTResult:
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    return otkern.solve(cost, a, b, reg=problem.reg, backend=backend, **({"max_iter": 200} | options))


def assert_same_up_to_a_constant(actual, expected, atol=1e-10):
    for mine, theirs, sign in zip(actual, expected, (1, -1), strict=True):
        shift = sign * (actual[0].cpu() - expected[0]).mean()
        torch.testing.assert_close(mine.cpu() - shift, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(3))
def test_log_potentials_are_those_of_pots_solvers(backend, device, seed):
    problem = positive(make_problem(9, 7, seed=seed))
    cost, a, b, reg = problem.cost, problem.a, problem.b, problem.reg
    mine = to_pot(solve(problem, backend, device))
    assert_same_up_to_a_constant(mine, ot.solve(cost, a, b, reg, tol=1e-12, max_iter=5000).potentials)
    batch = ot.solve_batch(cost[None], reg, a[None], b[None], tol=1e-12, max_iter=5000)
    assert_same_up_to_a_constant(mine, [potential[0] for potential in batch.potentials])
    _, log = ot.sinkhorn(a, b, cost, reg, method="sinkhorn_log", stopThr=1e-13, numItermax=5000, log=True)
    assert_same_up_to_a_constant(mine, (log["log_u"], log["log_v"]))


def test_log_potentials_are_those_of_pots_solve_sample(backend, device):
    problem = positive(make_problem(9, 7))
    x, y, a, b = (t.to(device) for t in problem[:4])
    mine = to_pot(otkern.solve_sample(x, y, a, b, reg=problem.reg, max_iter=200, backend=backend))
    for lazy in (False, True):
        theirs = ot.solve_sample(*problem[:4], reg=problem.reg, lazy=lazy, tol=1e-12, max_iter=5000)
        assert_same_up_to_a_constant(mine, theirs.potentials)


def test_scalings_and_costs_are_those_of_pots_sinkhorn(backend, device):
    problem = positive(make_problem(9, 7))
    result = solve(problem, backend, device)
    options = {"stopThr": 1e-13, "numItermax": 5000, "log": True}
    _, log = ot.sinkhorn(problem.a, problem.b, problem.cost, problem.reg, **options)
    u, v = to_pot(result, "scaling")
    assert_same_up_to_a_constant((u.log(), v.log()), (log["u"].log(), log["v"].log()))
    _, log = ot.sinkhorn(problem.a, problem.b, problem.cost, problem.reg, method="sinkhorn_stabilized", **options)
    assert_same_up_to_a_constant(to_pot(result, "cost"), (log["alpha"], log["beta"]))


def test_ratios_are_those_of_pots_unbalanced_solvers(backend, device):
    problem = positive(make_problem(9, 7))
    problem = problem._replace(b=1.3 * problem.b)
    mine = to_pot(solve(problem, backend, device, unbalanced=0.7), "ratio")
    cost, a, b, reg = problem.cost, problem.a, problem.b, problem.reg
    theirs = ot.solve(cost, a, b, reg, unbalanced=0.7, tol=1e-14, max_iter=5000)
    _, log = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, reg, 0.7, stopThr=1e-14, numItermax=5000, log=True)
    for expected in (theirs.potentials, (log["logu"], log["logv"])):
        # Nothing is free here: equal, and not up to a constant.
        for side in (0, 1):
            torch.testing.assert_close(mine[side].cpu(), expected[side], rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(2))
def test_potentials_are_those_of_ott(backend, device, seed):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    pytest.importorskip("ott", reason="ott is not installed")
    from ott.geometry.geometry import Geometry
    from ott.solvers import linear

    problem = positive(make_problem(9, 7, seed=seed))
    with jax.enable_x64(True):
        array = jax.numpy.asarray
        out = linear.solve(
            Geometry(array(problem.cost.numpy()), epsilon=problem.reg),
            array(problem.a.numpy()),
            array(problem.b.numpy()),
            threshold=1e-12,
            max_iterations=5000,
        )
        theirs = [torch.tensor(potential.tolist(), dtype=torch.float64) for potential in (out.f, out.g)]
    assert_same_up_to_a_constant(to_ott(solve(problem, backend, device)), theirs)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_form_gives_the_plan_in_every_layout(backend, device, layout):
    problems = make_batch([(9, 7), (5, 4), (1, 3)])
    sides = [[p[i].to(device) for p in problems] for i in range(4)]
    reg = torch.tensor([p.reg for p in problems], dtype=torch.float64, device=device)
    options = {"reg": reg, "max_iter": 20, "backend": backend}
    if layout == "padded":
        sizes = {f"lengths_{side}": [len(t) for t in sides[i]] for i, side in enumerate("ab")}
        result = otkern.solve_sample(*(pad(side) for side in sides), **sizes, **options)
    else:
        packing = {f"cu_seqlens_{side}": offsets(sides[i]).to(device) for i, side in enumerate("ab")}
        result = otkern.solve_sample(*(torch.cat(side) for side in sides), **packing, **options)

    def of_item(pair, k):
        (n, m) = (len(sides[0][k]), len(sides[1][k]))
        if layout == "padded":
            return pair[0][k, :n, None], pair[1][k, :m]
        return pair[0].split([len(t) for t in sides[0]])[k].unsqueeze(1), pair[1].split([len(t) for t in sides[1]])[k]

    for k, problem in enumerate(problems):
        cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
        n, m = cost.shape
        for form in (*POT_FORMS, "ott"):
            u, v = of_item(to_ott(result) if form == "ott" else to_pot(result, form), k)
            if form == "scaling":
                plan = u * (-cost / problem.reg).exp() * v
            elif form in ("cost", "ott"):
                plan = ((u + v - cost) / problem.reg).exp()
            else:
                plan = (u + v - cost / problem.reg).exp()
            plan = a.unsqueeze(1) * b * plan if form == "ratio" else plan
            torch.testing.assert_close(plan, result.plan[k, :n, :m], rtol=1e-10, atol=1e-300)


def test_an_unknown_form_is_refused():
    result = otkern.solve(torch.zeros(2, 2), reg=1.0, backend="reference")
    with pytest.raises(ValueError, match=r"^form must be one of log, scaling, cost, ratio, but was 'f'$"):
        to_pot(result, "f")


def test_results_have_the_attributes_of_pots(backend, device):
    problem = positive(make_problem(9, 7))
    theirs = ot.solve_sample(*problem[:4], reg=problem.reg)
    x, y, a, b = (t.to(device) for t in problem[:4])
    mine = otkern.solve_sample(x, y, a, b, reg=problem.reg, max_iter=50, backend=backend)
    for name in ("value", "value_linear", "plan", "potential_a", "potential_b", "marginal_a", "marginal_b"):
        assert getattr(mine, name).shape == getattr(theirs, name).shape, name
    for name in ("potentials", "marginals"):
        assert [t.shape for t in getattr(mine, name)] == [t.shape for t in getattr(theirs, name)], name
