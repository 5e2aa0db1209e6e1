#!/usr/bin/env bash
# Proves and times the package on a machine with a GPU and no network.
#
#   benchmarks/gpu.sh [--wheels DIR] [--results DIR] [--python PYTHON] [part ...]
#
# Parts, all of them by default and in this order: install env selftest tests memcheck racecheck speed. PYTHON must have
# torch and Triton. DIR holds wheels of what may be missing: pytest, hypothesis, numpy, tqdm, matplotlib, pybind11, ninja,
# setuptools, the peers of benchmarks/requirements.txt, and whatever they depend on; all wheels in it are installed. The
# native module is built where nvcc or a C++ compiler and the build packages are found. Every part has its own time
# limit, all together within nine minutes, and a part that fails does not stop the next one. What lies in the folder of
# results afterwards: a log of each part, tests.xml, gpu.json, table.txt, measured.json and summary.txt. The speed part
# continues where an earlier one with the same folder stopped: "gpu.sh speed", run again, goes on.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

wheels="" results=gpu-results python=python3
parts=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels | --results | --python)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            case "$1" in
                --wheels) wheels=$(realpath "$2") ;;
                --results) results=$2 ;;
                --python) python=$2 ;;
            esac
            shift 2
            ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) parts+=("$1"); shift ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(install env selftest tests memcheck racecheck speed)
declare -A limit=([install]=115 [env]=20 [selftest]=30 [tests]=160 [memcheck]=45 [racecheck]=45 [speed]=120)
for part in "${parts[@]}"; do
    [ -n "${limit[$part]:-}" ] || { echo "unknown part $part; known are ${!limit[*]}" >&2; exit 2; }
done
mkdir -p "$results" || exit 2
results=$(realpath "$results")
unset TRITON_INTERPRET
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$results/triton-cache}"

part_install() {
    if [ -n "$wheels" ] && ls "$wheels"/*.whl >/dev/null 2>&1; then
        # Without dependencies: what is there of torch and its CUDA packages stays as it is.
        local wheel failed=0
        for wheel in "$wheels"/*.whl; do
            "$python" -m pip install --quiet --no-index --no-deps "$wheel" || { echo "not installed: $wheel"; failed=1; }
        done
        if ls "$wheels"/otkern-*.whl >/dev/null 2>&1; then return "$failed"; fi
    fi
    if "$python" -c 'import pybind11, ninja, setuptools' 2>/dev/null && command -v g++ >/dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . && return
        echo "the native module was not built; the Triton kernels need none"
    else
        echo "g++, pybind11, ninja or setuptools is missing: without the native module"
    fi
    OTKERN_BUILD=python "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
}

part_env() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv
    "$python" -m otkern.env
}

part_selftest() { "$python" -m otkern.selftest; }

# Compiling every kernel for every target runs where there is no GPU; here everything else runs and kernels are launched.
part_tests() {
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8 --dist worksteal); fi
    "$python" -m pytest -q -p no:cacheprovider tests "${workers[@]}" --ignore tests/test_triton_compile.py \
        --ignore tests/training --junitxml "$results/tests.xml"
}

find_sanitizer() {
    command -v compute-sanitizer && return
    local candidate
    for candidate in /usr/local/cuda*/bin/compute-sanitizer; do
        [ -x "$candidate" ] && { echo "$candidate"; return; }
    done
    return 1
}

# Status 3, which the summary shows as "could not run", tells a machine without the tool, or one that does not let it
# attach, from an error that it found.
sanitize() {
    local sanitizer status
    if ! sanitizer=$(find_sanitizer); then
        echo "compute-sanitizer is not installed here: $1 did not run"
        return 3
    fi
    # Torch's own allocator would hide an access beyond a tensor inside its pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
        "$python" benchmarks/sanitized.py >"$results/$1.txt" 2>&1
    status=$?
    cat "$results/$1.txt"
    if [ "$status" -ne 0 ] && [ "$status" -ne 9 ] && ! grep -q "^case " "$results/$1.txt"; then
        echo "compute-sanitizer could not run a program on this machine: $1 did not run"
        return 3
    fi
    return "$status"
}

part_memcheck() { sanitize memcheck; }

part_racecheck() { sanitize racecheck; }

part_speed() {
    local status
    "$python" -m benchmarks run --suite gpu --json "$results/gpu.json" --seconds 2 --limit 40 --minutes 1.3 --threads 4
    status=$?
    [ -f "$results/gpu.json" ] || return "$status"
    "$python" -m benchmarks table "$results/gpu.json" >"$results/table.txt"
    # Who is faster where: to be committed with the results as otkern/backends/measured.json.
    "$python" -m benchmarks choose "$results/gpu.json" --table "$results/measured.json"
    return "$status"
}

status=0
summary=()
export -f part_install part_env part_selftest part_tests part_memcheck part_racecheck part_speed sanitize find_sanitizer
export wheels results python
for part in "${parts[@]}"; do
    printf '\n== %s\n' "$part"
    start=$SECONDS
    timeout --kill-after=5 "${limit[$part]}" bash -c "part_$part" 2>&1 | tee "$results/$part.log"
    code=${PIPESTATUS[0]}
    case "$code" in
        0) verdict=passed ;;
        3) verdict="could not run" ;;
        124 | 137) verdict="stopped at its limit" status=1 ;;
        *) verdict="failed with status $code" status=1 ;;
    esac
    summary+=("$(printf '%-10s %4d s  %s' "$part" $((SECONDS - start)) "$verdict")")
done
printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$results/summary.txt"
exit "$status"
