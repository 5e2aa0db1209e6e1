"""Public calls: the compiled Triton kernels give the reference's answer."""

import pytest
import torch

import otkern

RELAXED = {
    "unbalanced": {"unbalanced": 1.0},
    "semi": {"unbalanced": (1.0, float("inf"))},
    "mass": {"mass": 0.7},
    "null_cost": {"null_cost": 3.0},
    "scaling": {"scaling": 0.5},
}
CASES = {"balanced": {}, "entropy": {"reg_type": "entropy"}, **RELAXED}


def cloud(size: int, features: int, seed: int, dtype=torch.float32):
    return torch.randn(size, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cost(dtype=torch.float32):
    return torch.cdist(cloud(14, 3, 0, torch.float64), cloud(12, 3, 1, torch.float64)).square().to(dtype)


def assert_same(solve, kernel, device, tolerance):
    """Value, potentials and iterations of three or more iterations, on the reference and from the compiled kernel."""
    expected, result = solve("reference"), solve("triton")
    assert device.launches == [kernel]
    torch.testing.assert_close(result.value, expected.value, rtol=tolerance, atol=tolerance)
    for side in ("potential_a", "potential_b"):
        torch.testing.assert_close(
            getattr(result, side), getattr(expected, side), rtol=10 * tolerance, atol=10 * tolerance
        )
    assert torch.equal(result.n_iters, expected.n_iters)


def kernel_of(options) -> str:
    return "onchip_relaxed_forward_kernel" if options in RELAXED.values() else "onchip_forward_kernel"


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_cost_is_solved_as_by_the_reference(options, device):
    assert_same(
        lambda backend: otkern.solve(cost(), reg=0.5, max_iter=3, tol=None, backend=backend, **options),
        kernel_of(options), device, 1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_points_are_solved_as_by_the_reference(options, device):
    x, y = cloud(14, 3, 0), cloud(12, 3, 1)
    assert_same(
        lambda backend: otkern.solve_sample(x, y, reg=0.5, max_iter=3, tol=None, backend=backend, **options),
        kernel_of(options), device, 1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"unbalanced": 1.0}], ids=["balanced", "unbalanced"])
def test_float64_keeps_its_accuracy(options, device):
    x, y = cloud(9, 2, 0, torch.float64), cloud(7, 2, 1, torch.float64)
    assert_same(
        lambda backend: otkern.solve_sample(x, y, reg=0.5, max_iter=3, tol=None, backend=backend, **options),
        kernel_of(options), device, 1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"unbalanced": 1.0}], ids=["balanced", "unbalanced"])
def test_padding_and_the_stopping_rule(options, device):
    x, y = torch.stack([cloud(14, 3, 0), cloud(14, 3, 2)]), torch.stack([cloud(12, 3, 1), cloud(12, 3, 3)])
    lengths = {"lengths_a": torch.tensor([14, 9]), "lengths_b": torch.tensor([7, 12])}
    kwargs = lengths | options
    x[1, 9:], y[0, 7:] = float("nan"), float("nan")
    assert_same(
        lambda backend: otkern.solve_sample(x, y, reg=1.0, max_iter=40, tol=1e-2, backend=backend, **kwargs),
        kernel_of(options), device, 1e-5,
    )  # fmt: skip
