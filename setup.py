"""Builds the native module ``otkern._native`` with ninja; without a compiler the package is pure Python and works.

``OTKERN_BUILD`` says what to build:
    auto    (default) the C++ half where a compiler is found, the CUDA half where nvcc is found, too
    python  nothing native
    cpu     the C++ half; fails where there is no compiler
    cuda    the C++ and the CUDA half; fails where there is no nvcc
No GPU is needed to build the CUDA half. ``OTKERN_BUILD_HOST_EXECUTOR=1`` also builds ``otkern._cuda_host``, which runs
the CUDA kernels on the CPU for tests.
"""

from __future__ import annotations

import os
import platform
import re
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
CUDA_KERNELS = ("forward", "symmetric", "implicit", "backward", "apply")
# Architecture-specific code for Hopper; PTX of the newest, from which drivers make code for what comes after it.
CUDA_TARGETS = {"80": "sm_80", "90": "sm_90a", "100": "sm_100"}
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "--threads", "3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def say(sentence: str) -> None:
    # pip shows the output of a build only with -v; the sentence is for whoever looks.
    print(f"otkern: {sentence}", file=sys.stderr)


def build_mode() -> str:
    mode = os.environ.get("OTKERN_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"otkern: OTKERN_BUILD must be one of {', '.join(MODES)}, but was {mode!r}")
    return mode


def wants_host_executor() -> bool:
    return os.environ.get("OTKERN_BUILD_HOST_EXECUTOR") == "1"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of the usual names on the PATH."""
    if command := os.environ.get("CXX"):
        words = shlex.split(command)
        return words if shutil.which(words[0]) else None
    return next(([path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def find_nvcc(mode: str) -> str | None:
    """nvcc of $CUDA_HOME, or the first on the PATH; None where the mode asks for no CUDA half."""
    if mode == "cpu":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if path is None and mode == "cuda":
        raise RuntimeError("no nvcc was found (set CUDA_HOME or install the CUDA toolkit)")
    return path


def host_compiler(compiler: list[str]) -> list[str]:
    """nvcc's options for the C++ compiler: its program, behind launchers such as ccache, and its flags."""
    programs = [word for word in compiler if not word.startswith("-")]
    program = next((word for word in programs if "cache" not in Path(word).name and Path(word).name != "distcc"), "c++")
    flags = [word for word in compiler if word not in programs]
    return ["-ccbin", program, *(f"-Xcompiler={flag}" for flag in flags)]


def cuda_targets(nvcc: str) -> list[str]:
    """Flags for the targets that this nvcc knows; PTX of the newest, too."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = [number for number in CUDA_TARGETS if re.search(rf"^compute_{number}$", known, re.MULTILINE)]
    flags = []
    for number in wanted:
        code = CUDA_TARGETS[number]
        flags += ["-gencode", f"arch={code.replace('sm', 'compute')},code={code}"]
    # Of an architecture-specific target no other device could use the PTX.
    return [*flags, *(["-gencode", f"arch=compute_{wanted[-1]},code=compute_{wanted[-1]}"] if wanted else [])]


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


# (object, rule, source, flags) of a compilation.
Compilation = tuple[str, str, str, list[str]]


def native_objects(nvcc: str | None) -> list[Compilation]:
    """What `otkern._native` is made of; the C++ kernels once per SIMD level of this architecture."""
    includes = [f"-isystem{folder}" for folder in include_folders()]
    cuda = ["-DOTKERN_CUDA"] if nvcc else []
    found = [
        ("bindings.o", "compile", "csrc/bindings.cpp", ["-O1", *includes, *cuda]),
        ("dispatch.o", "compile", "csrc/cpu/dispatch.cpp", ["-O2"]),
        ("threads.o", "compile", "csrc/cpu/threads.cpp", ["-O2"]),
    ]
    levels = SIMD_LEVELS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    for level in levels:
        flags = [*KERNEL_FLAGS, f"-DOTKERN_LEVEL={level}", *SIMD_LEVELS[level]]
        found += [(f"{name}.{level}.o", "compile", f"csrc/cpu/{name}.cpp", flags) for name in PER_LEVEL]
    if nvcc:
        found.append(("cuda.launch.o", "compile", "csrc/cuda/launch.cpp", ["-O2"]))
        found += [(f"cuda.{name}.o", "compile_cuda", f"csrc/cuda/{name}.cu", []) for name in CUDA_KERNELS]
    # The longest compilations first: ninja starts them in this order.
    slow = ("compile_cuda", "bindings.o")
    return sorted(found, key=lambda entry: (not set(slow) & set(entry[:2]), -(ROOT / entry[2]).stat().st_size))


def host_objects() -> list[Compilation]:
    """What `otkern._cuda_host` is made of: the same kernels by the C++ compiler, and what runs them."""
    includes = [f"-isystem{folder}" for folder in include_folders()]
    found = [
        ("host.module.o", "compile", "csrc/cuda/host_module.cpp", ["-O1", *includes]),
        ("host.executor.o", "compile", "csrc/cuda/host_executor.cpp", ["-O2"]),
        ("host.launch.o", "compile", "csrc/cuda/launch.cpp", ["-O2"]),
    ]
    flags = ["-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-x", "c++"]
    return found + [(f"host.{name}.o", "compile", f"csrc/cuda/{name}.cu", flags) for name in CUDA_KERNELS]


def write_ninja(folder: Path, compiler: list[str], nvcc: str | None, target: Path, parts: list[Compilation]) -> None:
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
    if nvcc:
        # nvcc links, too: it knows where its own runtime is.
        host = [nvcc, *host_compiler(compiler)]
        lines += [
            "rule compile_cuda",
            f"  command = {shlex.join([*host, *NVCC_FLAGS, *cuda_targets(nvcc)])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link_cuda",
            f"  command = {shlex.join([*host, '-shared', '-cudart', 'static'])} -o $out $in -Xcompiler -pthread -ldl",
            "  description = link $out",
        ]
    for name, rule, source, flags in parts:
        lines += [f"build {name}: {rule} {escape(ROOT / source)}", f"  flags = {shlex.join(flags)}"]
    link = "link_cuda" if any(rule == "compile_cuda" for _, rule, *_ in parts) else "link"
    lines.append(f"build {escape(target)}: {link} {' '.join(name for name, *_ in parts)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")


class BuildNative(build_ext):
    def run(self) -> None:
        if not wants_host_executor():
            # That of an earlier build would be packed into a wheel, or meet another layout of the calls.
            folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
            for stale in (folder / "otkern").glob("_cuda_host*.so"):
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        host = ext.name.endswith("_cuda_host")
        try:
            compiler = find_compiler()
            if compiler is None:
                raise RuntimeError("no C++ compiler was found")
            nvcc = None if host else find_nvcc(mode)
            self.make(target, compiler, nvcc, host)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if mode != "auto" or host:
                raise SystemExit(f"otkern: OTKERN_BUILD={mode} failed: {error}") from error
            target.unlink(missing_ok=True)
            say(f"built the pure Python package, without the cpu backend, because the C++ build failed: {error}")

    def make(self, target: Path, compiler: list[str], nvcc: str | None, host: bool) -> None:
        folder = Path(self.build_temp).resolve() / target.name.split(".")[0]
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def run(nvcc: str | None) -> None:
            write_ninja(folder, compiler, nvcc, target, host_objects() if host else native_objects(nvcc))
            subprocess.run([find_ninja(), "-C", str(folder)], check=True)

        if host:
            run(None)
            say(f"built the CUDA kernels for the host executor with {compiler[0]}, because it was asked for")
            return
        reason = "only the C++ half was asked for" if build_mode() == "cpu" else "no nvcc was found"
        if nvcc is not None:
            try:
                run(nvcc)
                say(f"built the C++ half with {compiler[0]} and the CUDA half with {nvcc}")
                return
            except (OSError, subprocess.CalledProcessError) as error:
                if build_mode() == "cuda":
                    raise
                reason = f"the build with {nvcc} failed: {error}"
        run(None)
        say(f"built the C++ half with {compiler[0]}, and no CUDA half because {reason}")


class BuildPython(build_py):
    def run(self) -> None:
        if getattr(self, "editable_mode", False) and build_mode() == "python":
            # The module of an earlier in-place build would still be imported.
            for name in ("_native", "_cuda_host"):
                for stale in (ROOT / "otkern").glob(f"{name}*.so"):
                    stale.unlink()
        super().run()


def extensions() -> list[Extension]:
    mode = build_mode()
    if mode == "python":
        say("built the pure Python package, because OTKERN_BUILD=python")
        return []
    if find_compiler() is None:
        if mode != "auto":
            raise SystemExit(f"otkern: OTKERN_BUILD={mode} failed: no C++ compiler was found (set CXX or install g++)")
        say("built the pure Python package, without the cpu backend, because no C++ compiler was found")
        return []
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    found = [Extension("otkern._native", sources, optional=mode == "auto")]
    if wants_host_executor():
        found.append(Extension("otkern._cuda_host", sources))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
