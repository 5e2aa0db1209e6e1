"""The benchmarks' own promises: wrong and slow kernels are caught, no failure ends a run, tables are generated."""

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import cases, compare, model, problems, record, report, sweep
from benchmarks.__main__ import main
from benchmarks.cases import OTKERN, case
from benchmarks.methods import METHODS
from benchmarks.methods.ours import Otkern
from benchmarks.verify import Failed, Verifier
from tests.problems import exact_value, make_problem, sinkhorn

TINY = case("2x(6x5)", 2, 6, 8, ("otkern",), m=5, iterations=10)


class Wrong(Otkern):
    """A kernel whose gradient is off by a thousandth."""

    def both(self):
        answer = super().both()
        return answer._replace(dx=1.001 * answer.dx)


class Crashing(Otkern):
    """A kernel that takes its process with it."""

    def both(self):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hanging(Otkern):
    """A kernel that never returns."""

    def both(self):
        time.sleep(1000)


class Greedy(Otkern):
    """A kernel that asks for more memory than there is."""

    def both(self):
        raise torch.OutOfMemoryError("tried to allocate 1 EiB")


class Prompt(Otkern):
    """A kernel that takes a millisecond."""

    pause = 1e-3

    def both(self):
        time.sleep(self.pause)
        return super().both()


class Slowed(Prompt):
    """The same a hundred times slower."""

    pause = 1e-1


def run(path, shapes, **candidates):
    """A sweep of ``shapes`` with further methods of this module."""
    paths = {name: f"{__name__}:{kind}" if ":" not in kind else kind for name, kind in candidates.items()}
    settings = sweep.Settings("quick", path, "cpu", threads=1, seconds=0.05, limit=20.0, candidates=paths)
    # A run whose ceilings are known: they take longer than such small cases.
    begun = sweep.begin(settings)
    begun["ceilings"] = {"copy": 1e9, "matrix_float32": 1e9, "multiply_add": 1e9, "exponential": 1e8}
    record.write(path, begun)
    return sweep.run(settings, shapes)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """Two cases in which most methods fail, each in its own way."""
    path = tmp_path_factory.mktemp("troubled") / "run.json"
    first = dataclasses.replace(TINY, methods=(*OTKERN, "torch kernel domain", "torch three products"), headline=True)
    kinds = {"wrong": "Wrong", "greedy": "Greedy", "crashing": "Crashing", "gone": "no_such_package:Kernel"}
    return run(path, [first, dataclasses.replace(TINY, name="second")], **kinds), path


def test_a_wrong_kernel_is_failed_and_not_timed(troubled):
    result, _ = troubled
    for name in ("2x(6x5)", "second"):
        wrong = record.find(result, name, "wrong")
        assert wrong["status"] == "failed"
        assert "against fp64" in wrong["reason"]
        assert not any(key.endswith("_ms") for key in wrong)
    assert any("wrong" in line for line in sweep.wrong(result))


def test_a_crash_and_lack_of_memory_become_records_and_the_run_goes_on(troubled):
    result, _ = troubled
    for name in ("2x(6x5)", "second"):
        assert "SIGSEGV" in record.find(result, name, "crashing")["reason"]
        assert "OutOfMemoryError" in record.find(result, name, "greedy")["reason"]
        fine = record.find(result, name, "otkern")
        assert fine["status"] == "ok"
        assert fine["iterations"] == 10
        assert fine["p20_ms"] <= fine["p50_ms"] <= fine["p80_ms"]


def test_a_hanging_kernel_is_stopped_at_its_limit(tmp_path):
    settings = sweep.Settings("quick", tmp_path / "run.json", "cpu", threads=1, seconds=0.05, limit=4.0)
    settings.candidates["hanging"] = f"{__name__}:Hanging"
    shape = dataclasses.replace(TINY, methods=("otkern",))
    _, records = sweep.measure(dataclasses.replace(shape, methods=("otkern", "hanging")), {}, settings, print)
    assert [r["status"] for r in records] == ["ok", "failed"]
    assert "limit of 4 s" in records[1]["reason"]


def test_what_is_missing_is_named_in_the_tables(troubled):
    result, path = troubled
    assert record.find(result, "second", "gone")["status"] == "absent"
    text = report.text(record.read(path))
    assert re.search(r"gone +absent: not installed: No module named 'no_such_package'", text)
    assert "noise floor" in text
    assert "otkern / torch three products" in text
    assert "| gone | absent |" in report.methods_table(result, lambda _: True)
    assert "gone, absent: not installed" in report.absences(result)
    assert "| 2x(6x5) |" in report.summary_table(result)


def test_plots_show_what_ran(troubled, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["plot", str(troubled[1]), "--output_dir", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks-quick-headline.png"]


def test_a_slowed_kernel_is_a_regression(tmp_path):
    alone = dataclasses.replace(TINY, methods=())
    paths = [tmp_path / f"{kind}.json" for kind in ("Prompt", "Slowed")]
    for path in paths:
        run(path, [alone], kernel=path.stem)
    assert main(["compare", *map(str, paths)]) == 1
    assert main(["compare", str(paths[0]), str(paths[0])]) == 0


def scaled(result, factor, judged_only=True):
    """The run with times multiplied, of otkern alone or of everybody."""
    result = copy.deepcopy(result)
    for entry in result["records"]:
        if entry["status"] == "ok" and (not judged_only or entry["method"] == "otkern"):
            for key in ("p20_ms", "p50_ms", "p80_ms"):
                entry[key] *= factor
    return result


def made_up(floor):
    """A run of one case whose noise floor is known."""
    names = ("otkern again", "otkern", "torch kernel domain", "POT solve_batch log", "GeomLoss tensorized")
    times = {"status": "ok", "p20_ms": 9.9, "p50_ms": 10.0, "p80_ms": 10.1}
    records = [{"case": "made up", "method": name, **times} for name in names]
    records[0]["noise_floor"] = floor
    return {"header": {"candidates": [], "machine": {}, "threads": 1, "versions": {}}, "records": records}


def test_regressions_are_what_noise_and_machine_do_not_explain():
    quiet, noisy = made_up(0.01), made_up(0.4)
    assert compare.compare(quiet, scaled(quiet, 1.2))[1] == 1
    assert compare.compare(quiet, scaled(quiet, 1.03))[1] == 0
    assert compare.compare(noisy, scaled(noisy, 1.2))[1] == 0
    assert compare.compare(quiet, scaled(noisy, 1.2))[1] == 0
    assert compare.compare(quiet, scaled(quiet, 2.0, judged_only=False))[1] == 0
    assert compare.compare(scaled(quiet, 1.2), quiet)[1] == 0
    broken = made_up(0.01)
    broken["records"][1] = {"case": "made up", "method": "otkern", "status": "failed", "reason": "wrong"}
    assert compare.compare(quiet, broken)[1] == 1


def test_a_killed_sweep_continues(tmp_path):
    path = tmp_path / "run.json"
    command = [
        "run",
        "--suite",
        "quick",
        "--only",
        "overhead",
        "--json",
        str(path),
        "--seconds",
        "0.2",
        "--threads",
        "1",
    ]
    with open(os.devnull, "wb") as nothing:
        module = [sys.executable, "-m", "benchmarks"]
        sweeping = subprocess.Popen([*module, *command], cwd=record.ROOT, stdout=nothing, stderr=nothing)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (path.exists() and record.read(path)["cases"]):
                time.sleep(0.02)
        finally:
            sweeping.kill()
            sweeping.wait()
    first = record.read(path)["records"]
    assert len(record.read(path)["cases"]) == 1
    assert main(command) == 0
    whole = record.read(path)
    assert list(whole["cases"]) == ["overhead 2x2 forward", "overhead 2x2 both"]
    assert whole["records"][: len(first)] == first
    before = path.read_bytes()
    assert main([*command, "--seconds", "0.3"]) == 2
    assert path.read_bytes() == before


def gpu_run(times):
    """A run of the GPU suite with a case of 60 points, two of 700, and one that only Triton has passed."""
    cases = {
        "small": {"n": 60, "m": 50, "dtype": "bfloat16"},
        "pooled": {"n": 700, "m": 700},
        "debiased": {"n": 600, "m": 700},
        "large": {"n": 100, "m": 100},
    }
    records = [
        {"case": name, "method": method, "status": "ok" if time else "absent", "p50_ms": time}
        for name, pair in times.items()
        for method, time in zip(("otkern cuda", "otkern triton"), pair, strict=True)
    ]
    header = {"format": 1, "capability": [9, 0], "machine": {"gpu": "a GPU"}, "date": "today", "commit": "0"}
    return {"header": header, "cases": cases, "records": records}


def test_the_choice_of_a_backend_is_made_from_a_run_of_both(tmp_path, capsys):
    path, table = tmp_path / "gpu.json", tmp_path / "measured.json"
    table.write_text('{"8.0": "stays", "9.0": "goes"}')
    run = gpu_run({"small": (3.0, 2.0), "pooled": (1.0, 8.0), "debiased": (1.0, 2.0), "large": (None, 1.0)})
    path.write_text(json.dumps(run))
    assert main(["choose", str(path), "--table", str(table)]) == 0
    assert "up to 64: triton (1.50 times)" in capsys.readouterr().out
    written = json.loads(table.read_text())
    assert written["8.0"] == "stays"
    assert written["9.0"]["cuda_over_triton"] == {"bfloat16": {"64": 1.5}, "float32": {"880": 0.25}}
    path.write_text(json.dumps(gpu_run({"large": (None, 1.0)})))
    assert main(["choose", str(path), "--table", str(table)]) == 2
    assert "both passed" in capsys.readouterr().err


@pytest.mark.parametrize("reg", [0.1, 1.0])
def test_the_fp64_answer_is_that_of_an_independent_loop(reg):
    problem = make_problem(7, 5, d=4, metric="sqeuclidean")
    n, m = 7, 5
    x, y = problem.x.clone().requires_grad_(), problem.y.clone().requires_grad_()
    uniform = problem._replace(x=x, y=y, a=x.new_full((n,), 1 / n), b=x.new_full((m,), 1 / m), reg=reg)
    value = exact_value(uniform, 6)
    value.backward()
    item = problems.Item(problem.x, problem.y, "sqeuclidean", reg)
    truth = problems.alternating(6)(item, True)
    for got, want in ((truth.value, value), (truth.dx, x.grad), (truth.dy, y.grad)):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)
    f, g = sinkhorn(uniform.cost.detach(), uniform.a, uniform.b, reg, 6)
    plan = torch.exp((f[:, None] + g - uniform.cost.detach()) / reg) / (n * m)
    assert float(truth.error) == pytest.approx(float((plan.sum(1) - 1 / n).abs().sum()), abs=1e-9)


def test_an_annealed_schedule_held_at_its_end_converges_to_the_same_value():
    problem = make_problem(6, 6, d=3)
    item = problems.Item(problem.x, problem.y, "sqeuclidean", 1.0)
    slow, plain = problems.annealed([4.0, 2.0] + [1.0] * 200)(item, True), problems.alternating(300)(item, True)
    torch.testing.assert_close(slow.value, plain.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(slow.dx, plain.dx, rtol=1e-6, atol=1e-9)


def test_a_tolerance_that_is_not_reached_fails():
    shape = dataclasses.replace(TINY, tol=1e-6, reg=0.01, iterations=2)
    clouds = problems.make_clouds(shape)
    method = Otkern(shape, clouds)
    reason = "does not reach a marginal error of 1e-06"
    with pytest.warns(UserWarning, match="not converged"), pytest.raises(Failed, match=reason):
        Verifier(shape, clouds, [0, 1]).check(method, method.both())


def test_not_a_number_is_an_infinite_error():
    truth = problems.Truth(torch.ones(()), torch.ones(()), torch.ones(2, 3), torch.ones(2, 3), 0.0)
    answer = problems.Answer(torch.tensor([float("nan")]), False, torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    assert problems.errors(answer, {0: truth}) == (float("inf"), 0.0)


@pytest.mark.parametrize("name", ["quick", "cpu", "gpu", "training"])
def test_suites_name_each_case_once_and_only_known_methods(name):
    shapes = cases.suite(name)
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert {method for shape in shapes for method in shape.methods} <= set(METHODS)


def test_the_cpu_suite_holds_the_agreed_rows():
    rows = {shape.name: shape for shape in cases.suite("cpu")}
    for name in ("64x(64x64)", "16x(128x128)", "64x(8..64)", "1x(700x700)"):
        shape = rows[name]
        assert (shape.d, shape.metric, shape.dtype, shape.reg, shape.iterations) == (768, "cosine", "float32", 0.1, 50)
        assert (shape.part, shape.tol) == ("both", None)
        assert {"torch cost and its backward", "torch three products", "OTT-JAX log"} <= set(shape.methods)


def test_the_floor_is_the_largest_of_the_overlapped_resources():
    clouds = problems.make_clouds(TINY)
    work = model.work_of(TINY, clouds)
    assert work["bytes"] == 3 * 4 * 2 * (6 + 5) * 8
    assert work["flop"] == 3 * 2 * 2 * 6 * 5 * 8
    rates = {"copy": 1e6, "matrix_float32": 1e6, "exponential": 1e9, "multiply_add": 1e9}
    shares = model.shares(work, TINY, 0.01, 10, rates)
    assert shares["floor_ms"] == pytest.approx(1e3 * max(work["bytes"], work["flop"]) / 1e6)
    assert shares["percent_of_ceiling"]["matrix"] == pytest.approx(100 * work["flop"] / 1e6 / 0.01, rel=1e-2)


def test_documents_show_the_committed_results():
    assert report.update_documents(write=False) == [], "run: python -m benchmarks readme"


def test_tables_are_put_between_their_marks(troubled, tmp_path):
    result = copy.deepcopy(troubled[0])
    result["header"]["suite"] = "cpu"
    record.write(tmp_path / "machine-2026-01-01.json", result)
    before = "a\n<!-- benchmarks:cpu -->\nold\n<!-- /benchmarks -->\nb <!-- benchmarks:gpu -->\n<!-- /benchmarks -->\n"
    after = report.update(before, tmp_path)
    assert "old" not in after
    assert "| **otkern** |" in after
    assert report.NOTHING in after
    assert report.update(after, tmp_path) == after


def test_the_gpu_script_is_read_by_bash_and_refuses_unknown_parts():
    script = str(record.ROOT / "benchmarks" / "gpu.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    refused = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "unknown part nonsense" in refused.stderr
