"""A few small calls of the kernels, for compute-sanitizer: ``compute-sanitizer --tool memcheck python FILE``."""

import torch

import otkern


def solve(metric: str, dtype: torch.dtype, n: int, m: int, backend: str, **relaxation: float) -> None:
    """Forward, backward, plan and its gradient, of different lengths at the edges of tiles."""
    x = torch.randn(3, n, 67, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.randn(3, m, 67, device="cuda", dtype=dtype, requires_grad=True)
    reg = torch.full((3,), 0.3, device="cuda", requires_grad=True)
    lengths = {"lengths_a": [n, n // 4, 9], "lengths_b": [m, m - 3, 16]}
    result = otkern.solve_sample(x, y, metric=metric, reg=reg, max_iter=3, backend=backend, **lengths, **relaxation)
    (result.value.sum() + result.plan.square().sum()).backward()
    torch.cuda.synchronize()
    finite = all(bool(t.isfinite().all()) for t in (result.value, x.grad, y.grad, result.plan))
    print(f"case {backend} {metric} {dtype} {n}x{m} {relaxation or ''}: finite {finite}", flush=True)


def main() -> None:
    for backend in ("triton", "cuda"):
        try:
            for metric, dtype, n, m in (
                ("cosine", torch.bfloat16, 40, 33),
                ("cosine", torch.float32, 128, 127),
                ("euclidean", torch.float32, 150, 131),
                ("sqeuclidean", torch.float16, 17, 64),
                ("cosine", torch.bfloat16, 300, 290),
            ):
                solve(metric, dtype, n, m, backend)
            for relaxation in ({"unbalanced": 0.5}, {"mass": 0.4}, {"null_cost": 0.3}, {"scaling": 0.5}):
                solve("cosine", torch.float32, 40, 33, backend, **relaxation)
                solve("cosine", torch.float32, 150, 131, backend, **relaxation)
        except ValueError as reason:
            if "backend" not in str(reason):
                raise
            print(f"backend {backend} is not checked: {reason}", flush=True)


if __name__ == "__main__":
    main()
