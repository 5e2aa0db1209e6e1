"""Fused log-domain Sinkhorn, forward and backward, for batches of problems of different lengths."""

from otkern.losses import SinkhornLoss
from otkern.result import OTResult, PlanOperator
from otkern.solve import solve, solve_batch, solve_sample, solve_sample_batch

__version__ = "0.1.0"

__all__ = [
    "OTResult",
    "PlanOperator",
    "SinkhornLoss",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
]
