#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU and a torch of its own, offline. Installs into that Python where the tools are
# there, else runs from the checkout; then the GPU tests and the benchmarks, whose records go to bench/results or
# $RESULTS. Each step says what failed and the rest still runs; the exit status is 1 when anything failed. At most
# 8 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results}
END=$((SECONDS + 470))
failed=() parallel=()

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
"$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 8) # most of the time Triton compiles
if ((${#tests[@]})); then
  step "GPU tests" 180 "$PYTHON" -m pytest -q -m gpu "${parallel[@]}" --continue-on-collection-errors "${tests[@]}"
else
  failed+=("GPU tests: there are none")
fi
# A process for each suite, those first whose kernels only a GPU runs: what breaks a GPU's context breaks it for the
# rest of a process. A suite that is cut short records what it has.
for suite in cross_attention concat_linear contrastive_loss weighted_fusion lowrank_fusion training_step \
  cross_attention_scaling; do
  if [ $suite = training_step ] && ! "$PYTHON" -c 'import jsonargparse' 2> /dev/null; then
    echo "== bench_$suite is left out: this Python has no jsonargparse"
    continue
  fi
  step "bench_$suite" 60 "$PYTHON" -m pytest -q --benchmark-only --seconds=0.2 --results="$RESULTS" \
    "mmfast/bench/bench_$suite.py"
done

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all done in $SECONDS s"
