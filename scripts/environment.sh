# Sourced by the other scripts, in the project root: make_environment EXTRAS leaves $PYTHON set to the Python of .venv.
#
# Another Python than the first one found: PYTHON=/path/to/python bash scripts/quickstart.sh
# Another place for the environment:       VPD_VENV=/path/to/environment bash scripts/quickstart.sh
# An environment taken as it is:           VPD_INSTALL=0 VPD_VENV=/path/to/environment bash scripts/quickstart.sh

find_python() {
  local candidate incomplete= candidates=(python3.13 python3.12 python3.11 python3 python3.14 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$candidate"
        return
      fi
      incomplete=$candidate
    fi
  done
  if [ -n "$incomplete" ]; then
    echo "$incomplete has no module venv; on Debian and Ubuntu: apt install $(basename "$incomplete")-venv" >&2
  elif [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2
  else
    echo "Python 3.11 or newer was not found; install it, or name it: PYTHON=/path/to/python bash $0" >&2
  fi
  return 1
}

# glibc gives memory back after every compiled program and takes it again for the next: up to a seventh of the CPU
# seconds of the tests.
keep_freed_memory() {
  export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1
}

make_environment() {
  local extras=$1 folder=${VPD_VENV:-.venv} python stamp wanted
  if [ ! -x "$folder/bin/python" ]; then
    if [ "${VPD_INSTALL:-1}" = 0 ]; then echo "VPD_INSTALL=0, but $folder holds no environment; leave it out" >&2; exit 1; fi
    python=$(find_python) || exit 1
    echo "== making $folder with $("$python" --version)"
    "$python" -m venv "$folder"
  fi
  PYTHON=$folder/bin/python
  if [ "${VPD_INSTALL:-1}" = 0 ]; then return; fi
  stamp=$folder/.vpd_jax-${extras//,/-}
  wanted="$(pwd) $(cksum < pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing vpd_jax[$extras] into $folder"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    echo "$wanted" > "$stamp"
  fi
}
