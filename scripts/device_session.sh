#!/usr/bin/env bash
# One call on a GPU machine without a package registry: unpack carried packages, run one phase, pack what came out.
#   scripts/device_session.sh check                     which kernels run here and whether they are right (flowhn-doctor)
#   scripts/device_session.sh tests [pytest words]      tests marked gpu
#   scripts/device_session.sh bench [bench words]       flowhn-bench; goes on from the records of earlier calls
# Packages: build/site.tar.xz (a site folder), or wheels in .whl and .whl2, unpacked into /tmp/site.
# RECORDS=FILE.tgz starts from the bench folder that an earlier call packed; COMMIT=... names the code (no .git there).
# Everything goes to $OUT: <phase>.log and, after bench, bench.tgz (records, tables, figures).
set -uo pipefail
cd "$(dirname "$0")/.."
phase=${1:?check, tests or bench}; shift
out=${OUT:-outputs}; mkdir -p "$out" /tmp/site

if [ ! -e /tmp/site/.unpacked ]; then
  if [ -f build/site.tar.xz ]; then
    tar -xJf build/site.tar.xz -C /tmp/site || exit 3
  else
    for wheel in .whl/*.whl .whl2/*.whl; do
      [ -f "$wheel" ] && { python3 -m zipfile -e "$wheel" /tmp/site || exit 3; }
    done
  fi
  touch /tmp/site/.unpacked
fi
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Compiled kernels stay between the calls of a machine that is kept warm.
export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton

case $phase in
  check) python3 -m flowhn.doctor "$@" 2>&1 | tee "$out/check.log" ;;
  tests) python3 -m pytest -q -x -m gpu -p no:cacheprovider "$@" 2>&1 | tee "$out/tests.log" ;;
  bench)
    work=/tmp/bench; mkdir -p "$work"
    if [ -n "${RECORDS:-}" ]; then tar -xzf "$RECORDS" -C "$work" || exit 3; fi
    python3 -m flowhn.bench "output_dir=$work" ${COMMIT:+"commit='$COMMIT'"} "$@" 2>&1 | tee "$out/bench.log"
    code=$?
    [ ! -d "$work/bench" ] || tar -czf "$out/bench.tgz" -C "$work" bench
    exit $code ;;
  *) echo "no phase $phase: check, tests or bench" >&2; exit 2 ;;
esac
