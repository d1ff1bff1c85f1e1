#!/usr/bin/env bash
# Issue 4's timing on a GPU machine that is lent for minutes, what matters most first; goes on from /tmp/bench in the next call.
#   COMMIT=... scripts/speed_session.sh 540        seconds that this call may take; CUDA_VISIBLE_DEVICES chooses the GPU
# TESTS=1 runs the GPU tests (gpu.json) while the first cells are compiled. RECORDS=bench.tgz goes on from an earlier machine's file;
# REPEAT=1 measures again, as records of their own (another day). Needs the packages of scripts/gpu_packages.sh.
# $OUT/bench.tgz holds records/, to go into experiments/figure4/h200/records (case figure4) or experiments/bench/<case>/records;
# then scripts/refresh_experiments.py.
# Seen on one H200 (2026-11-25): 135m cells 26 s each with profile, 13 s compiled before, 1b cells 46 to 99 s; the first Mamba-2 cell of a
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
best_chunk() {  # of the SSD kernels at 1b: the word for it, nothing where it is the default or was not measured
  "$python" - "$work/bench/chunk/records" <<'PY'
import json, pathlib, sys
found = [json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("*-1b-*.json")]
found = [(record["tps"], record["cell"]) for record in found if record["status"] == "done"]
chunk = max(found)[1].removeprefix("fac_mamba2_chunk") if len(found) > 1 else "256"
print("" if chunk == "256" else f"overrides=[size.mamba2.chunk_size={chunk}]")
PY
}

if [ -n "${TESTS:-}" ] && [ ! -e "$work/tested" ]; then  # nothing is timed while they run
  touch "$work/tested"
  (timeout 300 bash scripts/device_session.sh tests >"$work/tests.out" 2>&1; cp "$out/gpu.json" "$out/tests.log" "$work" 2>/dev/null) &
  tests=$!
  # One cell of each kind at a time: 65 GiB at 1b, up to 72 GiB at 135m (Mamba-1, which comes when the tests are over).
  (bench bench=chunk 'sizes=[1b]' 'models=[fac_mamba2_chunk128,fac_mamba2_chunk256]' prepare=1 max_minutes=0) &
  bench 'sizes=[135m]' 'models=[flowhn_fac,llama,flowhn_fa,flowhn_ae,flowhn_no,shm,jamba,hymba,mamba1]' prepare=1 max_minutes=0
  wait
  grep -E "^==|passed|failed" "$work/tests.out" | tail -n 60
fi
step bench=chunk 'sizes=[1b]' 'models=[fac_mamba2_chunk128,fac_mamba2_chunk256]'
step 'sizes=[135m]' 'models=[flowhn_fac,llama]' profile=true
step 'sizes=[1b]' 'models=[flowhn_fac,llama]' profile=true
step 'sizes=[135m]' 'models=[shm,jamba,mamba1,hymba,flowhn_no,flowhn_ae,flowhn_fa]'
chunk=$(best_chunk); echo "SSD chunk: ${chunk:-default}"
step 'sizes=[135m]' 'models=[flowhn_fac_mamba2,mamba2]' profile=true ${chunk:+"$chunk"}
step 'sizes=[350m]' 'models=[flowhn_fac,llama]' prepare=2
step 'sizes=[350m,1b]' 'models=[flowhn_fac_mamba2]' profile=true ${chunk:+"$chunk"}
step bench=length 'bench.seq_lens=[1024,4096,8192,32768]' prepare=4
step bench=peers 'models=[llama,peer_llama,mamba1,peer_mamba1,mamba2,peer_mamba2]' prepare=3
step repeat=1 'sizes=[135m]' 'models=[flowhn_fac,llama]'
step repeat=1 'sizes=[135m]' 'models=[flowhn_fac_mamba2]' ${chunk:+"$chunk"}
step bench=balance 'models=[fac_flops,fac_time]'
step 'sizes=[350m,1b]' 'models=[shm]'
step repeat=1 'sizes=[1b]' 'models=[flowhn_fac,llama]'
step bench=residual 'sizes=[1b]' 'models=[fac_mamba2_bf16_residual,flowhn_fac_mamba2]'
step bench=length prepare=4
step 'sizes=[350m,1b]' 'models=[jamba,flowhn_no,flowhn_ae,flowhn_fa,hymba,mamba1]'
step 'sizes=[350m,1b]' 'models=[mamba2]' ${chunk:+"$chunk"}
step bench=overlap 'sizes=[135m]' batch=128 profile=true
step bench=peers
step bench=published
cp "$work/gpu.json" "$work/tests.log" "$out" 2>/dev/null
tar -czf "$out/bench.tgz" -C "$work" bench
echo "$(date +%T) $(left) s left"
