"""Every row of ``docs/coming-from.md``: both calls give the same numbers."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import otkern

PAGE = Path(__file__).parent.parent / "docs" / "coming-from.md"
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
EPS, RHO = 0.5, 2.0


def _names() -> dict:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 5))
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 for n in (6, 5))
    a, b = a / a.sum(), b / b.sum()

    def gradient_of_a(loss):
        leaf = a.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, x, b, y), leaf)[0]

    return {
        "x": x, "y": y, "a": a, "b": b, "C": torch.cdist(x, y).square(), "eps": EPS, "rho": RHO, "math": math,
        "exact": {"max_iter": 5000, "tol": 1e-12}, "otkern": otkern, "gradient_of_a": gradient_of_a,
    }  # fmt: skip


def _plan_of_ott(names: dict, tau_a: float, tau_b: float) -> torch.Tensor:
    """The fixed point of OTT-JAX's updates with tau, from their definition."""
    a, b, cost = names["a"], names["b"], names["C"]
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(2000):
        f = tau_a * EPS * (a.log() - torch.logsumexp((g - cost) / EPS, 1))
        g = tau_b * EPS * (b.log() - torch.logsumexp((f[:, None] - cost) / EPS, 0))
    return torch.exp((f[:, None] + g - cost) / EPS)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_both_calls_give_the_same_numbers(row):
    theirs, ours = ROWS[row]
    names = _names()
    for package in ("ot", "geomloss"):
        if re.search(rf"\b{package}\.", theirs):
            names[package] = pytest.importorskip(package, reason=f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = _plan_of_ott(names, 0.9, 0.8) if theirs.startswith("LinearProblem") else eval(theirs, names)
        got = eval(ours, names)
    # GeomLoss's last steps with scaling=0.99 are not quite the limit.
    tolerance = 1e-3 if "0.99" in theirs and "debias" not in theirs else 1e-7
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_every_package_has_rows():
    assert len(ROWS) >= 12
    assert {name for name in ("ot.", "geomloss.", "LinearProblem") if any(name in row[0] for row in ROWS)} == {
        "ot.", "geomloss.", "LinearProblem",
    }  # fmt: skip


def test_the_values_of_the_two_forms_of_tau_differ_by_a_known_constant():
    names = _names()
    x, y, a, b, options = (names[name] for name in ("x", "y", "a", "b", "exact"))
    options = options | {"reg": EPS, "reg_type": "entropy", "unbalanced": (9 * EPS, 4 * EPS)}
    by_cost = otkern.solve(names["C"] - EPS, a, b, **options).value
    by_points = otkern.solve_sample(x, y, a * math.exp(1 / 9), b, **options).value
    torch.testing.assert_close(by_points, by_cost + 9 * EPS * (math.exp(1 / 9) - 1))
