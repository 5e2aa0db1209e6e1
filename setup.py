"""Builds the native module ``otkern._native`` with ninja; without a compiler the package is pure Python and works.

``OTKERN_BUILD`` says what to build:
    auto    (default) the C++ half where a compiler is found, else nothing native
    python  nothing native
    cpu     the C++ half; fails where there is no compiler
    cuda    the C++ and the CUDA half; not in this release
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "python", "cpu", "cuda")

# -O3 for the kernels' loops. No -ffast-math (inf and NaN matter) and no -march=native (the binary must run elsewhere).
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
SIMD_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
PER_LEVEL = ("forward", "backward", "apply", "implicit", "symmetric")


def say(sentence: str) -> None:
    # pip shows the output of a build only with -v; the sentence is for whoever looks.
    print(f"otkern: {sentence}", file=sys.stderr)


def build_mode() -> str:
    mode = os.environ.get("OTKERN_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"otkern: OTKERN_BUILD must be one of {', '.join(MODES)}, but was {mode!r}")
    if mode == "cuda":
        raise SystemExit("otkern: OTKERN_BUILD=cuda cannot be served: this release has no CUDA sources")
    return mode


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of the usual names on the PATH."""
    if command := os.environ.get("CXX"):
        words = shlex.split(command)
        return words if shutil.which(words[0]) else None
    return next(([path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
        if path is None:
            raise RuntimeError("ninja was not found") from None
        return path
    return str(Path(ninja.BIN_DIR) / "ninja")


def include_folders() -> list[str]:
    import pybind11

    return [sysconfig.get_paths()["include"], pybind11.get_include()]


def objects() -> list[tuple[str, str, list[str]]]:
    """(object, source, flags) of every compilation; kernels once per SIMD level of this architecture."""
    includes = [f"-isystem{folder}" for folder in include_folders()]
    found = [
        ("bindings.o", "csrc/bindings.cpp", ["-O1", *includes]),
        ("dispatch.o", "csrc/cpu/dispatch.cpp", ["-O2"]),
        ("threads.o", "csrc/cpu/threads.cpp", ["-O2"]),
    ]
    levels = SIMD_LEVELS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    for level in levels:
        flags = [*KERNEL_FLAGS, f"-DOTKERN_LEVEL={level}", *SIMD_LEVELS[level]]
        found += [(f"{name}.{level}.o", f"csrc/cpu/{name}.cpp", flags) for name in PER_LEVEL]
    # The longest compilations first: ninja starts them in this order.
    return sorted(found, key=lambda entry: (entry[0] != "bindings.o", -(ROOT / entry[1]).stat().st_size))


def write_ninja(folder: Path, compiler: list[str], target: Path) -> None:
    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    command = shlex.join(compiler)
    lines = [
        "rule compile",
        f"  command = {command} -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG"
        " $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command} -shared -o $out $in -pthread -ldl",
        "  description = link $out",
    ]
    compilations = objects()
    for name, source, flags in compilations:
        lines += [f"build {name}: compile {escape(ROOT / source)}", f"  flags = {shlex.join(flags)}"]
    lines.append(f"build {escape(target)}: link {' '.join(name for name, *_ in compilations)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            compiler = find_compiler()
            if compiler is None:
                raise RuntimeError("no C++ compiler was found")
            folder = Path(self.build_temp).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_ninja(folder, compiler, target)
            subprocess.run([find_ninja(), "-C", str(folder)], check=True)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if mode != "auto":
                raise SystemExit(f"otkern: OTKERN_BUILD={mode} failed: {error}") from error
            target.unlink(missing_ok=True)
            say(f"built the pure Python package, without the cpu backend, because the C++ build failed: {error}")
            return
        say(f"built the C++ half with {compiler[0]}, and no CUDA half because this release has none")


class BuildPython(build_py):
    def run(self) -> None:
        if getattr(self, "editable_mode", False) and build_mode() == "python":
            # The module of an earlier in-place build would still be imported.
            for stale in (ROOT / "otkern").glob("_native*.so"):
                stale.unlink()
        super().run()


def extensions() -> list[Extension]:
    mode = build_mode()
    if mode == "python":
        say("built the pure Python package, because OTKERN_BUILD=python")
        return []
    if find_compiler() is None:
        if mode == "cpu":
            raise SystemExit("otkern: OTKERN_BUILD=cpu failed: no C++ compiler was found (set CXX or install g++)")
        say("built the pure Python package, without the cpu backend, because no C++ compiler was found")
        return []
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    return [Extension("otkern._native", sources, optional=mode == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
