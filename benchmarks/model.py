"""Bytes and operations that a case cannot do without, and what share of the measured ceilings a time makes of them."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.problems import Clouds

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def work_of(case: Case, clouds: Clouds) -> dict[str, float]:
    """The model of one call.

    Returns:
        bytes: points read once for each pass and gradients written once.
        flop: of the matrix products, two for each multiply-add: the cost, and its two products with the plan.
        multiply_adds_per_iteration: two for each entry of the kernel.
        exponentials: one for each entry of the kernel; the iterations are multiply-adds.
    """
    if case.kind == "training":
        return {}
    sizes = [clouds.sizes(i) for i in range(case.batch)]
    entries, points = float(sum(n * m for n, m in sizes)), float(sum(n + m for n, m in sizes))
    if case.debias:
        entries += float(sum(n * n + m * m for n, m in sizes))
    forward, backward = case.part != "backward", case.part != "forward"
    return {
        "bytes": points * case.d * BYTES[case.dtype] * (forward + 2 * backward),
        "flop": 2 * entries * case.d * (forward + 2 * backward),
        "multiply_adds_per_iteration": 2 * entries * forward,
        "exponentials": entries * (forward + backward),
    }


def shares(work: dict[str, float], case: Case, seconds: float, steps: int | None, ceilings: dict[str, float]) -> dict:
    """For each ceiling, the percentage that this time reaches, and the floor: the largest of the times at the ceilings.

    Resources are taken as overlapped. Products are counted at the matrix rate of the case's dtype.
    """
    rate = ceilings.get(f"matrix_{case.dtype}", ceilings.get("matrix_float32"))
    parts = {
        "copy": (work.get("bytes"), ceilings.get("copy")),
        "matrix": (work.get("flop"), rate),
        "exponential": (work.get("exponentials"), ceilings.get("exponential")),
    }
    if steps is not None and work:
        parts["multiply_add"] = (work["multiply_adds_per_iteration"] * steps, ceilings.get("multiply_add"))
    times = {name: amount / ceiling for name, (amount, ceiling) in parts.items() if amount and ceiling}
    if not times:
        return {}
    return {
        "percent_of_ceiling": {name: round(100 * time / seconds, 2) for name, time in times.items()},
        "floor_ms": 1e3 * max(times.values()),
    }
