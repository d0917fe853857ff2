#!/usr/bin/env bash
# From a bare machine with Python 3.11 or newer to two trained networks, their scores and a picture, in minutes.
#
#   bash scripts/quickstart.sh
#
# Makes .venv, installs, and fine-tunes the small backbone of this package on procedural rooms, for depth and for
# segmentation; nothing is downloaded but packages. Each training ends with the scores on rooms that no training has
# seen. The last step draws some of these rooms. Run again, it continues where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
make_environment tensorboard

# XLA on CPU takes the memory of every step anew: in large pages that costs a fifth less, where the system has them.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

run=runs/quickstart

for task in depth segmentation; do
  echo "== $task: training and scores"
  "$PYTHON" -m vpd_jax.main --config="configs/rooms.py:$task,small" --workdir="$run/$task"
done
echo "== contact sheet"
"$PYTHON" scripts/contact_sheet.py --workdirs "$run/depth" "$run/segmentation" --output="$run/contact_sheet.png"

cat <<END

Done. Look at $(pwd)/$run/contact_sheet.png
The same commands work on these runs as on any other, here with the network for depth:
  $PYTHON -m vpd_jax.main --workdir=$run/depth --mode=eval
  $PYTHON scripts/make_rooms_pictures.py --output=$run/pictures --size 128 128
  $PYTHON -m vpd_jax.main --workdir=$run/depth --mode=predict --input=$run/pictures --output=$run/predictions
  $PYTHON -m tensorboard.main --logdir $run
Next: README.md, for the real weights and data sets.
END
