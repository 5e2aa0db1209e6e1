"""The native module: addresses, strides and sizes as integers; see csrc/bindings.cpp."""

class Problem:
    def __init__(
        self,
        *,
        batch: int,
        max_a: int,
        max_b: int,
        total_a: int,
        total_b: int,
        features: int,
        dtype: int,
        metric: int,
        x_a: tuple[int, int, int, int],
        x_b: tuple[int, int, int, int],
        cost: tuple[int, int, int, int],
        a: int,
        b: int,
        reg: int,
        lengths_a: int,
        lengths_b: int,
        cu_seqlens_a: int,
        cu_seqlens_b: int,
    ) -> None: ...

def cpu_forward(
    problem: Problem,
    *,
    g_init: int,
    max_iter: int,
    tol: float,
    check: bool,
    store_bytes: int,
    value: int,
    f: int,
    g: int,
    marginal_error: int,
    n_iters: int,
    threads: int,
) -> tuple[int, int] | None: ...
def cpu_backward(
    problem: Problem,
    *,
    f: int,
    g: int,
    dvalue: int,
    dx_a: int,
    dx_b: int,
    dcost: int,
    da: int,
    db: int,
    dreg: int,
    threads: int,
) -> None: ...
def cpu_apply(
    problem: Problem,
    *,
    f: int,
    g: int,
    v: int,
    out: int,
    channels: int,
    transpose: bool,
    times_cost: bool,
    threads: int,
) -> None: ...
def cpu_plan(problem: Problem, *, f: int, g: int, out: int, threads: int) -> None: ...
def build_info() -> dict[str, str]: ...
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(name: str) -> None: ...
