#!/usr/bin/env bash
# All tests that need no accelerator, in an environment of their own making.
#
#   bash scripts/test.sh [arguments of pytest]
#   VPD_TEST_REFERENCE=1 bash scripts/test.sh   also against torch, diffusers and transformers, which it installs
#   VPD_TEST_WORKERS=1 bash scripts/test.sh     processes at once; default: the cores, at most 4
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
cores=$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 4))')
workers=${VPD_TEST_WORKERS:-$cores}
failed=()
found=0

# part NAME MARKERS [pytest arguments]: exit status 5 says that no test was chosen.
part() {
  local name=$1 markers=$2 status=0
  shift 2
  echo "== $name tests"
  "$PYTHON" -m pytest -m "$markers" --durations=10 -n "$workers" --dist loadfile --no-loadscope-reorder "$@" || status=$?
  case $status in
    0) found=1 ;;
    5) ;;
    *) found=1; failed+=("$name") ;;
  esac
}

# One file stays in one process: its tests share compiled functions. In order: otherwise files of few, long tests end last.
part default "not slow and not x64 and not multidevice and not accelerator and not reference" "$@"
JAX_ENABLE_X64=1 part x64 "x64 and not slow and not accelerator" "$@"
XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8" \
  part multidevice "multidevice and not slow and not x64" "$@"
if "$PYTHON" -c 'import torch, diffusers, transformers' 2>/dev/null; then
  part reference "reference and not slow and not x64 and not multidevice" "$@"
else
  echo "== reference tests are left out: VPD_TEST_REFERENCE=1 bash scripts/test.sh installs torch and diffusers for them"
  echo "   (with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu the small torch without CUDA)"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}"
  exit 1
fi
if [ "$found" = 0 ]; then
  echo "== no test was chosen"
  exit 5
fi
echo "== all passed"
