#!/usr/bin/env bash
# What every host of a Cloud TPU slice runs: own environment, then the same command on all of them. Creates no machine.
#
#   on one host:    bash scripts/tpu_vm.sh --config=configs/nyu_depth.py --workdir=gs://BUCKET/nyu ...
#   on all hosts:   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#                     --command='cd vpd_jax && bash scripts/tpu_vm.sh --config=... --workdir=gs://BUCKET/nyu ...'
#
# Everything after the script's name goes to `python -m vpd_jax.main`. The project lies in the same folder on every host
# (gcloud compute tpus tpu-vm scp --worker=all --recurse . NAME:vpd_jax), data and weights are read from there or from a
# bucket. VPD_PREPARE_ONLY=1 installs, tells what devices it sees, and stops.
# Not yet run on a TPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
make_environment tpu,gcs,clu

# Memory that is handed back to the system page by page costs the host's workers time.
if ldconfig -p 2>/dev/null | grep -q libtcmalloc.so.4; then
  export LD_PRELOAD="${LD_PRELOAD:-libtcmalloc.so.4}"
fi

if [ "${VPD_PREPARE_ONLY:-0}" = 1 ]; then
  # Alone, without waiting for the other hosts.
  exec "$PYTHON" -c 'import jax; print(jax.__version__, jax.local_devices())'
fi
if [ $# -eq 0 ]; then
  echo "error: give the words of vpd_jax.main, like --config=configs/nyu_depth.py --workdir=gs://BUCKET/nyu" >&2
  exit 2
fi
exec "$PYTHON" -m vpd_jax.main "$@"
