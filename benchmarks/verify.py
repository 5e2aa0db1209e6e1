"""The correctness gate: the answer of a method on the very shape that is timed, against fp64.

With fixed iterations the truth is what the method's own iteration gives after that many steps. With a tolerance it is
the marginal error of the potentials that the method returned, and the value and gradients that those potentials give.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.methods import Method
from benchmarks.problems import Answer, Clouds, Truth, cost_range, errors, make_item, true_answer
from benchmarks.timing import caller

# Rounding of the gradients to the dtype of the points, beside that of the fp32 arithmetic.
OUTPUT_ERROR = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}

# A tolerance counts as reached within this factor: fp32 stops by a marginal error that is itself rounded.
REACHED = 1.05


class Failed(Exception):
    """A method's answer is not what it should be."""


class Verifier:
    """Judges the methods of one case; what several of them should compute is computed once."""

    def __init__(self, case: Case, clouds: Clouds, items: list[int]):
        self.case, self.clouds, self.items = case, clouds, items
        # fp32 rounds f + g - C, numbers as large as the costs, before it divides by reg.
        self.allowed = 2e-6 * max(10.0, cost_range(case, clouds) / case.reg)
        self._truths: dict[str, dict[int, Truth]] = {}

    def check(self, method: Method, answer: Answer) -> dict:
        """The errors and iterations for the record.

        Raises:
            Failed: an error is too large.
        """
        case, found = self.case, {}
        allowed, allowed_gradient = self.allowed, self.allowed + OUTPUT_ERROR[case.dtype]
        if case.tol is None:
            truths = self._fixed(method)
        else:
            call = caller(method, case)
            method.tune(lambda: (call(), self.marginal_error(method))[1] <= REACHED * case.tol)
            answer = call()
            found["marginal_error"] = self.marginal_error(method)
            if not found["marginal_error"] <= REACHED * case.tol:
                best = (
                    f"{found['marginal_error']:.2g} with {method.setting or f'{method.iterations_done()} iterations'}"
                )
                raise Failed(f"does not reach a marginal error of {case.tol:g}: {best}")
            truths = self._own(method)
            # Some leave the term that vanishes with the marginal error out of the value.
            allowed, allowed_gradient = allowed + case.tol, max(allowed_gradient, method.gradient_slack)
        found["iterations"] = method.iterations_done()
        value, gradient = errors(on_cpu(answer), {i: on_cpu(t) for i, t in truths.items()})
        found["error"] = max(value, gradient)
        if not value <= allowed:
            raise Failed(f"relative error of the value {value:.2g} against fp64, allowed is {allowed:.1g}")
        if not gradient <= allowed_gradient:
            raise Failed(f"relative error of a gradient {gradient:.2g} against fp64, allowed is {allowed_gradient:.1g}")
        if case.tol is None and method.exact_iterations and found["iterations"] != case.iterations:
            raise Failed(f"{found['iterations']} iterations instead of {case.iterations}")
        return found

    def _fixed(self, method: Method) -> dict[int, Truth]:
        key, solve = method.truth()
        if key not in self._truths:
            gradients = self.case.part != "forward" and self.case.kind != "training"
            clouds = method.solved()
            self._truths[key] = {i: true_answer(self.case, clouds, i, solve, gradients) for i in self.items}
        return self._truths[key]

    def _own(self, method: Method) -> dict[int, Truth]:
        f, g = method.potentials()
        truths = {}
        for i in self.items:
            n, m = self.clouds.sizes(i)
            item = make_item(self.case, self.clouds, i)
            truths[i] = item.truth(f[i, :n].double(), g[i, :m].double(), self.case.part != "forward")
        return truths

    def marginal_error(self, method: Method) -> float:
        """The largest L1 marginal error among the checked problems, in fp64."""
        errors = [truth.error for truth in self._own(method).values()]
        return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def on_cpu(answer):
    """The same named tuple with its arrays, of torch or of JAX, as torch tensors on the CPU."""

    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.detach().cpu()
        if value is None or isinstance(value, (bool, float)):
            return value
        return torch.from_numpy(np.array(value, dtype=np.float32))

    return type(answer)(*(convert(value) for value in answer))
