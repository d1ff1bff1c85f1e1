#!/usr/bin/env bash
# Issue 4's timing on a GPU machine that is lent for minutes, what matters most first; goes on from /tmp/bench in the next call.
#   COMMIT=... scripts/speed_session.sh 540        seconds that this call may take; CUDA_VISIBLE_DEVICES chooses the GPU
# TESTS=1 runs the GPU tests (gpu.json) while the first cells are compiled. RECORDS=bench.tgz goes on from an earlier machine's file;
# REPEAT=1 measures again, as records of their own (another day). Needs the packages of scripts/gpu_packages.sh.
# $OUT/bench.tgz holds records/, to go into experiments/figure4/h200/records (case figure4) or experiments/bench/<case>/records;
# then scripts/refresh_experiments.py.
# Seen on one H200 (2026-11-25): tests and compilation side by side 340 s (the tests did not end in 300 s: give them a call of their own), 135m cells 26 s each with profile, 13 s compiled before, 1b cells 46 to 99 s; the first Mamba-2 cell of a
# machine compiles 110 s (mamba_ssm tries its tiles), later ones find most in Triton's cache.
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$(date +%s) limit=${1:?seconds} out=${OUT:-outputs} site=${SITE:-/tmp/site} work=${WORK:-/tmp/bench} python=${PYTHON:-python3}
mkdir -p "$out" "$work/bench"
# shellcheck source=scripts/gpu_packages.sh
source scripts/gpu_packages.sh
[ -z "${RECORDS:-}" ] || tar -xzf "$RECORDS" -C "$work" || exit 3
export PYTHONPATH=src:scripts:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton TRITON_CACHE_AUTOTUNING=1
need_packages hydra mamba_ssm || exit 2

left() { echo $((limit - ($(date +%s) - begun))); }
bench() {  # words of flowhn-bench
  timeout "$(left)" "$python" -m flowhn.bench "output_dir=$work" ${COMMIT:+"commit='$COMMIT'"} "repeat=${REPEAT:-0}" \
    steps_per_window=4 cell_timeout_s=300 "$@" 2>&1 | grep -iE "^\[|tokens/s at|prepared|error|memory|failed|timed"
}
step() {  # as bench; not begun with less than 25 seconds left
  [ "$(left)" -gt 25 ] || { echo "left out: $*"; return; }
  echo "$(date +%T) $*"
  bench "$@"
}
slower_word() {  # what Mamba-2 cells need where our SSD kernels fail or are slower than mamba_ssm's at 1b
  "$python" - "$work/bench/ssd/records" <<'PY'
import json, pathlib, sys
found = [json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("*-1b-*.json")]
found = {record["cell"]: record.get("tps", 0) for record in found if record["status"] == "done"}
ours, theirs = (found.get(f"fac_mamba2_{name}", 0) for name in ("triton", "mamba_ssm"))
print("overrides=['kernels=mamba_ssm']" if theirs > ours else "")
PY
}

if [ -n "${TESTS:-}" ] && [ ! -e "$work/tested" ]; then  # nothing is timed while they run
  touch "$work/tested"
  (TEST_SECONDS=280 bash scripts/device_session.sh tests >"$work/tests.out" 2>&1; cp "$out/gpu.json" "$out/tests.log" "$work" 2>/dev/null) &
  tests=$!
  # One at a time of each: 65 GiB at 1b, up to 72 GiB at 135m (Mamba-1, which comes when the tests are over).
  (bench bench=ssd 'sizes=[1b]' prepare=1 max_minutes=0) &
  bench 'sizes=[135m]' 'models=[flowhn_fac,llama,flowhn_fa,flowhn_ae,flowhn_no,shm,jamba,hymba,mamba1]' prepare=1 max_minutes=0
  wait
  grep -E "^==|passed|failed" "$work/tests.out" | tail -n 60
fi
step bench=ssd 'sizes=[1b]'
step 'sizes=[135m]' 'models=[flowhn_fac,llama]' profile=true
step 'sizes=[1b]' 'models=[flowhn_fac,llama]' profile=true
step 'sizes=[135m]' 'models=[shm,jamba,mamba1,hymba,flowhn_no,flowhn_ae,flowhn_fa]'
word=$(slower_word); echo "Mamba-2: ${word:-default kernels}"
step 'sizes=[135m]' 'models=[flowhn_fac_mamba2,mamba2]' profile=true ${word:+"$word"}
step 'sizes=[350m]' 'models=[flowhn_fac,llama]' prepare=2
step 'sizes=[350m,1b]' 'models=[flowhn_fac_mamba2]' profile=true ${word:+"$word"}
step bench=length 'bench.seq_lens=[1024,4096,8192,32768]' prepare=4
# transformers' Mamba needs causal_conv1d for its fast path; without it the comparison would be unfair.
if need_packages causal_conv1d; then
  step bench=peers 'models=[llama,peer_llama,mamba1,peer_mamba1,mamba2,peer_mamba2]' prepare=3
fi
step repeat=1 'sizes=[135m]' 'models=[flowhn_fac,llama]'
step repeat=1 'sizes=[135m]' 'models=[flowhn_fac_mamba2]' ${word:+"$word"}
step bench=balance 'models=[fac_flops,fac_time]'
step 'sizes=[350m,1b]' 'models=[shm]'
step repeat=1 'sizes=[1b]' 'models=[flowhn_fac,llama]'
step bench=residual 'sizes=[1b]' 'models=[fac_mamba2_bf16_residual,flowhn_fac_mamba2]'
step bench=length prepare=4
step 'sizes=[350m,1b]' 'models=[jamba,flowhn_no,flowhn_ae,flowhn_fa,hymba,mamba1]'
step 'sizes=[350m,1b]' 'models=[mamba2]' ${word:+"$word"}
step bench=overlap 'sizes=[135m]' batch=128 profile=true
step bench=published
cp "$work/gpu.json" "$work/tests.log" "$out" 2>/dev/null
tar -czf "$out/bench.tgz" -C "$work" bench
echo "$(date +%T) $(left) s left"
