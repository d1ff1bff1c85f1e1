#!/usr/bin/env bash
# Issue 5's training on a machine of two GPUs without a network, in two calls of at most ten minutes that follow each other at once:
#   SECONDS_ALL=800 COMMIT=... scripts/accuracy_session.sh          the first call starts a daemon (it outlives the call) and waits
#   SECONDS_ALL=800 COMMIT=... scripts/accuracy_session.sh          the second waits for its end; each packs $OUT/accuracy.tgz
# Needs: packages as scripts/device_session.sh does (build/site.tar.xz, or .whl/ and .whl2/); the data in $DATA (default .data, carried):
#   $DATA/text/train-00.txt.xz $DATA/text/train-01.txt.xz   (151 MB unpacked, about 33M tokens of 65,536: one pass at 30M)
#   $DATA/valid.txt.xz                                       $DATA/eval/<task>.jsonl.gz (seven)
# WAIT=570 seconds of one call; SECONDS_ALL: no job begins that would end later, counted from the first call; GPUS=2;
# LONG_QUESTIONS=25 of each of the twelve long-context tasks; RECORDS=accuracy.tgz goes on from an earlier call's file on a fresh machine. SESSION_WORDS="--kinds lr,table" chooses jobs.
# Afterwards, at home: python scripts/accuracy_session.py keep accuracy.tgz && python scripts/refresh_experiments.py
#
# The plan (python scripts/accuracy_session.py plan), in GPU-seconds at the speeds of one H200 (FAC, FA, AE 0.9M tokens/s, Llama 0.83M,
# No 0.7M, SHM and Jamba 0.64M, Mamba-2 0.47M, Mamba-1 0.4M, Hymba 0.3M); beside the training 10 s a run for building and (cached) compiling
# and 18 s for the evaluation of seven sets, both as measured in the first session (one H200, 25 November 2026):
#   preparing                 tokenizer and data on the CPU, meanwhile the GPUs compile models on random tokens
#   12 learning-rate probes   4M tokens, three rates for each family       190
#   ten models                30M tokens: training 510, 28 s each beside   790
#   three second seeds        No, FAC, SHM                                 210
#   eight FAC variants        33 s training each                           490
#   long context              five models at 60 s (not measured yet)       300
# 1,980 GPU-seconds: 1,000 s on two GPUs and the preparation. The list is in order of worth; what does not fit is left out and told.
# What the first session left, in 1,160 GPU-seconds (about 630 s on two GPUs with the preparation; rates from table1.yaml):
#   SESSION_WORDS="--kinds seed,variant,long --extra llama:1 --extra mamba2:1 --long-seed 1" SECONDS_ALL=800 scripts/accuracy_session.sh
# Nothing of a run but its record comes home (optimiser state is never written, the weights stay on the machine).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-outputs}; mkdir -p "$out"
work=${WORK:-/tmp/accuracy}; site=${SITE:-/tmp/site}; data=${DATA:-.data}
python=${PYTHON:-python3}
begun=$(date +%s)
mkdir -p "$work" "$site"

if [ ! -e "$site/.unpacked" ]; then
  if [ -f build/site.tar.xz ]; then
    tar -xJf build/site.tar.xz -C "$site" || exit 3
  else
    for wheel in .whl/*.whl .whl2/*.whl; do
      [ -f "$wheel" ] && { "$python" -m zipfile -e "$wheel" "$site" || exit 3; }
    done
  fi
  touch "$site/.unpacked"
fi

if [ ! -f "$work/daemon.pid" ]; then
  # A copy, so that the next call's fresh working tree changes nothing under a running daemon.
  mkdir -p "$work/code" "$work/data"
  cp -r src configs scripts pyproject.toml "$work/code/" || exit 3
  cp -r "$data/." "$work/data/" || exit 3
  [ -z "${RECORDS:-}" ] || tar -xzf "$RECORDS" -C "$work" || exit 3
  rm -f "$work/finished"
  export PYTHONPATH="$work/code/src:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
  export PYTORCH_NVML_BASED_CUDA_CHECK=1   # asking whether there is a GPU must not start CUDA in the process that forks
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # runs of different shapes follow each other in one process
  export TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton HF_HOME="$work/hf"
  # shellcheck disable=SC2086
  # Braces, not a background list: its shell would hold this call's output open until the daemon ends.
  (cd "$work/code" && { setsid nohup "$python" scripts/accuracy_session.py daemon --work "$work" --begun "$begun" \
    --seconds "${SECONDS_ALL:-800}" --gpus "${GPUS:-2}" --data "$work/data/text" --valid "$work/data/valid.txt.xz" \
    --eval-dir "$work/data/eval" --long-override "eval.limit=${LONG_QUESTIONS:-25}" ${SESSION_WORDS:-} >"$work/daemon.log" 2>&1 </dev/null & echo $! >"$work/daemon.pid"; })
fi

while [ ! -f "$work/finished" ] && [ $(($(date +%s) - begun)) -lt "${WAIT:-570}" ]; do
  kill -0 "$(cat "$work/daemon.pid")" 2>/dev/null || { sleep 1; [ -f "$work/finished" ] || echo "the daemon is gone" >&2; break; }
  sleep 2
done
export PYTHONPATH="$work/code/src:$site"
cat "$work/session.log"; tail -n 15 "$work/daemon.log"
(cd "$work/code" && "$python" scripts/accuracy_session.py pack --work "$work" --out "$work/accuracy.tgz" --commit "${COMMIT:-}") || exit 1
cp "$work/accuracy.tgz" "$out/accuracy.tgz"
[ -f "$work/finished" ] && echo "session finished" || echo "session goes on: call again at once"
