#!/usr/bin/env bash
# Make .venv with this package installed, once; a later call returns at once.
#   scripts/setup_env.sh [EXTRA,...]        extras of pyproject.toml: dev, gpu, wandb, sweep, ruler
# What it installs is pinned with hashes in requirements.lock (with dev: requirements-dev.lock), except torch, whose builds differ by
# machine, and the extras gpu and wandb.
# PYTHON=/path/to/python3.12   which interpreter to use        TORCH_INDEX_URL=...   where to take torch from (for example a CPU build)
# TORCH='torch>=2.8,<2.14'     another version of torch        UNLOCKED=1            newest versions that pyproject.toml allows
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
mkdir -p outputs
exec 9>outputs/.setup.lock
command -v flock >/dev/null && flock 9   # two calls at once: the second waits (macOS has no flock: then do not start two)

find_python() {
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 with venv and pip is needed; install it (Debian: apt install python3-venv) or set PYTHON=/path/to/python" >&2
  exit 2
}

# What is installed is remembered as the hash of pyproject.toml plus the extras: a changed file installs again.
want_extras=$(echo "${1:-}" | tr ',' '\n' | sort -u | grep -v '^$' || true)
have_extras=$( [ -f "$venv/.flowhn-extras" ] && cat "$venv/.flowhn-extras" || true)
extras=$(printf '%s\n%s\n' "$want_extras" "$have_extras" | sort -u | grep -v '^$' | paste -sd, - || true)
lock=requirements.lock
rest=$extras
if [[ ",$extras," == *,dev,* ]]; then
  lock=requirements-dev.lock
  rest=$(echo ",$extras," | sed 's/,dev,/,/; s/,wandb,/,/; s/^,*//; s/,*$//')   # dev's lock has wandb
fi
hash=$( (cat pyproject.toml $lock; echo "$extras ${UNLOCKED:-}"; pwd) | cksum | cut -d' ' -f1)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.flowhn-stamp" 2>/dev/null)" = "$hash" ]; then
  exit 0
fi

python=$(find_python)
log=outputs/setup.log
echo "setting up $venv with $($python --version) (once; two to five minutes; log: $log)" >&2
{
  [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  # torch first: its builds differ by machine, and the rest must not pull another one in
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
  "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "${TORCH:-torch==2.13.0}"
  if [ -n "${UNLOCKED:-}" ]; then
    "${pip[@]}" -e ".${extras:+[$extras]}"
  else
    "${pip[@]}" --no-deps --require-hashes -r "$lock"
    "${pip[@]}" --no-deps -e .
    [ -z "$rest" ] || "${pip[@]}" -e ".[$rest]"
  fi
} >"$log" 2>&1 || { tail -n 15 "$log" >&2; echo "error: the installation failed; the whole log is $log" >&2; exit 2; }
printf '%s\n' "$extras" | tr ',' '\n' > "$venv/.flowhn-extras"
echo "$hash" > "$venv/.flowhn-stamp"
