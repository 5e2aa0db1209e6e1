#!/usr/bin/env bash
# Proves and times the package on a machine with a GPU and no network.
#
#   benchmarks/gpu.sh [--wheels DIR] [--results DIR] [--python PYTHON] [part ...]
#
# Parts, all of them by default and in this order: install env selftest tests memcheck speed. PYTHON must have torch and
# Triton; wheels of otkern's test packages (pytest, hypothesis, numpy, their dependencies) are taken from DIR. Every part
# has its own time limit, all together below nine minutes, and a part that fails does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."

wheels="" results="${OUT:-gpu-results}" python=python3
parts=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) wheels=$(realpath "$2"); shift 2 ;;
        --results) results=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) parts+=("$1"); shift ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(install env selftest tests memcheck speed)
mkdir -p "$results"
results=$(realpath "$results")
unset TRITON_INTERPRET
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$results/triton-cache}"

install() {
    if [ -n "$wheels" ]; then
        "$python" -m pip install --quiet --no-index --find-links "$wheels" pytest hypothesis || return 1
        if ls "$wheels"/otkern-*.whl >/dev/null 2>&1; then
            "$python" -m pip install --quiet --no-index --no-deps --force-reinstall "$wheels"/otkern-*.whl
            return
        fi
    fi
    # What is timed here needs no compiler; pybind11 and ninja may be missing.
    OTKERN_BUILD=python "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
}

env() { "$python" -m otkern.env; }

selftest() { "$python" -m otkern.selftest; }

# The compilation without a GPU runs elsewhere; here every kernel is launched.
tests() {
    "$python" -m pytest -q -p no:cacheprovider tests -k "triton" --ignore tests/test_triton_compile.py \
        --ignore tests/training --junitxml "$results/tests.xml"
}

memcheck() {
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
    if [ -z "$sanitizer" ]; then
        echo "compute-sanitizer is not installed here: memory accesses are not checked"
        return 0
    fi
    # Torch's own allocator would hide an access beyond a tensor inside its pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" - <<'PYTHON'
import torch, otkern

for metric, dtype in (("cosine", torch.bfloat16), ("euclidean", torch.float32)):
    x = torch.randn(3, 150, 67, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.randn(3, 131, 67, device="cuda", dtype=dtype, requires_grad=True)
    lengths_a, lengths_b = [150, 37, 9], [131, 101, 16]
    reg = torch.full((3,), 0.3, device="cuda", requires_grad=True)
    result = otkern.solve_sample(
        x, y, metric=metric, reg=reg, max_iter=3, backend="triton", lengths_a=lengths_a, lengths_b=lengths_b
    )
    result.value.sum().backward()
    torch.cuda.synchronize()
    print(metric, result.value.tolist())
PYTHON
}

speed() { "$python" -m benchmarks.gpu_speed --json "$results/speed.json"; }

declare -A limit=([install]=60 [env]=30 [selftest]=60 [tests]=200 [memcheck]=70 [speed]=110)
status=0
summary=()
export -f install env selftest tests memcheck speed
export wheels results python
for part in "${parts[@]}"; do
    if [ -z "${limit[$part]:-}" ]; then
        echo "unknown part $part" >&2
        exit 2
    fi
    printf '\n== %s\n' "$part"
    start=$SECONDS
    timeout "${limit[$part]}" bash -c "$part" 2>&1 | tee "$results/$part.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || status=1
    summary+=("$(printf '%-9s status %3d  %4d s' "$part" "$code" $((SECONDS - start)))")
done
printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$results/summary.txt"
exit "$status"
