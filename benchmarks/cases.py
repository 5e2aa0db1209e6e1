"""What is measured: shapes, settings and the suites made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

OTKERN = ("otkern again", "otkern")
BACKENDS = ("otkern cuda", "otkern triton")  # on a GPU: what the choice between them is made from
TORCH = ("torch kernel domain", "torch logsumexp")
COMPILED = ("torch kernel domain compiled", "torch logsumexp compiled")
REFERENCES = ("torch cost and its backward", "torch three products")
POT = ("POT solve_batch log", "POT solve_batch kernel")
POT_ALL = (*POT, "POT solve_sample_batch", "POT sinkhorn loop", "POT sinkhorn_log loop")
GEOMLOSS = ("GeomLoss tensorized",)
OTT = ("OTT-JAX log", "OTT-JAX kernel")
USUAL = (*OTKERN, *TORCH, *POT, *GEOMLOSS, *OTT)
EVERYBODY = (*OTKERN, *TORCH, *COMPILED, *POT_ALL, *GEOMLOSS, *OTT, *REFERENCES)
TO_TOLERANCE = (*OTKERN, *TORCH, *POT, "POT sinkhorn_log loop", *GEOMLOSS, *OTT, "OTT-JAX momentum")
DEBIASED = (*OTKERN, "otkern three solves", "torch kernel domain", "torch logsumexp", *POT, *GEOMLOSS, *OTT)
LARGE = (*OTKERN, *TORCH, *POT, *GEOMLOSS, "GeomLoss online", *OTT, "OTT-JAX online")
OVERHEAD = (*OTKERN, "bare op", "torch kernel domain")
TRAINING = ("encoder alone again", "encoder alone", "with otkern", "with torch kernel domain", "with GeomLoss")


@dataclass(frozen=True)
class Case:
    """One shape and setting, and the methods that are measured on it in one interleaved run.

    Attributes:
        batch: problems; n, m: points of the two clouds, the largest if ``low`` is set; d: features.
        low: lengths are drawn from low to n and low to m; None: all are n and m.
        reg: epsilon in the unit of the cost.
        iterations: exactly so many full iterations, or at most so many with ``tol``.
        tol: L1 marginal error to reach, verified in fp64; None: fixed iterations.
        latent: the points lie in a random subspace of so many dimensions, so that costs differ and convergence is
            slow; None: normal in all d, each point of the second cloud near one of the first.
        part: what is timed: "forward" (value only), "backward" (from a finished forward) or "both".
        kind: "solve", "overhead" (the same, of a tiny problem), or "training" (a step of an encoder with the loss).
        debias: the Sinkhorn divergence OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2.
        headline: a row of the table that README shows.
    """

    name: str
    batch: int
    n: int
    m: int
    d: int
    methods: tuple[str, ...]
    low: int | None = None
    dtype: str = "float32"
    metric: str = "cosine"
    reg: float = 0.1
    iterations: int = 50
    tol: float | None = None
    latent: int | None = None
    part: str = "both"
    kind: str = "solve"
    debias: bool = False
    device: str = "cpu"
    headline: bool = False
    encoder: tuple[int, int] = (0, 0)  # layers and width, of kind "training"

    def settings(self) -> dict:
        """The fields that differ from their default, without name and methods."""
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        shown = {key: getattr(self, key) for key in fields if key not in ("name", "methods")}
        return {key: value for key, value in shown.items() if value != fields[key]}


def case(name: str, batch: int, n: int, d: int, methods: tuple[str, ...] = USUAL, *, m: int = 0, **more) -> Case:
    return Case(name, batch, n, m or n, d, tuple(dict.fromkeys(methods)), **more)


def headline_cases() -> list[Case]:
    """The shapes that word alignment produces; the table of README."""
    return [
        case("64x(64x64)", 64, 64, 768, EVERYBODY, headline=True),
        case("16x(128x128)", 16, 128, 768, EVERYBODY, headline=True),
        case(
            "64x(8..64)", 64, 64, 768, (*OTKERN, *TORCH, *POT_ALL, *GEOMLOSS, *OTT, *REFERENCES), low=8, headline=True
        ),
        case("1x(700x700)", 1, 700, 768, EVERYBODY, headline=True),
    ]


def overhead_cases(device: str = "cpu") -> list[Case]:
    return [
        case(f"overhead 2x2 {part}", 1, 2, 4, OVERHEAD, kind="overhead", part=part, iterations=1, device=device)
        for part in ("forward", "both")
    ]


def quick_suite() -> list[Case]:
    few = (*OTKERN, *TORCH, *POT[:1], *GEOMLOSS, *OTT[:1])
    return [
        *overhead_cases(),
        case("16x(32x32) d256", 16, 32, 256, (*few, *REFERENCES)),
        case("16x(8..48) d256", 16, 48, 256, (*few, *REFERENCES), low=8),
        case("16x(24x40) d64 bfloat16", 16, 24, 64, few[:4], m=40, dtype="bfloat16"),
        case("64x(64x64)", 64, 64, 768, (*few, *POT, *OTT, *REFERENCES), headline=True),
        case("8x(64x64) to 1e-3 reg 0.05", 8, 64, 256, few, reg=0.05, tol=1e-3, latent=8, iterations=5000),
    ]


def cpu_suite() -> list[Case]:
    parts = [
        dataclasses.replace(c, name=f"{c.name} {part}", part=part, headline=False, methods=(*USUAL, *REFERENCES[:1]))
        for c in headline_cases()
        if c.name in ("64x(64x64)", "1x(700x700)")
        for part in ("forward", "backward")
    ]
    token = [
        case("1x(5x5) d768", 1, 5, 768),
        case("1x(32x32) d768", 1, 32, 768),
        case("4096x(16x16) d64", 4096, 16, 64),
        case("512x(24x40) d256", 512, 24, 256, m=40),
        case("256x(5..64) d768", 256, 64, 768, low=5),
        case("8x(256x256) d1024", 8, 256, 1024),
        case("64x(16..128) d384", 64, 128, 384, low=16),
        *(case(f"64x(64x64) {t}", 64, 64, 768, (*OTKERN, *TORCH), dtype=t) for t in ("bfloat16", "float16")),
        case("64x(64x64) sqeuclidean", 64, 64, 768, metric="sqeuclidean", reg=100.0),
    ]
    pooled = [
        case(f"1x({n}x{m}) pooled debiased", 1, n, 768, DEBIASED, m=m, debias=True)
        for n, m in ((500, 600), (1000, 900))
    ]
    large = [
        case("1x(1000x1000) d3", 1, 1000, 3, LARGE, metric="sqeuclidean", reg=0.1, iterations=20),
        case("1x(2000x3000) d64", 1, 2000, 64, LARGE, m=3000, metric="sqeuclidean", reg=10.0, iterations=10),
        case("1x(4000x4000) d768", 1, 4000, 768, LARGE, iterations=10),
    ]
    return [*overhead_cases(), *headline_cases(), *parts, *token, *pooled, *large, *tolerance_cases("cpu")]


def tolerance_cases(device: str) -> list[Case]:
    """Time to a marginal error, verified in fp64; the iterations are the most that a method may take."""
    gpu = device == "cuda"
    methods = (*TO_TOLERANCE, *BACKENDS, "flash-sinkhorn") if gpu else TO_TOLERANCE
    shapes = [(256, 128)] if gpu else [(16, 64), (1, 300)]
    chosen = [(0.1, 1e-3), (0.05, 1e-2), (0.05, 1e-3), (0.05, 1e-4), (0.01, 1e-2), (0.01, 1e-3)]
    return [
        case(
            f"{batch}x({n}x{n}) to {tol:g} reg {reg:g}", batch, n, 768, methods,
            reg=reg, tol=tol, latent=8, iterations=20000, device=device,
        )
        for batch, n in shapes
        for reg, tol in chosen
    ]  # fmt: skip


def gpu_suite() -> list[Case]:
    batch = (*OTKERN, *BACKENDS, *TORCH, *POT, *GEOMLOSS, *OTT)
    cases = [
        case("256x(128x128) bfloat16", 256, 128, 768, (*batch, *COMPILED, "flash-sinkhorn", *REFERENCES),
             dtype="bfloat16", iterations=100, headline=True),
        case("2048x(64x64)", 2048, 64, 768, (*batch, *COMPILED, *REFERENCES), headline=True),
        case("2048x(8..64)", 2048, 64, 768, batch, low=8, headline=True),
        case("2048x(8..64) bfloat16", 2048, 64, 768, batch, low=8, dtype="bfloat16", headline=True),
        case("4096x(16x16)", 4096, 16, 768, batch),
        case("512x(128x128) float16", 512, 128, 768, batch, dtype="float16"),
        case("256x(256x256) d1024", 256, 256, 1024, batch),
        case("8x(700x700)", 8, 700, 768, (*batch, "flash-sinkhorn", *REFERENCES), headline=True),
        case("1x(700x700) pooled debiased", 1, 700, 768, (*BACKENDS, *DEBIASED, "flash-sinkhorn"), debias=True,
             headline=True),
        *(
            case(f"1x({n}x{n}) d{d} {part}", 1, n, d, (*LARGE, "flash-sinkhorn"), metric="sqeuclidean",
                 reg=0.15 * d, iterations=20, part=part)
            for n, d in ((1000, 3), (10000, 64), (10000, 768), (50000, 64))
            for part in ("forward", "both")
        ),
    ]  # fmt: skip
    on_gpu = [dataclasses.replace(c, device="cuda") for c in cases]
    everything = [*on_gpu, *overhead_cases("cuda"), *tolerance_cases("cuda")]
    # The most important first: a run may be cut short.
    return sorted(everything, key=lambda shape: not shape.headline)


def training_suite(device: str) -> list[Case]:
    """A training step of a transformer encoder on pairs of sentences, alone and with the loss on its outputs."""
    if device == "cuda":
        shape = {"encoder": (12, 768), "dtype": "bfloat16", "low": 16}
        return [case("step 12x768, 64x(16..128)", 64, 128, 768, TRAINING, kind="training", device=device, **shape)]
    return [case("step 2x384, 16x(8..48)", 16, 48, 384, TRAINING, low=8, kind="training", encoder=(2, 384))]


def suite(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite; ``device`` is where the training suite runs."""
    if name == "training":
        return training_suite(device)
    return {"quick": quick_suite, "cpu": cpu_suite, "gpu": gpu_suite}[name]()
