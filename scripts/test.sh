#!/usr/bin/env bash
# All tests that need no accelerator, in an environment of their own making.
#
#   bash scripts/test.sh [arguments of pytest]
#   VPD_TEST_REFERENCE=1 bash scripts/test.sh   also against torch, diffusers and transformers, which it installs
#   VPD_TEST_WORKERS=1 bash scripts/test.sh     one process at a time; default: one for each core, at most 4, and one more
#
# float64 and eight virtual devices are settings of a whole process: these tests run in processes of their own.
# Full-size networks: .venv/bin/python -m pytest -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
extras=test
if [ "${VPD_TEST_REFERENCE:-0}" = 1 ]; then extras=test,reference; fi
make_environment "$extras"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
keep_freed_memory
cores=$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 4))')
workers=${VPD_TEST_WORKERS:-$cores}
scratch=$(mktemp -d)
trap 'jobs -p | while read -r group; do kill -- -"$group" 2>/dev/null || true; done; rm -rf "$scratch"' EXIT

# part NAME PROCESSES MARKERS [pytest arguments]: leaves the exit status of pytest in $scratch/NAME.
part() {
  local name=$1 processes=$2 markers=$3 status=0
  shift 3
  echo "== $name tests"
  "$PYTHON" -m pytest -m "$markers" --durations=10 -n "$processes" --dist loadfile --no-loadscope-reorder "$@" || status=$?
  echo "$status" > "$scratch/$name"
}

others() {
  JAX_ENABLE_X64=1 part x64 0 "x64 and not slow and not accelerator" "$@"
  XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8" \
    part multidevice 0 "multidevice and not slow and not x64" "$@"
  if "$PYTHON" -c 'import torch, diffusers, transformers' 2>/dev/null; then
    part reference 0 "reference and not slow and not x64 and not multidevice" "$@"
  else
    echo "== reference tests are left out: VPD_TEST_REFERENCE=1 bash scripts/test.sh installs torch and diffusers for them"
    echo "   (with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu the small torch without CUDA)"
    echo 5 > "$scratch/reference"
  fi
}

# The others, few and long, would leave cores idle: they run in one process beside the first part, and print at the end.
if [ "$workers" -gt 1 ]; then
  set -m # a group of its own, to be ended with this script
  others "$@" > "$scratch/log" 2>&1 &
  set +m
fi
# One file stays in one process: its tests share compiled functions. In order: otherwise files of few, long tests end last.
part default "$workers" "not slow and not x64 and not multidevice and not accelerator and not reference" "$@"
if [ "$workers" -gt 1 ]; then
  echo "== waiting for x64, multidevice and reference tests"
  wait
  cat "$scratch/log"
else
  others "$@"
fi

failed=() found=0
for name in default x64 multidevice reference; do
  status=$(cat "$scratch/$name" 2>/dev/null || echo "did not end")
  if [ "$status" != 5 ]; then found=1; fi # 5: no test was chosen
  case $status in 0 | 5) ;; *) failed+=("$name ($status)") ;; esac
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}"
  exit 1
fi
if [ "$found" = 0 ]; then
  echo "== no test was chosen"
  exit 5
fi
echo "== all passed"
