"""When a call has to pass the dispatcher and autograd, which cost as much as a small problem, and who serves it."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from otkern import backends
from otkern.problem import Inputs, Schedule


def is_needed(fields: Iterable[Any]) -> bool:
    """Whether somebody listens to the ops: tracing, modes, transforms, or a tensor of another class in ``fields``."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    for field in fields:  # a loop takes half the time of `any`
        kind = type(field)
        if kind is Tensor or kind is torch.nn.Parameter:
            # Not what its memory says: of a batch of gradients, or to be negated when it is read.
            if field.is_neg() or torch._C._functorch.is_legacy_batchedtensor(field):
                return True
        elif isinstance(field, Tensor):
            return True
    return False


# The autograd function of each op that has one, by the op's name.
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, outside of traced code."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def call(name: str, *args: Any) -> Any:
    """An op that autograd knows. The transforms of `torch.func` get its function, which they see through."""
    return FUNCTIONS[name].apply(*args) if is_transformed() else getattr(torch.ops.otkern, name)(*args)


def is_recorded(fields: Iterable[Any]) -> bool:
    """Whether autograd has to know of a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(field, Tensor) and field.requires_grad for field in fields)


def serving(inputs: Inputs, name: str, schedule: Schedule | None = None) -> ModuleType:
    """The backend's module.

    Raises:
        ValueError: it cannot serve the call; it says why.
    """
    backend = backends.load(name)
    if (reason := backend.can_run(inputs, schedule)) is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return backend
