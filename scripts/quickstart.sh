#!/usr/bin/env bash
# From a bare machine with Python 3.11 or newer to a trained depth network, its scores and its pictures, in minutes.
#
#   bash scripts/quickstart.sh
#
# Makes .venv, installs, trains the tiny network on procedural rooms (nothing is downloaded but packages), evaluates
# and predicts. Run again, it continues where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
make_environment tensorboard

# XLA on CPU takes the memory of every step anew: in large pages that costs a fifth less, where the system has them.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

config=configs/rooms.py:depth,tiny
run=runs/quickstart

echo "== training"
"$PYTHON" -m vpd_jax.main --config="$config" --workdir="$run"
echo "== evaluation"
"$PYTHON" -m vpd_jax.main --config="$config" --workdir="$run" --mode=eval
echo "== prediction"
"$PYTHON" scripts/make_rooms_pictures.py --output="$run/pictures"
"$PYTHON" -m vpd_jax.main --config="$config" --workdir="$run" --mode=predict \
  --input="$run/pictures" --output="$run/predictions"

cat <<END

Done. Where to look, below $(pwd):
  $run/predictions    colored depth, 16-bit PNG, raw metres, and a JSON that states the units
  $run/metrics.jsonl  every scalar, one line per step
  $run/checkpoints    the state: the same command continues it
  curves and panels:  $PYTHON -m tensorboard.main --logdir $run
Next: README.md, for the real weights and data sets.
END
