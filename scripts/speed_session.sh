#!/usr/bin/env bash
# Issue 4's timing on a GPU machine that is lent for minutes, what matters most first; goes on from /tmp/bench in the next call.
#   COMMIT=... scripts/speed_session.sh 540        seconds that this call may take; CUDA_VISIBLE_DEVICES chooses the GPU
# scripts/gpu_session.sh calls it, alone on one GPU, or beside training and GPU tests on two. RECORDS=bench.tgz goes on from an earlier machine's file;
# ONLY='bench=peers|balance' takes the steps whose words match, SKIP=bench= those whose do not, so that two GPUs (with WORK and OUT of
# their own) share the list.
# REPEAT=1 measures again, as records of their own (another day). Needs the packages of scripts/gpu_packages.sh.
# FROZEN=435310f times figure 4 by the code of an earlier commit, so that its cells are repeats (REPEAT=1) of that day's: make it with
#   git archive 435310f src configs pyproject.toml | xz >build/frozen.tar.xz
# and carry it once. The other cases are always timed by the code that is here.
# $OUT/bench.tgz holds records/, to go into experiments/figure4/h200/records (case figure4) or experiments/bench/<case>/records;
# then scripts/refresh_experiments.py.
# Seen on one H200 (2026-11-25), when each cell still imported torch for itself: 135m cells 26 s each, 34 to 38 s with a profile, after 13 to
# 30 s of compiling side by side; 350m 30 s after 50 s; 1b cells 64 (Llama), 104 (Mamba-2 branch) and 114 s (FAC) from nothing, with a profile.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -z "${FROZEN:-}" ] || REPEAT=${REPEAT:-1}
begun=$(date +%s) limit=${1:?seconds} out=${OUT:-outputs} site=${SITE:-/tmp/site} work=${WORK:-/tmp/bench} python=${PYTHON:-python3}
mkdir -p "$out" "$work/bench"
# shellcheck source=scripts/gpu_packages.sh
source scripts/gpu_packages.sh
[ -z "${RECORDS:-}" ] || tar -xzf "$RECORDS" -C "$work" || exit 3
export PYTHONPATH=src:scripts:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Caches of its own: what training or tests compiled beside it would make a first step look short.
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton TRITON_CACHE_AUTOTUNING=1 PYTORCH_NVML_BASED_CUDA_CHECK=1
need_packages hydra || exit 2
frozen=/tmp/frozen
if [ -n "${FROZEN:-}" ] && [ ! -d "$frozen/src" ]; then
  [ -f build/frozen.tar.xz ] || { echo "FROZEN=$FROZEN needs build/frozen.tar.xz: carry it" >&2; exit 2; }
  mkdir -p "$frozen" && tar -xJf build/frozen.tar.xz -C "$frozen" || exit 3
fi

left() { echo $((limit - ($(date +%s) - begun))); }
bench() {  # words of flowhn-bench; MOST=... seconds that it may take at most, and then never again on this machine
  local seconds given_up folder=. commit=${COMMIT:-}
  if [ -n "${FROZEN:-}" ] && [[ "$*" != *bench=* ]]; then folder=$frozen commit=$FROZEN; fi
  seconds=$(left) given_up="$work/given up: ${*//\//_}"
  if [ "${MOST:-$seconds}" -lt "$seconds" ]; then
    [ ! -e "$given_up" ] || { echo "took more than $MOST s before; left out"; return; }
    seconds=$MOST
    touch "$given_up"
  fi
  (cd "$folder" && timeout "$seconds" "$python" -m flowhn.bench "output_dir=$work" ${commit:+"commit='$commit'"} "repeat=${REPEAT:-0}" \
    steps_per_window=4 cell_timeout_s=300 "$@" 2>&1) | grep -iE "^\[|tokens/s at|prepared|error|memory|failed|timed"
  [ "${PIPESTATUS[0]}" = 124 ] || rm -f "$given_up"
}
step() {  # as bench; not begun with less than 25 seconds left, nor where ONLY asks for others
  [[ "$*" =~ ${ONLY:-.} ]] || return 0
  [ -z "${SKIP:-}" ] || [[ ! "$*" =~ $SKIP ]] || return 0
  [ "$(left)" -gt 25 ] || { echo "left out: $*"; return; }
  echo "$(date +%T) $*"
  bench "$@"
}
# What belongs into one run comes first (figure 4: the rows the goals are about, then the others), then peers, then repeats, which tell
# the spread within a session, then what may be faster still. REPEAT=1 (above) is for another day.
step 'sizes=[135m]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama,mamba2]' profile=true prepare=4
step 'sizes=[1b]' 'models=[flowhn_fac_mamba2,mamba2,llama,shm,flowhn_fac]' profile=true
step 'sizes=[350m]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama,shm,mamba2]' prepare=2
step 'sizes=[135m]' 'models=[shm,jamba,mamba1,hymba,flowhn_no,flowhn_ae,flowhn_fa]' prepare=2
step 'sizes=[1b]' 'models=[jamba,hymba,mamba1]'
step 'sizes=[350m]' 'models=[jamba,hymba,mamba1]'
step 'sizes=[350m,1b]' 'models=[flowhn_no,flowhn_ae,flowhn_fa]'
# transformers' Mamba needs both packages for its fast path; without it the comparison would be unfair. Its Mamba-2 tries out the tiles of
# mamba_ssm's kernels for two minutes before its first step: not prepared beside others, and never longer than MOST.
if [ "${SKIP:-}" != bench= ] && need_packages mamba_ssm causal_conv1d; then
  MOST=260 step bench=peers 'models=[mamba2,peer_mamba2]'
  MOST=240 step bench=peers 'models=[llama,peer_llama,mamba1,peer_mamba1]'
fi
step bench=residual 'sizes=[1b]' 'models=[fac_mamba2_bf16_residual,flowhn_fac_mamba2]' batch=128
step bench=balance 'sizes=[1b]' 'models=[fac_mamba2_64]' batch=128
step bench=search 'sizes=[135m]'
step "repeat=$((${REPEAT:-0} + 1))" 'sizes=[135m,1b]' 'models=[flowhn_fac,flowhn_fac_mamba2,llama]'
step bench=balance 'models=[fac_flops,fac_time,fac_03,fac_05,fac_07]'
step bench=length prepare=4
step bench=overlap 'sizes=[135m]' batch=128 profile=true
step bench=ssd
step bench=published
tar -czf "$out/bench.tgz" -C "$work" bench
echo "$(date +%T) $(left) s left"
