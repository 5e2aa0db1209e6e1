"""Calls of otkern that several test files make of the fixture problems."""

import otkern
from tests.problems import Problem


def solve_cost(problem: Problem, backend, device, **options) -> otkern.OTResult:
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    return otkern.solve(cost, a, b, **({"reg": problem.reg, "max_iter": 80, "backend": backend} | options))
