#!/usr/bin/env bash
# Issue 4's timing on a GPU machine that is lent for minutes, what matters most first; goes on from /tmp/bench in the next call.
#   COMMIT=... scripts/speed_session.sh 540        seconds that this call may take; CUDA_VISIBLE_DEVICES chooses the GPU
# Needs /tmp/site: hydra-core, omegaconf, antlr4 and mamba-ssm unpacked (causal-conv1d for bench=peers), see scripts/device_session.sh.
# RECORDS=bench.tgz goes on from an earlier machine's file; REPEAT=1 measures again, as records of their own (another day).
# $OUT/bench.tgz holds records/, to go into experiments/figure4/h200/records (case figure4) or experiments/bench/<case>/records;
# then scripts/refresh_experiments.py.
# Seen on one H200 (2026-11-25, commit d237379): 135m cells 26 s each, 1b cells 46 to 99 s (Mamba-2: mamba_ssm tries its tiles in every
# process), 350m 22 s after a shared compilation of 60 s; 3 + 3 + 1 cells in 390 s.
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$(date +%s) limit=${1:?seconds} out=${OUT:-outputs} site=${SITE:-/tmp/site}
mkdir -p "$out" /tmp/bench
[ -z "${RECORDS:-}" ] || tar -xzf "$RECORDS" -C /tmp/bench --strip-components=1 || exit 3
export PYTHONPATH=src:scripts:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton TRITON_CACHE_AUTOTUNING=1

step() {  # words of flowhn-bench; not begun with less than half a minute left
  local left=$((limit - ($(date +%s) - begun)))
  [ "$left" -gt 30 ] || { echo "left out: $*"; return; }
  echo "$(date +%T) $*"
  timeout "$left" python3 -m flowhn.bench output_dir=/tmp ${COMMIT:+"commit='$COMMIT'"} "repeat=${REPEAT:-0}" steps_per_window=4 \
    cell_timeout_s=240 "$@" 2>&1 | grep -E "^\[|tokens/s at|prepared|error|memory|failed|timed"
}

step 'sizes=[135m]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama]' prepare=3 profile=true
step 'sizes=[1b]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama]' profile=true
step 'sizes=[350m]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama]' prepare=3
step bench=length 'bench.seq_lens=[1024,4096,8192,32768]' prepare=5
step bench=peers 'models=[llama,peer_llama,mamba1,peer_mamba1,mamba2,peer_mamba2]' prepare=4
step 'sizes=[135m]' prepare=3
step bench=balance 'models=[fac_flops,fac_time]' prepare=2
step 'sizes=[350m,1b]'
step bench=overlap 'sizes=[135m]' prepare=2 batch=128 profile=true
step bench=length prepare=5
step bench=peers
step bench=published
tar -czf "$out/bench.tgz" -C /tmp bench
