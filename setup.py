"""Builds the native module ``otkern._native`` with ninja; without a compiler the package is pure Python and works.

``OTKERN_BUILD`` says what to build:
    auto    (default) the C++ half where a compiler is found; the CUDA half where nvcc is found and it can be used: for
            the GPUs that are visible; where none is, for every target if torch is a CUDA build or cannot be asked, as
            in an isolated build; not beside a CPU build of torch
    python  nothing native
    cpu     the C++ half; fails where there is no compiler
    cuda    the C++ and the CUDA half; fails where there is no nvcc
``OTKERN_CUDA_ARCHS`` names the targets of the CUDA half, such as ``sm_80,sm_90a``, or ``all``: it is built then,
whatever is visible. No GPU is needed to build it. ``OTKERN_BUILD_HOST_EXECUTOR=1`` also builds ``otkern._cuda_host``,
which runs the CUDA kernels on the CPU for tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
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


def visible_capabilities() -> list[str]:
    """Compute capabilities of the GPUs that the driver shows, such as "9.0"; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\d+\.\d+", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def torch_build() -> str | None:
    """ "cpu" or "cuda": which build of torch is installed; None where there is none to ask. Imports nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    version = Path(spec.submodule_search_locations[0]) / "version.py"
    found = (
        re.search(r"^cuda\b[^=]*= *(.+)$", version.read_text(encoding="utf-8"), re.MULTILINE)
        if version.is_file()
        else None
    )
    return None if found is None else "cpu" if found[1].strip() == "None" else "cuda"


def choose_targets(mode: str, named: str | None, visible: list[str], torch: str | None) -> tuple[list[str], str]:
    """The keys of `CUDA_TARGETS` to build for, none for no CUDA half, and why, as the end of a sentence.

    Args:
        mode: ``auto`` or ``cuda``.
        named: ``OTKERN_CUDA_ARCHS``.
        visible: compute capabilities of the GPUs.
        torch: see `torch_build`.
    """
    everything = list(CUDA_TARGETS)
    if named:
        if named.strip() == "all":
            return everything, "OTKERN_CUDA_ARCHS=all"
        names = {name: number for number, code in CUDA_TARGETS.items() for name in (number, f"sm_{number}", code)}
        asked = [name for name in re.split(r"[ ,;]+", named.strip()) if name]
        if unknown := [name for name in asked if name not in names]:
            known = ", ".join(CUDA_TARGETS.values())
            raise SystemExit(f"otkern: OTKERN_CUDA_ARCHS must be all or among {known}, but was {unknown[0]!r}")
        return sorted({names[name] for name in asked}, key=int), f"OTKERN_CUDA_ARCHS={named}"
    if visible:
        majors = {int(capability.split(".")[0]) for capability in visible}
        # Code for 8.0 runs on all of 8.x; what comes after 10.0 takes the PTX of the newest.
        served = {"80" if major == 8 else "90" if major == 9 else "100" for major in majors if major >= 8}
        shown = f"GPUs of compute capability {', '.join(sorted(set(visible)))} are visible"
        if served or mode == "auto":
            return sorted(served, key=int), shown
    if mode == "cuda":
        return everything, "OTKERN_BUILD=cuda, and no GPU is visible"
    if torch == "cpu":
        return [], "no GPU is visible and torch is a CPU build (OTKERN_CUDA_ARCHS=all builds it)"
    kind = "torch is a CUDA build" if torch == "cuda" else "torch cannot be asked"
    return everything, f"no GPU is visible and {kind} (OTKERN_BUILD=cpu leaves it out)"


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


def cuda_targets(nvcc: str, chosen: list[str]) -> list[str]:
    """Flags for those of the chosen targets that this nvcc knows; PTX of the newest, too."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = [number for number in chosen if re.search(rf"^compute_{number}$", known, re.MULTILINE)]
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


def write_ninja(
    folder: Path, compiler: list[str], nvcc: str | None, chosen: list[str], target: Path, parts: list[Compilation]
) -> None:
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
            f"  command = {shlex.join([*host, *NVCC_FLAGS, *cuda_targets(nvcc, chosen)])}"
            " -MMD -MF $out.d -c $in -o $out",
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

        chosen, why = [], ""
        if nvcc is not None:
            named = os.environ.get("OTKERN_CUDA_ARCHS")
            chosen, why = choose_targets(build_mode(), named, visible_capabilities(), torch_build())

        def run(nvcc: str | None) -> None:
            parts = host_objects() if host else native_objects(nvcc)
            write_ninja(folder, compiler, nvcc, chosen, target, parts)
            # pip hides what a build prints; on a terminal ninja's count of steps shows that it goes on.
            with contextlib.ExitStack() as stack:
                terminal = None
                with contextlib.suppress(OSError):
                    terminal = stack.enter_context(open("/dev/tty", "wb"))
                subprocess.run([find_ninja(), "-C", str(folder)], check=True, stdout=terminal)

        if host:
            run(None)
            say(f"built the CUDA kernels for the host executor with {compiler[0]}, because it was asked for")
            return
        reason = "only the C++ half was asked for" if build_mode() == "cpu" else "no nvcc was found"
        if nvcc is not None and not chosen:
            reason = why
        elif nvcc is not None:
            try:
                run(nvcc)
                codes = ", ".join(CUDA_TARGETS[number] for number in chosen)
                say(f"built the C++ half with {compiler[0]} and the CUDA half for {codes} with {nvcc}, because {why}")
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
