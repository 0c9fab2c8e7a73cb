#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU and a torch of its own, offline. Installs into that Python where the tools are
# there, else runs from the checkout; then the GPU tests and the benchmarks, whose records go to bench/results.
# Each step says what failed and the rest still runs; the exit status is 1 when anything failed. At most 8 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
END=$((SECONDS + 470))
failed=()

# step NAME SECONDS COMMAND...: at most that long, and never beyond the end; a polite interrupt lets pytest report.
step() {
  local name=$1 limit=$2 status=0
  shift 2
  ((limit > END - SECONDS)) && limit=$((END - SECONDS))
  echo "== $name (at most $limit s)"
  ((limit > 0)) && timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
  ((limit > 0)) || status=124
  ((status == 0)) && return
  ((status == 124)) && failed+=("$name: out of time") || failed+=("$name: exit $status")
  echo "== failed: ${failed[-1]}"
  return 1
}

"$PYTHON" - << 'PY' || exit 1
import sys
try:
    import torch
except ImportError:
    sys.exit(f"make gpu needs a torch: {sys.executable} has none (PYTHON=... names another Python)")
if not torch.cuda.is_available():
    sys.exit(f"make gpu needs a GPU: torch {torch.__version__} sees none here")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
PY

install=("$PYTHON" -m pip install -q --no-deps --no-build-isolation --no-index --break-system-packages -e .)
if ! step "install" 150 "${install[@]}" || ! "$PYTHON" -c 'import mmfast._native' 2> /dev/null; then
  echo "== going on from the checkout, with the native code that lies in mmfast/"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
[ -f mmfast/native.txt ] && cat mmfast/native.txt
step "doctor" 60 "$PYTHON" -c 'from mmfast.doctor import main; main()'

# Only the files that hold GPU tests: others may import what such a machine does not have.
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
if ((${#tests[@]})); then
  step "GPU tests" 240 "$PYTHON" -m pytest -q -m gpu --continue-on-collection-errors "${tests[@]}"
else
  failed+=("GPU tests: there are none")
fi
# Attention first: it has the most kernels that only a GPU runs. A suite that is cut short records what it has.
bench=("$PYTHON" -m pytest -q --benchmark-only --seconds 0.5 --results bench/results)
step "attention benchmarks" 240 "${bench[@]}" mmfast/bench/bench_cross_attention*.py
step "other benchmarks" 240 "${bench[@]}" mmfast/bench --ignore-glob='*cross_attention*'

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all done in $SECONDS s"
