"""What ships: the metadata, the typed marker, the README's code and the examples in the docstrings."""

import ast
import doctest
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

import otkern

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = ("alignment", "env", "losses", "problem", "result", "solve")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_version_is_the_installed_one():
    assert otkern.__version__ == importlib.metadata.version("otkern")


def test_metadata_states_supported_versions_as_ranges():
    metadata = importlib.metadata.metadata("otkern")
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")
    assert {"train", "bench", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_package_is_marked_as_typed():
    assert (Path(otkern.__file__).parent / "py.typed").is_file()


def test_only_otkern_is_packaged():
    tops = {name.split(".")[0] for name in importlib.metadata.distribution("otkern").read_text("top_level.txt").split()}
    assert tops == {"otkern"}


def test_public_names_exist_and_are_documented():
    for name in otkern.__all__:
        if not name.startswith("__"):
            assert (getattr(otkern, name).__doc__ or "").strip(), f"otkern.{name} has no docstring"


@pytest.mark.parametrize("block", python_blocks(read("README.md")))
def test_readme_code_runs(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    gradient = names["english"].grad
    assert names["value"].shape == (2,)
    assert gradient[1, :5].abs().sum() > 0
    assert gradient[1, 5:].abs().max() == 0
    assert names["plan"].shape == (9, 7)


def test_readme_has_its_code():
    (block,) = python_blocks(read("README.md"))
    statements = [line for line in block.splitlines() if line.strip() and not line.startswith("import")]
    assert len(statements) <= 8


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_in_the_papers_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)", read(name)):
        assert target.startswith("https://") or (ROOT / target).exists(), f"{name} points at {target}"


def test_readme_has_no_place_left_for_numbers():
    assert "<!-- NUMBERS -->" not in read("README.md")


@pytest.mark.parametrize("module", DOCUMENTED)
def test_docstring_examples_run(module):
    failed, _ = doctest.testmod(importlib.import_module(f"otkern.{module}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_public_functions_have_an_example():
    for name in ("solve", "solve_sample", "solve_batch", "solve_sample_batch", "SinkhornLoss"):
        assert ">>> " in getattr(otkern, name).__doc__, f"otkern.{name} has no example"


def test_the_type_stub_has_the_arguments_of_the_native_functions():
    native = pytest.importorskip("otkern._native", reason="the native module is not built")
    for node in ast.parse((ROOT / "otkern" / "_native.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            function, node = getattr(native, node.name).__init__, node.body[0]
        elif isinstance(node, ast.FunctionDef) and hasattr(native, node.name):
            function = getattr(native, node.name)
        else:
            continue
        signature = function.__doc__.splitlines()[0].split("->")[0]
        names = [name for name in re.findall(r"(\w+): ", signature) if name != "self"]
        assert names == [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"], node.name
