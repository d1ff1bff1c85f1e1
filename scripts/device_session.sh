#!/usr/bin/env bash
# One call on a GPU machine without a package registry: unpack carried packages, run one phase, pack what came out.
#   scripts/device_session.sh check                     which kernels run here and whether they are right (flowhn-doctor)
#   scripts/device_session.sh tests [pytest words]      tests marked gpu, several processes at a time, TEST_SECONDS=420 at most; gpu.json says what was seen
#   scripts/device_session.sh bench [bench words]       flowhn-bench; goes on from the records of earlier calls
# Packages: build/site.tar.xz (a site folder), or wheels in .whl and .whl2, unpacked into /tmp/site.
# RECORDS=FILE.tgz starts from the bench folder that an earlier call packed; COMMIT=... names the code (no .git there).
# Everything goes to $OUT: <phase>.log and, after bench, bench.tgz (records, tables, figures); after tests gpu.json,
# which belongs into experiments/faithful.
set -uo pipefail
cd "$(dirname "$0")/.."
phase=${1:?check, tests or bench}; shift
out=${OUT:-outputs}; mkdir -p "$out" /tmp/site

site=/tmp/site
# shellcheck source=scripts/gpu_packages.sh
source scripts/gpu_packages.sh
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Compiled kernels stay between the calls of a machine that is kept warm.
export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton

case $phase in
  check) python3 -m flowhn.doctor "$@" 2>&1 | tee "$out/check.log" ;;
  tests)
    # Compiling is most of the time and one process compiles on one core, so the tests run in groups side by side. TRITON_CACHE_AUTOTUNING
    # keeps the tiles that mamba_ssm's SSD kernels found fastest, which each process would search for again (70 to 110 s): the cells with
    # Mamba-2 are one group, and other tests of these kernels try few tiles.
    export FLOWHN_SEEN=/tmp/seen TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=2 TRITON_CACHE_AUTOTUNING=1
    rm -rf /tmp/seen /tmp/groups; mkdir -p /tmp/groups
    groups=(
      "tests/test_scan_triton.py -k float32"
      "tests/test_scan_triton.py -k not_float32"
      "tests/test_ssd_triton.py -k float32"
      "tests/test_ssd_triton.py -k not_float32"
      "tests/test_triton_kernels.py -k compiled"
      "tests/test_triton_kernels.py -k not_compiled"
      "tests/test_gpu_mixers.py -k test_ssd_and_float32"
      "tests/test_gpu_mixers.py -k test_ssd_and_bfloat16"
      "tests/test_gpu_mixers.py -k not_test_ssd"
      "tests/test_gpu_models.py -k not_test_timed"
      "tests/test_mamba2_triton.py tests/test_short_conv.py tests/test_bench_process.py tests/test_guard.py tests/test_models.py"
    )
    # The timed cells by name, from where tests/test_gpu_models.py has them, so that a new one is in a group; three to a process.
    mapfile -t timed < <(python3 -c 'import yaml
cells = yaml.safe_load(open("configs/bench/figure4.yaml"))["cells"]
print(*(name for name, entry in cells.items() if isinstance(entry, list)), sep="\n")')
    [ -n "${timed[*]}" ] || { echo "no cell could be read from configs/bench/figure4.yaml" >&2; exit 3; }
    group="" mamba2="" number=0
    for cell in "${timed[@]}"; do
      ids=" tests/test_gpu_models.py::test_timed_loss_and_gradients[$cell] tests/test_gpu_models.py::test_timed_step[$cell]"
      if [[ $cell == *mamba2* ]]; then mamba2+=$ids; continue; fi
      group+=$ids number=$((number + 1))
      [ $((number % 3)) -gt 0 ] || { groups+=("${group# }"); group=""; }
    done
    [ -z "$group" ] || groups+=("${group# }")
    [ -z "$mamba2" ] || groups+=("${mamba2# }")
    pids=() codes=0
    for i in "${!groups[@]}"; do
      words=()
      for word in ${groups[i]}; do  # names of tests hold no spaces; a -k expression stands with underscores
        [[ $word == tests/* ]] || { word=${word//_and_/ and }; word=${word/#not_/not }; }
        words+=("$word")
      done
      timeout "${TEST_SECONDS:-420}" python3 -m pytest -q -m gpu -p no:cacheprovider --durations=3 "${words[@]}" "$@" >"/tmp/groups/$i.log" 2>&1 &
      pids+=($!)
    done
    for i in "${!pids[@]}"; do
      wait "${pids[i]}"; code=$?
      [ $code = 0 ] || codes=1
      { echo "== ${groups[i]} (exit $code)"; tail -c 6000 "/tmp/groups/$i.log"; } >>"/tmp/groups/all"
    done
    tee "$out/tests.log" </tmp/groups/all
    python3 scripts/oracles.py gather /tmp/seen "$out/gpu.json" || codes=1
    exit $codes ;;
  bench)
    work=/tmp/bench; mkdir -p "$work"
    if [ -n "${RECORDS:-}" ]; then tar -xzf "$RECORDS" -C "$work" || exit 3; fi
    python3 -m flowhn.bench "output_dir=$work" ${COMMIT:+"commit='$COMMIT'"} "$@" 2>&1 | tee "$out/bench.log"
    code=$?
    [ ! -d "$work/bench" ] || tar -czf "$out/bench.tgz" -C "$work" bench
    exit $code ;;
  *) echo "no phase $phase: check, tests or bench" >&2; exit 2 ;;
esac
