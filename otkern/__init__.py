"""Fused log-domain Sinkhorn, forward and backward, for batches of problems of different lengths."""

from otkern.convergence import ConvergenceWarning
from otkern.divergence import sinkhorn_divergence
from otkern.explain import Explanation, explain
from otkern.losses import SinkhornLoss
from otkern.result import OTResult, PlanOperator
from otkern.samples_loss import SamplesLoss
from otkern.solve import solve, solve_batch, solve_sample, solve_sample_batch

__version__ = "0.1.0"

__all__ = [
    "ConvergenceWarning",
    "Explanation",
    "OTResult",
    "PlanOperator",
    "SamplesLoss",
    "SinkhornLoss",
    "explain",
    "sinkhorn_divergence",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
]
