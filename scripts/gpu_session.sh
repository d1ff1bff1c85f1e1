#!/usr/bin/env bash
# A whole session on a lent machine of one or two GPUs. Every call brings home all that it adds to, so that a lost machine costs one call at
# most. scripts/gpu_archives.sh makes what the calls carry. Calls must follow each other within 30 seconds, or the machine goes back: have the
# next one ready. COMMIT=... names the code.
# One GPU, which does one thing at a time:
#   bash scripts/gpu_session.sh packages        call 1, carrying build/site.tar.xz and build/mamba.tar.xz; tries what no GPU has run yet
#   bash scripts/gpu_session.sh time 570        call 2, carrying build/conv.tar.xz: figure 4 and other cases (speed_session.sh)
#   bash scripts/gpu_session.sh time 400        call 3: goes on
#   bash scripts/gpu_session.sh train 400       call 4, carrying .data: GPU tests while the data are prepared, then training (accuracy_session.sh);
#                                               train 400 only: no tests
# or, where training is what the session is for (nothing is timed):
#   bash scripts/gpu_session.sh more            call 1, carrying build/site.tar.xz, and once more carrying .more (more parts of the training text):
#                                               together with the tree they are more than 64 MiB
#   bash scripts/gpu_session.sh tables 590      call 2, carrying .data: variants on the text of .data; then on all of it the ten models of Table 1,
#                                               LONGER_TOKENS=60000000 each, of which no run begins that would end later than LONGER_SECONDS=1500
#                                               from this call's begin
#   bash scripts/gpu_session.sh tables 590      calls 3 and 4: go on. The tables go on between calls, too
#   bash scripts/gpu_session.sh longer 590      the same without the variants on the text of .data; LONGER_WORDS adds to what is trained;
#                                               LONGER_SECONDS=1680 fits all; on a fresh machine after a lost one, more, then longer with
#                                               RECORDS=longer.tgz carried. At home: accuracy_session.py keep longer.tgz --replace
#   bash scripts/gpu_session.sh probe 200       No_Split once more on as many tokens, at the learning rate in PROBE=flowhn_no_1e-3 (table1_lr)
# Two GPUs: models are trained on GPU 0, then other cases than figure 4 are timed there and GPU tests run at the end; figure 4 is timed on GPU 1.
#   bash scripts/gpu_session.sh packages        call 1, as above
#   bash scripts/gpu_session.sh go 560          call 2, carrying .data (and build/frozen.tar.xz where FROZEN is set, see speed_session.sh)
#   bash scripts/gpu_session.sh go 560          call 3, carrying build/conv.tar.xz: goes on, with transformers' Mamba to compare with
#   bash scripts/gpu_session.sh go 500 tests    call 4: GPU tests on GPU 0 as soon as training has ended there; seconds as many as are left, less 15
# SECONDS_ALL=1100 (of go): no training begins that would end later, counted from call 2. SESSION_WORDS chooses what is trained. train is for one call:
# its tests would run beside the training that an earlier one began.
# On a fresh machine after a lost one, the first calls again: ACCURACY_RECORDS=accuracy.tgz, BENCH_RECORDS=bench.tgz and BENCH0_RECORDS=bench0.tgz,
# carried, go on from what came home.
# $OUT gets longer.tgz (what accuracy.tgz is for the longer runs: keep --setting 135m-files-60M), packages.log (settings of kernels, timed), accuracy.tgz (accuracy_session.py keep), bench.tgz and bench0.tgz (experiments/figure4, experiments/bench), gpu.json and tests.log. A gpu.json
# beside a group of tests that ended with 124 (out of time) lacks that group's comparisons and is not to be committed.
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$(date +%s) phase=${1:?packages, time, train, more, tables, longer, probe or go} limit=${2:-0} also=${3:-}
out=${OUT:-outputs} site=${SITE:-/tmp/site} kept=${KEPT:-/tmp/kept} accuracy=/tmp/accuracy
mkdir -p "$out" "$kept"
# What may close half of FAC_Split's gap at 90 % of its speed, two seeds of it, and what was not tried yet.
variants=fac_keys_rope_conv_gated_bf16,fac_keys_rope_conv_gated_bf16:1,fac_window
# Of phase longer: FlowHN's rows at the better of the rates tried on runs as long, with second seeds, what may close half of the gap, long contexts.
rows="--lr-tokens ${LONGER_TOKENS:-60000000} --tries flowhn_1e-3,flowhn_2e-3,flowhn_no_2e-3 --kinds table,seed,variant,long --long-seed 1"
rows+=" --rows flowhn_fac,flowhn_no,flowhn_ae,flowhn_fa --variants fac_keys_rope_conv_gated_bf16,fac_keys_rope_conv_gated_bf16_shared"
rows+=",fac_keys_rope_conv_gated_bf16:1,fac_mamba2_keys_rope_conv_gated_bf16"
left() { echo $((limit - ($(date +%s) - begun))); }

if [ "$phase" = packages ]; then
  # shellcheck source=scripts/gpu_packages.sh
  source scripts/gpu_packages.sh
  nvidia-smi -L  # timings of H100s do not go beside those of H200s
  need_packages hydra lm_eval mamba_ssm || exit 2
  # Compiled side by side and tested meanwhile, then timed alone.
  export PYTHONPATH=src:$site
  python=${PYTHON:-python3} took=$SECONDS
  scans=(4,8,64,1,128,1,1,0,0,0 4,8,64,1,128,1,1,0,128,168 4,8,64,1,128,1,1,0,96,128 4,8,64,1,64,1,1,0,112,128)
  for tiling in 0 1 2 3 4 5; do
    timeout 100 "$python" scripts/bench_ssd.py --tilings $tiling >/dev/null 2>&1 &
  done
  timeout 100 "$python" scripts/bench_scan.py --shapes 16,447,4096,16 --tiles "${scans[@]}" >/dev/null 2>&1 &
  timeout 100 "$python" scripts/bench_norm.py >/dev/null 2>&1 &
  for file in tests/test_ssd_triton.py tests/test_mamba2_triton.py; do
    timeout 130 "$python" -m pytest -q -m gpu -p no:cacheprovider $file -k 'bfloat16 or padded_rows' 2>&1 | tail -n 12 >"$kept/${file##*/}.log" &
  done
  wait
  echo "compiled and tested in $((SECONDS - took)) s"
  timed() { timeout 60 "$python" "$@" 2>&1 | grep -v -i warn; }
  {
    timed scripts/bench_ssd.py
    timed scripts/bench_ssd.py --shape 128,1024,24 --tilings 0 1 2 3 4
    timed scripts/bench_norm.py
    timed scripts/bench_scan.py --shapes 128,447,1536,16 64,447,4096,16 16,1024,4096,16 --tiles "${scans[@]}" | grep -E "triton|shape"
    cat "$kept"/test_*.log
  } | tee "$out/packages.log"
  exit
fi
if [ "$phase" = more ]; then
  # shellcheck source=scripts/gpu_packages.sh
  source scripts/gpu_packages.sh
  nvidia-smi -L
  mkdir -p /tmp/more
  [ ! -d .more ] || cp .more/*.txt.xz /tmp/more || exit 3
  ls -l /tmp/more
  [ -e "$site/.site" ] || { echo "the packages are still to come: build/site.tar.xz in the next call"; exit 0; }
  need_packages hydra datasets lm_eval || exit
  [ -n "$(ls /tmp/more)" ] || echo "more text is still to come: .more in the next call"
  exit
fi
[ "$limit" -ge 60 ] || { echo "say how many seconds this call may take, 60 or more: gpu_session.sh go 560" >&2; exit 2; }
case $phase in go | time | train | tables | longer | probe) ;; *) echo "no phase $phase: packages, time, train, more, tables, longer, probe or go" >&2; exit 2 ;; esac
if [ "$phase" = time ]; then
  WORK=/tmp/bench RECORDS=${BENCH_RECORDS:-} OUT="$kept" bash scripts/speed_session.sh $(($(left) - 12)) </dev/null
  code=$?
  cp "$kept/bench.tgz" "$out"
  exit $code
fi
# Files, not pipes, and no input: the daemon outlives this call and must not hold its output open.
train() {
  WORK=$accuracy RECORDS=${ACCURACY_RECORDS:-} CUDA_VISIBLE_DEVICES=0 GPUS=1 OUT="$kept" WAIT=${WAIT:-1} SECONDS_ALL="${SECONDS_ALL:-1100}" \
    SESSION_WORDS="${SESSION_WORDS:---kinds variant --extra flowhn_fac:0 --variants $variants}" \
    bash scripts/accuracy_session.sh </dev/null >"$kept/accuracy.log" 2>&1
}
if [ "$phase" = train ]; then
  # Tests compile on all cores and would slow what is trained: training begins when they are through.
  mkdir -p "$accuracy"
  [ "$also" = only ] || touch "$accuracy/hold"
  SECONDS_ALL=$((limit - 15)) WAIT=$((limit - 25)) HOLD=$accuracy/hold train &
  if [ "$also" != only ]; then
    OUT="$kept" TEST_SECONDS=$((limit / 2)) bash scripts/device_session.sh tests </dev/null >"$kept/tests.out" 2>&1
    rm -f "$accuracy/hold"
    echo "$(date +%T) tests are through, $(left) s left"
    grep -E "^==|passed|failed|^FAILED" "$kept/tests.out" | tail -n 70
  fi
  wait
  tail -n 40 "$kept/accuracy.log"
  cp "$kept"/{accuracy.tgz,gpu.json,tests.log} "$out"
  exit
fi
longer=/tmp/longer half=$(($(nproc) / 2))
if [ "$phase" = tables ] || [ "$phase" = longer ]; then
  words="--tokens ${LONGER_TOKENS:-60000000} --kinds table,seed"
  [ "$phase" = tables ] || words+=" $rows"
  # The longer runs' data are prepared on cores of their own while the variants are trained, and nothing of them is compiled: that would use the GPU.
  if [ ! -e "$longer/daemon.pid" ]; then
    mkdir -p "$longer" "$longer-data" "$kept/longer"
    cp -r "${DATA:-.data}/." "$longer-data" && cp /tmp/more/*.txt.xz "$longer-data/text" || exit 3
    [ "$phase" = longer ] || touch "$longer/hold"
  fi
  cores=0
  if [ "$phase" = tables ]; then
    export -f train; export accuracy kept variants RAYON_NUM_THREADS=$half
    SECONDS_ALL=${SECONDS_ALL:-570} WAIT=$((limit - 25)) taskset -c "0-$((half - 1))" bash -c train </dev/null &
    words+=" --no-warm" cores=$half
  fi
  WORK=$longer DATA=$longer-data CUDA_VISIBLE_DEVICES=0 GPUS=1 OUT="$kept/longer" HOLD=$longer/hold WAIT=$((limit - 20)) SECONDS_ALL=${LONGER_SECONDS:-1500} \
    SESSION_WORDS="$words ${LONGER_WORDS:-}" \
    taskset -c "$cores-$(($(nproc) - 1))" bash scripts/accuracy_session.sh </dev/null >"$kept/longer.log" 2>&1 &
  while [ -e "$longer/hold" ] && [ "$(left)" -gt 30 ]; do
    sleep 0.5
    if [ -e "$accuracy/finished" ] || { [ -s "$accuracy/daemon.pid" ] && ! kill -0 "$(cat "$accuracy/daemon.pid")" 2>/dev/null; }; then
      taskset -acp "0-$(($(nproc) - 1))" "$(cat "$longer/daemon.pid")" >/dev/null
      rm -f "$longer/hold"
    fi
  done
  wait
  [ "$phase" = longer ] || { tail -n 30 "$kept/accuracy.log"; cp "$kept/accuracy.tgz" "$out"; }
  tail -n 50 "$kept/longer.log"
  cp "$kept/longer/accuracy.tgz" "$out/longer.tgz"
  echo "$(date +%T) $(left) s left of this call"
  exit
fi
if [ "$phase" = probe ]; then
  export PYTHONPATH=$longer/code/src:$site HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton
  cd "$longer/code" || exit 3
  timeout $((limit - 15)) "${PYTHON:-python3}" -m flowhn.reproduce table1_lr "models=[${PROBE:-flowhn_no_1e-3}]" "size=${SIZE:-135m}" "budget=${LONGER_TOKENS:-60000000}" data=files \
    "data.path=$longer/data/text" "data.val_path=$longer/data/valid.txt.xz" "output_dir=$longer" "cache_dir=$longer/cache" logger=none 2>&1 | tail -n 30
  PYTHONPATH=$longer/code/src:$site "${PYTHON:-python3}" scripts/accuracy_session.py pack --work "$longer" --out "$out/longer.tgz" --commit "${COMMIT:-}"
  exit
fi
train
sleep 5
if [ ! -e "$accuracy/finished" ] && ! kill -0 "$(cat "$accuracy/daemon.pid" 2>/dev/null)" 2>/dev/null; then
  echo "the training daemon is gone; once more:"
  tail -n 20 "$kept/accuracy.log" "$accuracy/daemon.log" 2>/dev/null
  rm -f "$accuracy/daemon.pid"
  train
fi
# Figure 4 is GPU 1's; what it is no part of (bench= in the list) is GPU 0's when training is over, or GPU 1's when it is through.
other_cases() {  # on which GPU
  OUT="$kept/0" ONLY=bench= WORK=/tmp/bench0 RECORDS=${BENCH0_RECORDS:-} CUDA_VISIBLE_DEVICES=$1 \
    bash scripts/speed_session.sh $(($(left) - 12)) </dev/null >"$kept/0.log" 2>&1
  cp "$kept/0/bench.tgz" "$kept/bench0.tgz"
}
mkdir -p "$kept/0"; rm -f "$kept/0.log"
{  # on cores of its own, lest its compiling slows what is timed meanwhile
  until [ -e "$accuracy/finished" ] || [ "$(left)" -lt 120 ]; do sleep 2; done
  if [ ! -e "$accuracy/finished" ]; then
    echo "training went on for too long: no tests" >"$kept/tests.out"
  elif [ "$also" = tests ]; then
    CUDA_VISIBLE_DEVICES=0 OUT="$kept" TEST_SECONDS=$(($(left) < 450 ? $(left) - 45 : 400)) \
      taskset -c "0-$((half - 1))" bash scripts/device_session.sh tests </dev/null >"$kept/tests.out" 2>&1
  else
    export -f other_cases left; export kept limit begun
    taskset -c "0-$((half - 1))" bash -c "other_cases 0"
  fi
} &
WORK=/tmp/bench RECORDS=${BENCH_RECORDS:-} SKIP=bench= CUDA_VISIBLE_DEVICES=1 OUT="$kept" \
  taskset -c "$half-$(($(nproc) - 1))" bash scripts/speed_session.sh $(($(left) - 12)) </dev/null
if [ "$also" = tests ] && [ "$(left)" -gt 60 ]; then other_cases 1; fi
wait
[ "$also" != tests ] || grep -E "^==|passed|failed|^FAILED|^training" "$kept/tests.out" | tail -n 70
[ ! -e "$kept/0.log" ] || cat "$kept/0.log"
train  # packs what is finished
tail -n 40 "$kept/accuracy.log"
cp "$kept"/{accuracy.tgz,bench.tgz,bench0.tgz,gpu.json,tests.log} "$out" 2>/dev/null
echo "$(date +%T) $(left) s left of this call"
