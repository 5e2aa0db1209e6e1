"""Every Triton kernel as the launcher launches it, compiled for sm_80, sm_90 and sm_100 on a machine without a GPU.

The launcher runs on fake CUDA tensors with its launches recorded; what it would have launched is compiled, and
registers, spills and shared memory are read from the assembler's report. A subprocess does it, because the other tests
import Triton for its interpreter. `OTKERN_TRITON_PATHS` lists further folders, separated by colons, that hold another
version of Triton (`pip install --target FOLDER --no-deps triton==3.6.0`), to compile with as well.

Run as a script, this file is that subprocess: it prints one JSON record per kernel.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use
REGISTERS = 65536  # of a multiprocessor
PARTS = 2  # subprocesses per target, for the workers of a parallel run


def cases(torch, everything: bool):
    """(dtype, metric, whether rows start where wide loads may): one metric of each kind of cost.

    float16 takes the code of bfloat16, so it and the irregular strides are compiled for one target.
    """
    kinds = ("sqeuclidean", "cosine", "cost")
    yield from ((torch.float32, metric, True) for metric in kinds)
    yield from ((torch.bfloat16, metric, True) for metric in kinds[: 3 if everything else 2])
    if everything:
        yield from ((torch.float64, metric, True) for metric in kinds)
        yield from ((torch.float32, metric, False) for metric in ("sqeuclidean", "cost"))
        yield torch.float16, "cosine", True
        yield torch.float32, "euclidean", True


# Numbers of points at which a grid of one dimension each for items, rows and columns passes what CUDA allows.
LARGE = ((2_000_000, 3), (3, 2_000_000), (2_000_000, 2_000_000))


def launches(everything: bool = True, large: bool = False):
    """(label, kernel, arguments, grid) of all that the launcher launches, over dtypes, metrics and size classes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from otkern.backends.triton import (
        launch,
        launch_forward,
        launch_implicit,
        launch_plan,
        launch_relaxed,
        launch_symmetric,
    )

    recorded = []
    launch.on_device = lambda device: contextlib.nullcontext()
    modules = (
        *(
            launch_forward.onchip_forward,
            launch.global_forward,
            launch_relaxed.onchip_relaxed,
            launch_relaxed.global_relaxed,
        ),
        *(launch_symmetric.onchip_annealed, launch_symmetric.global_symmetric),
        *(launch_plan.plan_products, launch_implicit.conjugate_gradients),
    )
    launch_symmetric.longest_ladder = lambda n_steps: 1
    kernels = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    for module in modules:
        for name, kernel in kernels.items():
            if hasattr(module, name):
                setattr(module, name, Recorder(name, kernel, recorded))
    with FakeTensorMode():
        for dtype, metric, regular in cases(torch, everything):
            recorded_before = len(recorded)
            for sizes in LARGE if large else [(320, 288) if regular else (301, 299)]:
                run_balanced(*problem(torch, dtype, metric, regular, *sizes))
                # 16-bit points and strides only matter to the tile of the cost, which the balanced solve compiles for
                # all targets, and so does the metric among points, but for the registers that it leaves.
                fewer = metric == "cost" or (metric == "cosine" if dtype == torch.bfloat16 else metric == "sqeuclidean")
                full = everything and dtype == torch.float32
                if regular and (full or (fewer and (everything or dtype != torch.bfloat16))):
                    run_other_kinds(*problem(torch, dtype, metric, regular, *sizes))
                    if metric != "cost":
                        run_symmetric(*problem(torch, dtype, metric, regular, *sizes))
            for entry in recorded[recorded_before:]:
                entry["label"] += f" {str(dtype).split('.')[1]} {metric}{'' if regular else ' irregular'}"
    return recorded


def problem(torch, dtype, metric, regular: bool, N: int, M: int):
    """A batch that may hold every size class, and how to make more tensors; irregular strides allow no wide loads."""
    from otkern.problem import Inputs

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # distances in few features have a tile of their own
    D = 3 if metric == "euclidean" else 64 if regular else 67

    def new(*shape, kind=compute):
        return torch.empty(shape, dtype=kind, device="cuda")

    def points(size):
        return new(2, size, D, kind=dtype)

    cost = None
    if metric == "cost":
        cost = new(2, N, M, kind=dtype) if regular else new(2, M, N, kind=dtype).transpose(1, 2)
    inputs = Inputs(
        x_a=points(N) if cost is None else None,
        x_b=points(M) if cost is None else None,
        cost=cost,
        a=new(2, N),
        b=new(2, M),
        reg=new(2),
        relaxation=None,
        lengths_a=None,
        lengths_b=None,
        cu_seqlens_a=None,
        cu_seqlens_b=None,
        max_a=N,
        max_b=M,
        metric=metric,
    )
    needs = (cost is None, cost is None, cost is not None, True, True)
    return inputs, needs, new


def run_balanced(inputs, needs, new) -> None:
    """The balanced solve, its gradients and products."""
    from otkern.backends.triton import launch_forward, launch_plan

    value, f, g, *_ = launch_forward.forward(inputs, None, 1, -1.0)
    launch_plan.backward(inputs, f, g, value, needs)
    launch_plan.apply(inputs, f, g, new(2, inputs.max_b, 64), False, False)


def run_other_kinds(inputs, needs, new) -> None:
    """The solve of every kind of marginals, which are flags but for the larger problem of null points, and implicit."""
    from otkern.backends.triton import launch_implicit, launch_plan, launch_relaxed
    from otkern.problem import PlanWeights, Schedule

    inputs = inputs._replace(kind="null", relaxation=new(2, 2))
    _, f, g, *_ = launch_relaxed.forward(inputs, None, 1, -1.0, Schedule(eps_start=inputs.reg))
    launch_plan.plan_backward(inputs, f, g, PlanWeights(inputs.reg), needs)
    launch_implicit.implicit(inputs, f, g, (f, g, f, g), f, g, False, 1e-6, 1)


def run_symmetric(inputs, needs, new) -> None:
    """Clouds with themselves, and the loop of GeomLoss."""
    from otkern.backends.triton import launch_forward, launch_relaxed, launch_symmetric
    from otkern.problem import Schedule

    inputs = inputs._replace(first_self=1)
    launch_forward.forward(inputs, None, 1, -1.0)
    launch_relaxed.forward(inputs, None, 1, -1.0, Schedule(eps_start=inputs.reg))
    launch_symmetric.annealed(inputs, inputs.reg, new(2).int(), 0.5, 0.0)


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, name, kernel, recorded):
        self.name, self.kernel, self.recorded = name, kernel, recorded
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def keep(**arguments):
            block = arguments.get("BLOCK", arguments.get("BLOCK_OUT"))
            label = f"{self.name} {block}"
            self.recorded.append({"label": label, "kernel": self.kernel, "arguments": arguments, "grid": grid})

        return keep


def source_and_options(kernel, arguments):
    """What the just-in-time compiler would make of these arguments: types, constants, divisibility, options."""
    import torch
    from triton.compiler import ASTSource

    types = {
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int32: "i32",
    }
    signature, constants, attributes = {}, {}, {}
    left = dict(arguments)
    for index, parameter in enumerate(kernel.params):
        value = left.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), left


def watch_carried_values() -> list[str]:
    """A list that gets "kernel function: name" for each variable that Triton's front end leaves out of a loop.

    It carries a variable through a loop if the body gives it another value than it has before the loop. An assignment
    of what is, at the head of the loop, the same value as the variable's (``s_last = s`` before and inside) goes
    unseen: the compiled code keeps what was there before the loop, while Triton's interpreter runs Python and is right.
    """
    from triton.compiler.code_generator import CodeGenerator, _is_triton_value

    find_carries, set_value = CodeGenerator._find_carries, CodeGenerator.set_value
    visits, left_out = [], []

    def recording(self, name, value):
        for generator, assigned in visits:
            if generator is self:
                assigned.add(name)
        set_value(self, name, value)

    def checking(self, node, liveins, ignore=frozenset()):
        visits.append((self, set()))
        carried = find_carries(self, node, liveins, ignore)
        _, assigned = visits.pop()
        live = {name for name, value in liveins.items() if _is_triton_value(value)}
        left_out.extend(
            f"{self.function_name}: {name}" for name in sorted(assigned & live - set(carried[0]) - set(ignore))
        )
        return carried

    CodeGenerator._find_carries, CodeGenerator.set_value = checking, recording
    return left_out


def compile_part(target: int, part: int, everything: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    seen, left_out = {}, watch_carried_values()
    for entry in launches(everything):
        source, options = source_and_options(entry["kernel"], entry["arguments"])
        key = (entry["kernel"].__name__, str(source.signature), str(source.constants), str(source.attrs), str(options))
        seen.setdefault(key, (entry["label"], source, options))
    for label, source, options in list(seen.values())[part::PARTS]:
        start = sum(os.times()[:4])
        record = {"label": label, "triton": triton.__version__, "target": target}
        log = io.StringIO()
        left_out.clear()
        try:
            with contextlib.redirect_stdout(log):
                compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[-2000:]
        else:
            stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()
            record["registers"] = int(re.search(r"Used (\d+) registers", log.getvalue()).group(1))
            record |= {
                "left_out": sorted(set(left_out)),
                "spills": int(stores) + int(loads),
                "shared": compiled.metadata.shared,
                "warps": options["num_warps"],
            }
        record["seconds"] = round(sum(os.times()[:4]) - start, 2)
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the labels and compile nothing")
    parser.add_argument("--large", action="store_true", help="with --list: problems of millions of points")
    parser.add_argument("--everything", action="store_true")
    options = parser.parse_args()
    if options.list:
        for entry in launches(options.everything, options.large):
            print(json.dumps({"label": entry["label"], "grid": entry["grid"]}))
    else:
        compile_part(options.target, options.part, options.everything)


def run_part(path: str, target: int, *arguments: str) -> list[dict]:
    """What the subprocess prints for one target, with the Triton found in `path` (empty: the installed one)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, root, environment.get("PYTHONPATH"))))
    # The assembler's report is only there when it runs.
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, __file__, "--target", str(target), *arguments]
    # float64, float16 and irregular strides are compiled for one target; OTKERN_COMPILE=all compiles them for all.
    if os.environ.get("OTKERN_COMPILE") == "all" or (not path and target == 90):
        command.append("--everything")
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


PATHS = [path for path in os.environ.get("OTKERN_TRITON_PATHS", "").split(os.pathsep) if path]
# Another version of Triton is compiled with for the architecture on which it is used today.
CASES = [("", target) for target in TARGETS] + [(path, 90) for path in PATHS]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("path", "target"), CASES, ids=[f"{Path(path).name or 'installed'}-sm_{target}" for path, target in CASES]
)
def test_every_kernel_compiles_without_spills_and_fits(path, target, part):
    records = run_part(path, target, "--part", str(part))
    assert records
    assert not [(r["label"], r["error"]) for r in records if "error" in r]
    assert not [(r["label"], r["left_out"]) for r in records if r["left_out"]]
    assert not [(r["label"], r["registers"], r["spills"]) for r in records if r["spills"]]
    assert not [(r["label"], r["shared"]) for r in records if r["shared"] > SHARED_LIMIT[target]]
    assert not [(r["label"], r["registers"]) for r in records if r["registers"] * r["warps"] * 32 > REGISTERS]


def test_all_kernels_are_launched_and_128_points_by_one_program():
    labels = [record["label"].split() for record in run_part("", 90, "--list")]
    assert {label[0] for label in labels} == {
        "onchip_forward_kernel",
        "cost_forward_kernel",
        "half_update_forward_kernel",
        "finish_forward_kernel",
        "onchip_relaxed_forward_kernel",
        "enlarged_weights_kernel",
        "half_update_relaxed_kernel",
        "finish_relaxed_kernel",
        "onchip_annealed_kernel",
        "averaged_update_kernel",
        "finish_self_kernel",
        "plan_backward_kernel",
        "reg_backward_kernel",
        "plan_apply_kernel",
        "onchip_implicit_kernel",
        "scaled_product_kernel",
        "log_weights_kernel",
        "scales_kernel",
        "begin_gradients_kernel",
        "step_gradients_kernel",
    }
    for name in ("onchip_forward_kernel", "onchip_relaxed_forward_kernel", "onchip_implicit_kernel"):
        onchip = {tuple(label[1:4]) for label in labels if label[0] == name}
        assert onchip >= {("128", "float32", metric) for metric in ("sqeuclidean", "cosine", "cost")}
    annealed = {tuple(label[1:4]) for label in labels if label[0] == "onchip_annealed_kernel"}
    assert ("128", "float32", "sqeuclidean") in annealed


def test_grids_of_large_problems_stay_within_the_limits_of_cuda():
    records = run_part("", 90, "--list", "--large")
    assert max(record["grid"][0] for record in records) > 65535
    assert not [r for r in records if r["grid"][0] >= 2**31 or any(size > 65535 for size in r["grid"][1:])]


if __name__ == "__main__":
    main()
