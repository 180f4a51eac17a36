#!/usr/bin/env bash
# Create .venv with everything distgpt needs (and, as `setup.sh dev`, its tests). Does nothing if it is up to date.
# Called by run.sh and test.sh.
#   PYTHON=...       the Python to use (3.11 or newer; default: the first on the PATH)
#   TORCH_INDEX=...  the index URL to take torch from, such as the one for CPUs that pytorch.org's selector shows
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extra=${1:-}
installed=$venv/installed-for${extra:+-$extra}
requirements=$(cksum <"$root/pyproject.toml")
[ "$(cat "$installed" 2>/dev/null)" = "$requirements" ] && exit 0

fail() {
  echo "distgpt: error: $1" >&2
  exit 6
}

is_new_enough() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then PYTHON=$candidate && break; fi
  done
fi
[ -n "${PYTHON:-}" ] || fail "found no Python 3.11 or newer with venv; install one (Debian: apt install python3 python3-venv) or set PYTHON"
is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer with venv; install one or set PYTHON to another"

if command -v flock >/dev/null; then # of two concurrent set-ups, the second waits
  exec 9>"$root/.setup-lock" && flock 9
  [ "$(cat "$installed" 2>/dev/null)" = "$requirements" ] && exit 0
fi
echo "Setting up $venv with $("$PYTHON" --version) (once, a minute or more) ..." >&2
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$venv" || fail "could not create $venv; check the folder's owner and free disk space"
log=$venv/install.log
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install "$@" >>"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  fail "pip failed (full log: $log); check the network or the package index and run the same command again"
}; }
if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
  [ -n "${TORCH_INDEX:-}" ] || echo "No NVIDIA GPU: if your package index has only the CUDA build of torch, this downloads gigabytes; TORCH_INDEX=<pytorch.org's CPU index> avoids it." >&2
  pip torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
fi
pip --editable "$root${extra:+[$extra]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
echo "$requirements" >"$installed"
