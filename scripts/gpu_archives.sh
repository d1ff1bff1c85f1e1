#!/usr/bin/env bash
# Makes what scripts/gpu_session.sh carries to a GPU machine that has no package registry (Python 3.12, torch 2.11, transformers, lightning):
#   bash scripts/gpu_archives.sh WHEELS DATA
# WHEELS: a folder with mamba_ssm's and causal_conv1d's wheels for that machine -> build/{mamba,conv}.tar.xz
# DATA: a folder with text/train-00.txt.xz, train-01.txt.xz, valid.txt.xz and eval/*.jsonl.gz -> .data
#       and train-02.txt.xz, train-03.txt.xz -> .more, for the longer runs
# build/site.tar.xz: hydra, datasets, lm-eval and what that machine lacks of their needs; lm-eval without its largest folders of tasks, because
# a call carries 64 MiB with the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${1:?a folder with wheels of mamba_ssm and causal_conv1d} data=${2:?a folder with text/ and eval/}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p build .data/text .data/eval .more "$work/wheels" "$work/site"
cp "$data"/text/train-0[01].txt.xz .data/text/
cp "$data"/text/train-0[23].txt.xz .more/
cp "$data/text/valid.txt.xz" .data/
cp "$data"/eval/*.jsonl.gz .data/eval/
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]/#/--platform=}" -d "$work/wheels" \
  hydra-core==1.3.8 'omegaconf>=2.3,<2.4' 'datasets>=4,<6' lm-eval==0.4.13 'torchdata>=0.11,<0.12' 'dill<0.4.2' 'multiprocess<0.70.20' jsonlines \
  more-itertools pytablewriter dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet nltk evaluate zstandard tqdm-multiprocess pytz
python3 -m pip wheel -q --no-deps -w "$work/wheels" antlr4-python3-runtime==4.9.3 rouge-score sqlitedict word2number
pack() {  # name, wheels
  local name=$1 wheel; shift
  mkdir -p "$work/$name"
  for wheel in "$@"; do python3 -m zipfile -e "$wheel" "$work/$name"; done
  [ "$name" != site ] || (cd "$work/site/lm_eval/tasks" && rm -rf global_mmlu afrobench include mmlu_prox llama3 openai-mmmlu global_piqa \
    afrimgsm kmmlu noreval afrixnli bigbench afrimmlu mmlusr)
  tar --sort=name -C "$work/$name" -cf - . | xz -9e >"build/$name.tar.xz"
}
pack site "$work"/wheels/*.whl
pack mamba "$wheels"/mamba_ssm-*.whl
pack conv "$wheels"/causal_conv1d-*.whl
ls -l build/*.tar.xz
du -sh .data .more
