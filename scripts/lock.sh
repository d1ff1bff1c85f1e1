#!/usr/bin/env bash
# Renew requirements.lock (what reproduce.sh installs) and requirements-dev.lock (what make test adds) from pyproject.toml.
# One resolution for Linux and macOS, Python 3.11 and 3.12, with hashes. torch and what only torch pulls in are left out: its
# builds differ by machine, so the set-up installs it first.
#   scripts/lock.sh [--upgrade]        needs uv: pip install uv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() {  # file, then options
  local file=$1; shift
  uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-package torch --no-emit-package triton \
    --custom-compile-command scripts/lock.sh --output-file "$file" "$@" >/dev/null
  # torch's CUDA libraries come with torch
  .venv/bin/python - "$file" <<'PY'
import re, sys
from pathlib import Path

path = Path(sys.argv[1])
head, *entries = re.split(r"(?m)^(?=[A-Za-z0-9])", path.read_text())
path.write_text(head + "".join(entry for entry in entries if not re.match(r"(nvidia|cuda)-", entry)))
PY
}
lock requirements.lock "$@"
lock requirements-dev.lock --extra dev "$@"
