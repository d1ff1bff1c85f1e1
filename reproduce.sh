#!/usr/bin/env bash
# Make a table or figure of the FlowHN paper, from nothing:   ./reproduce.sh [ARTEFACT] [key=value ...]   (--help, --list, --dry-run)
# The first call creates .venv and installs the package; every call goes on where the last one stopped.
# FLOWHN_EXTRAS=gpu,wandb adds extras of pyproject.toml to the environment; FLOWHN_PYTHON=python uses an environment of your own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${FLOWHN_PYTHON:-}" ]; then
  exec "$FLOWHN_PYTHON" -m flowhn.reproduce "$@"
fi
"$here/scripts/setup_env.sh" "${FLOWHN_EXTRAS:-}"
cd "$here"
exec .venv/bin/python -m flowhn.reproduce "$@"
