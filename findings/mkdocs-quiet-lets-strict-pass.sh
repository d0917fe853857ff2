#!/usr/bin/env bash
# `mkdocs build --strict --quiet` passes with the broken link for which
# `mkdocs build --strict` fails.
#
# Version:  mkdocs 1.6.1 (Python 3.11, Linux)
# Expected: --quiet says less and decides nothing: a strict build with a warning
#           ends with another status than 0.
# Observed: --strict counts warnings with a handler of the logger, and --quiet
#           raises the logger's own level above warnings, so none is counted.
# Output seen on 2026-11-30:
#   --strict: status 1
#   --strict --quiet: status 0
#   unchanged: --quiet hides the warning from --strict
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet mkdocs==1.6.1
mkdir "$dir/docs"
echo "site_name: a site" > "$dir/mkdocs.yml"
echo "[a page that is not there](missing.md)" > "$dir/docs/index.md"
cd "$dir"

loud=0 quiet=0
venv/bin/mkdocs build --strict > log 2>&1 || loud=$?
venv/bin/mkdocs build --strict --quiet > log 2>&1 || quiet=$?
echo "--strict: status $loud"
echo "--strict --quiet: status $quiet"
if [ "$loud" = 1 ] && [ "$quiet" = 0 ]; then
  echo "unchanged: --quiet hides the warning from --strict"
else
  echo "behavior changed"
  exit 1
fi
