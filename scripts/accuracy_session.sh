#!/usr/bin/env bash
# Issue 5's training on a machine of two GPUs without a network, in two calls of at most ten minutes that follow each other at once:
#   SECONDS_ALL=800 COMMIT=... scripts/accuracy_session.sh          the first call starts a daemon (it outlives the call) and waits
#   SECONDS_ALL=800 COMMIT=... scripts/accuracy_session.sh          the second waits for its end; each packs $OUT/accuracy.tgz
# Needs: the packages of scripts/gpu_packages.sh (those of an earlier call count); the data in $DATA (default .data, carried):
#   $DATA/text/train-00.txt.xz $DATA/text/train-01.txt.xz   (151 MB unpacked, about 33M tokens of 65,536: one pass at 30M)
#   $DATA/valid.txt.xz                                       $DATA/eval/<task>.jsonl.gz (seven)
# WAIT=570 seconds of one call; SECONDS_ALL: no job begins that would end later, counted from the first call; GPUS=2;
# LONG_QUESTIONS=25 of each of the twelve long-context tasks; RECORDS=accuracy.tgz goes on from an earlier call's file on a fresh machine. HOLD=FILE: training begins when it is gone. SESSION_WORDS="--kinds lr,table" chooses jobs.
# Afterwards, at home: python scripts/accuracy_session.py keep accuracy.tgz && python scripts/refresh_experiments.py
#
# The plan, with seconds and when each job would end on one and on two GPUs: python scripts/accuracy_session.py plan $SESSION_WORDS
# (speeds of one H200: FAC, FA, AE 0.9M tokens/s, Llama 0.83M, No 0.7M, SHM and Jamba 0.64M, Mamba-2 0.63M, Mamba-1 0.4M, Hymba 0.3M;
# beside the training 10 s a run for building and (cached) compiling and 18 s for the evaluation of seven sets, as measured in the first
# session on 25 November 2026; 12 s a model for long contexts and 80 s for preparing, questions included). In GPU-seconds:
#   12 learning rates         4M tokens, three rates for each family       190
#   ten models                30M tokens: training 510, 28 s each beside   790
#   three second seeds        No, FAC, SHM                                 210
#   twenty variants           FAC's 33 s training each, 61 s in all       1240
#   long context              five models at 12 s, and those not trained    60
# The list is in order of worth; what does not fit is left out and told. A session without the ten models takes the rates in table1.yaml, does
# not repeat a second seed that is committed, and tries its own rates last. FAC_Split is timed again beside the variants:
#   SESSION_WORDS="--kinds seed,variant,probe,long --extra flowhn_fac:0 --extra llama:1 --extra mamba2:1 --long-seed 1" SECONDS_ALL=850 GPUS=1
# Variants asked for by name come first, then the rest: the ten rows of Table 1 timed anew beside them, say, at the rates in table1.yaml:
#   SESSION_WORDS="--kinds table,variant --variants fac_keys_rope_conv_gated,fac_keys_rope_conv_sum"
# Nothing of a run but its record comes home (optimiser state is never written, the weights stay on the machine).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-outputs}; mkdir -p "$out"
work=${WORK:-/tmp/accuracy}; site=${SITE:-/tmp/site}; data=${DATA:-.data}
python=${PYTHON:-python3}
begun=$(date +%s)
mkdir -p "$work"

# shellcheck source=scripts/gpu_packages.sh
source scripts/gpu_packages.sh

if [ ! -f "$work/daemon.pid" ]; then
  need_packages hydra datasets lm_eval || exit 2  # scans are ours: kernels=auto takes Triton before mamba_ssm
  # A copy, so that the next call's fresh working tree changes nothing under a running daemon.
  mkdir -p "$work/code/experiments" "$work/data"
  cp -r src configs scripts pyproject.toml "$work/code/" || exit 3
  cp -r experiments/table1 experiments/table1_lr "$work/code/experiments/" || exit 3  # which rows and rates are there already
  if [ -d "$data" ]; then cp -r "$data/." "$work/data/" || exit 3; fi  # a daemon started again may find them from before
  [ -d "$work/data/text" ] || { echo "$data is not here: carry it in the call that starts the daemon" >&2; exit 3; }
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
    --eval-dir "$work/data/eval" --hold "${HOLD:-}" --long-override "eval.limit=${LONG_QUESTIONS:-25}" ${SESSION_WORDS:-} >"$work/daemon.log" 2>&1 </dev/null & echo $! >"$work/daemon.pid"; })
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
