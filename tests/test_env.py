"""``python -m otkern.env`` and ``python -m otkern.selftest``: what they print and when they fail."""

import json
import os
import subprocess
import sys

import torch

from otkern import env, selftest
from otkern.backends import BACKENDS, unavailable


def run_module(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    set_by_tests = ("TRITON_INTERPRET", "OTKERN_CUDA_EXECUTOR")
    environment = {key: value for key, value in os.environ.items() if key not in set_by_tests} | variables
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_json_report_is_one_object_that_names_every_backend():
    done = run_module("otkern.env", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"versions", "native", "cpu", "devices", "nvcc", "backends"}
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert report["versions"]["torch"] == torch.__version__


def test_report_gives_a_reason_for_every_absent_backend():
    report = env.report()
    text = env.describe(report)
    for name, reasons in report["backends"].items():
        for kind, reason in reasons.items():
            assert reason == unavailable(name, kind)
            line = f"{name:11}{kind} tensors: " + (f"no, {reason}" if reason else "yes")
            assert line in text.splitlines()
            assert reason is None or (reason.strip() and "\n" not in reason)


def test_reference_runs_everywhere():
    assert set(env.report()["backends"]["reference"].values()) == {None}


def test_cuda_serves_cpu_tensors_only_where_its_executor_is_asked_for():
    plain = json.loads(run_module("otkern.env", "--json").stdout)
    assert "takes CUDA tensors" in plain["backends"]["cuda"]["cpu"]


def test_report_says_how_to_run_triton_without_a_gpu():
    report = json.loads(run_module("otkern.env", "--json").stdout)
    if report["versions"]["triton"] is None:
        assert report["backends"]["triton"]["cpu"] == "triton is not installed"
    else:
        assert "TRITON_INTERPRET=1" in report["backends"]["triton"]["cpu"]
        interpreted = json.loads(run_module("otkern.env", "--json", TRITON_INTERPRET="1").stdout)
        assert interpreted["backends"]["triton"]["cpu"] is None


def test_description_is_made_for_a_machine_without_anything_optional():
    report = env.report()
    report["versions"]["triton"] = report["nvcc"] = None
    report["devices"] = []
    report["native"] = {"missing": "the native module was not built"}
    text = env.describe(report)
    for words in ("Triton     not installed", "nvcc       not found", "the native module was not built", "no device"):
        assert words in text


def test_description_lists_the_devices():
    report = env.report()
    report["devices"] = [{"name": "Some GPU", "capability": "90", "memory_gib": 80.0}]
    assert "cuda:0     Some GPU, sm_90, 80.0 GiB" in env.describe(report).splitlines()


def test_selftest_says_one_sentence_per_backend_and_succeeds():
    done = run_module("otkern.selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for name in BACKENDS:
        assert [line for line in lines if line.startswith((f"{name} on ", f"{name}: absent, "))]
    assert all(line.endswith(".") for line in lines)


def test_selftest_answer_is_right(backend, device):
    assert selftest.largest_error(backend, device) <= selftest.TOLERANCE


def test_selftest_fails_on_a_wrong_answer(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "VALUE", selftest.VALUE * 1.001)
    assert selftest.main() == 1
    assert "reference on cpu tensors: WRONG" in capsys.readouterr().out


def test_selftest_fails_on_a_nan(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "VALUE", float("nan"))
    assert selftest.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_selftest_fails_on_a_backend_that_raises(monkeypatch, capsys):
    def broken(backend, device):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(selftest, "largest_error", broken)
    assert selftest.main() == 1
    assert "RuntimeError: no kernel" in capsys.readouterr().out


def test_selftest_does_not_fail_on_an_absent_backend(monkeypatch):
    monkeypatch.setattr(selftest, "unavailable", lambda name, kind: None if name == "reference" else "it is absent")
    sentences, right = selftest.run()
    assert right
    assert sum("absent, it is absent." in sentence for sentence in sentences) == len(BACKENDS) - 1
