# shellcheck shell=bash
# Packages of a GPU machine without a registry. Source it with $site set (the folder they go into):
#   site=/tmp/site; source scripts/gpu_packages.sh
# Unpacks each of build/{site,mamba,conv}.tar.xz that this call carried and that is not unpacked yet: a call carries 64 MiB, so
# they come in several calls, and $site/.site, .mamba, .conv say what is there. Wheels in .whl/ and .whl2/ stand in for site.tar.xz.
#   need_packages hydra mamba_ssm      returns 2, after one sentence, where one of these cannot be imported from $site; mamba_ssm
#                                      and causal_conv1d are needed on CUDA only
# $PYTHON (or python) names the interpreter. An archive that cannot be unpacked ends the shell with 3.
: "${site:?is not set: the folder for packages}"
mkdir -p "$site"
for archive in site mamba conv; do
  if [ ! -e "$site/.$archive" ] && [ -f "build/$archive.tar.xz" ]; then
    tar -xJf "build/$archive.tar.xz" -C "$site" || { echo "build/$archive.tar.xz cannot be unpacked into $site" >&2; exit 3; }
    touch "$site/.$archive"
  fi
done
if [ ! -e "$site/.site" ]; then
  for wheel in .whl/*.whl .whl2/*.whl; do
    [ -f "$wheel" ] || continue
    "${PYTHON:-${python:-python3}}" -m zipfile -e "$wheel" "$site" || { echo "$wheel cannot be unpacked into $site" >&2; exit 3; }
    touch "$site/.site"
  done
fi

need_packages() {  # names of modules
  PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-${python:-python3}}" - "$site" "$@" <<'PY'
import importlib
import sys

import torch

site, *names = sys.argv[1:]
archive = {"mamba_ssm": "mamba", "causal_conv1d": "conv"}
for name in names:
    if name in archive and not torch.cuda.is_available():
        continue
    try:
        importlib.import_module(name)
    except Exception as error:
        word = archive.get(name, "site")
        sys.stderr.write(f"{name} cannot be imported from {site} ({error!r:.200}): carry build/{word}.tar.xz in a call first\n")
        raise SystemExit(2) from None
PY
}
