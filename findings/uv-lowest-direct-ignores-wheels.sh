#!/usr/bin/env bash
# `uv pip install --resolution lowest-direct` gives a local project its oldest
# dependencies, and the wheel built from that project its newest ones.
#
# Version:  uv 0.13.9 (Python 3.11, Linux), setuptools 80.9.0, six
# Expected: a path is a path: the dependencies of a wheel file on the command
#           line count as direct ones, as those of its folder do, or neither.
# Observed: for a folder, editable or not, the dependencies are taken at their
#           lower bounds; for the wheel of the same project at their newest
#           versions. A test of "the wheel with the oldest packages" tests the
#           newest ones, and nothing says so.
# Output seen on 2026-11-30:
#   folder: six==1.12.0
#   editable: six==1.12.0
#   wheel: six==1.17.0
#   unchanged: lowest-direct does not reach the dependencies of a wheel file
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9
uv=$dir/venv/bin/uv
mkdir -p "$dir/project/example"
touch "$dir/project/example/__init__.py"
cat > "$dir/project/pyproject.toml" <<'END'
[build-system]
requires = ["setuptools==80.9.0"]
build-backend = "setuptools.build_meta"
[project]
name = "example"
version = "1.0"
dependencies = ["six>=1.12"]
[tool.setuptools]
packages = ["example"]
END
cd "$dir"
"$uv" build --quiet --wheel --out-dir dist project

# resolved WHAT...: the version of six that uv would install for it.
resolved() {
  "$uv" pip install --python venv --dry-run --resolution lowest-direct "$@" 2>&1 | grep -oE 'six==[0-9.]+'
}
folder=$(resolved ./project)
editable=$(resolved --editable ./project)
wheel=$(resolved dist/*.whl)
echo "folder: $folder"
echo "editable: $editable"
echo "wheel: $wheel"
if [ "$folder" = six==1.12.0 ] && [ "$editable" = six==1.12.0 ] && [ "$wheel" != six==1.12.0 ]; then
  echo "unchanged: lowest-direct does not reach the dependencies of a wheel file"
else
  echo "behavior changed"
  exit 1
fi
