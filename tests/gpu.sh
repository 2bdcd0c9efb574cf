#!/usr/bin/env bash
# Tests and benchmarks on an NVIDIA GPU, in two steps: the machine with the GPU may have no Rust.
#
#   tests/gpu.sh build [KIT]   packs programs.tar.xz and student.tar.xz into the folder KIT. Needs Rust, a
#                              C++ compiler, xz, Python 3 with safetensors, numpy and tokenizers, and the
#                              student (kdlora pull minilm-l6); no GPU.
#   tests/gpu.sh run [KIT]     on the machine with the GPU, in a checkout of the same commit: runs the
#                              steps and prints a table of what there is so far. Needs Python 3 with
#                              torch, transformers and peft, for CUDA 13.
#
# KIT is target/gpu-kit by default. What runs unpacks and writes into KIT.work, so that a second run
# adds to the table of the first. The table and all output are also put into the folder OUT, if that
# variable is set: table.md and all.tgz.
#
#   GPU_STEPS    steps of `run`: tests forward training, all by default. Each has limits of time; the
#                first two take less than six minutes together, and so does the third.
#   GPU_DEVICE   cpu tries the script itself without a GPU, with small sizes. Tests then fail.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
usage() { sed -n '/^#   tests/,/^$/p' "$0" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
mkdir -p "${2:-target/gpu-kit}" || exit
kit="$(cd "${2:-target/gpu-kit}" && pwd)" work="$kit.work"
programs="$work/programs" out="$work/out" student="$work/student" teacher="$work/teacher"
LIMIT=$((64 * 1024 * 1024))

say() { printf '\n== %s\n' "$*"; }

# executables: of Cargo's messages, the paths of the programs that it made
executables() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'; }

build() {
  set -e
  [ -n "${CUDA_HOME:-}" ] || eval "$(deploy/cuda/toolkit.sh target/cuda-toolkit)"
  local made tree packed
  local cargo=(--release --locked --features cuda --message-format json-render-diagnostics)
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  mkdir "$folder/programs"
  made="$(cargo build "${cargo[@]}" --bin kdlora | executables)"
  cp "$made" "$folder/programs/kdlora"
  made="$(cargo test --no-run "${cargo[@]}" --lib --test it --bench device | executables)"
  cp "$(grep '/kdlora-[^/]*$' <<<"$made")" "$folder/programs/lib-tests"
  cp "$(grep '/it-[^/]*$' <<<"$made")" "$folder/programs/it"
  cp "$(grep '/device-[^/]*$' <<<"$made")" "$folder/programs/device"
  strip "$folder"/programs/*
  "${PYTHON:-python3}" tests/gpu_student.py \
    "${KDLORA_CACHE:-$HOME/.cache/kdlora}/encoders/minilm-l6" data/movie-sentiment "$folder/student"
  rm -f "$kit"/*
  # The programs are much alike: a dictionary over all of them. Weights are of two bytes each.
  tar -C "$folder" -c programs | xz -T1 --lzma2=preset=9e,dict=256MiB > "$kit/programs.tar.xz"
  tar -C "$folder" -c student | xz -T1 --lzma2=preset=6,lp=1,pb=1 > "$kit/student.tar.xz"
  # Files that a sparse checkout leaves out are listed, and are not there.
  tree="$(git ls-files -z --cached --others --exclude-standard | { xargs -0 cat 2>/dev/null || true; } | wc -c)"
  packed="$(cat "$kit"/* | wc -c)"
  printf 'checkout %d + kit %d = %d of %d bytes\n' "$tree" "$packed" $((tree + packed)) $LIMIT
  if [ $((tree + packed)) -gt $LIMIT ]; then
    cat >&2 <<'TEXT'
The checkout and the kit are too large to be sent together. Leave out what is not needed there, with
  git sparse-checkout set --no-cone '/*' '!/models/adapters/*/teacher/' '!/models/adapters/movie-rating5/' \
    '!/models/adapters/tweet-valence/' '!/data/movie-rating5/' '!/data/tweet-valence/'
and build again. This brings it back: git sparse-checkout disable
TEXT
    exit 1
  fi
}

# limited SECONDS COMMAND...: runs it, and says so if it fails. What it leaves of its figures counts.
limited() {
  local status=0
  timeout -k 5 "$@" || status=$?
  [ $status -eq 0 ] || echo "failed with status $status: ${*:2:3}" | tee -a "$failed" >&2
}

# The folders of CUDA's libraries that Python packages bring.
python_libraries() {
  python3 -c 'import glob, site
print(":".join(d for s in site.getsitepackages() for d in glob.glob(s + "/nvidia/*/lib")))'
}

# A teacher of mpnet-base's shape with random weights, and the student's tokenizer.
make_teacher() {
  rm -rf "$teacher"
  limited 30 python3 - "$teacher" "$teacher_layers" <<'PYTHON'
import sys, torch
from transformers import MPNetConfig, MPNetModel
torch.manual_seed(1)
MPNetModel(MPNetConfig(num_hidden_layers=int(sys.argv[2]))).save_pretrained(sys.argv[1])
PYTHON
  cp "$student"/tokenizer* "$teacher"
}

run_tests() {
  say "ops on the GPU against the CPU; copies; memory"
  limited 70 "$programs/lib-tests" --ignored --test-threads 1 ops::cuda encoder::on_gpu 2>&1 \
    | tee "$out/lib-tests.txt"
  say "golden answers, a server, a pass"
  limited 65 "$programs/it" --ignored --test-threads 1 --nocapture gpu:: 2>&1 | tee "$out/it.txt"
}

run_forward() {
  say "forwards of kdlora"
  limited 40 "$programs/device" --student "$student" --teacher "$teacher" --device "$own_device" \
    "${sizes[@]}" | tee "$out/kdlora.jsonl"
  say "forwards of PyTorch"
  limited 125 python3 loadtest/peers/gpu_forward.py --student "$student" --teacher "$teacher" \
    --device "$device" "${sizes[@]}" | tee "$out/torch.jsonl"
}

# distil NAME STUDENT ROWS TEACHER: a pass of one epoch, whose report goes to $out/NAME.json
distil() {
  say "training: $1"
  head -n "$3" data/movie-sentiment/train.jsonl > "$work/train.jsonl"
  local teacher=""
  [ -z "$4" ] || teacher="\"teacher\": {\"model\": \"$4\", \"finetune\": {\"mode\": \"lora\", \"epochs\": 1}},"
  cat > "$work/spec.json" <<JSON
{"task": "movie-sentiment", $teacher "data": {"train": {"path": "$work/train.jsonl"},
 "validation": {"path": "data/movie-sentiment/validation.jsonl"},
 "test": {"path": "data/movie-sentiment/test.jsonl"}},
 "training": {"epochs": 1, "batch_size": 32, "max_length": 128, "seed": 1}}
JSON
  rm -rf "$work/version" "$out/$1.json"
  limited 75 "$programs/kdlora" --log warn distill --spec "$work/spec.json" --student "$2" \
    --out "$work/version" --device "$device" > "$out/$1.md"
  cp "$work/version/report.json" "$out/$1.json"
}

run_training() {
  distil student "$student" "$rows" ""
  say "training: PEFT"
  rm -f "$out/peft.json"
  limited 70 python3 loadtest/peers/peft_training.py --encoder "$student" --device "$device" \
    --epochs 1 --rows "$rows" --train data/movie-sentiment/train.jsonl --out "$out/peft.json"
  distil kd-lora "$student" "$few_rows" "$teacher"
  distil lora-teacher "$teacher" "$few_rows" ""
}

# Whatever has happened, what there is comes back.
finish() {
  say "table"
  python3 tests/gpu_table.py "$out" | tee "$out/table.md"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp "$out/table.md" "$OUT"
    tar -C "$out" -czf "$OUT/all.tgz" .
  fi
}

run() {
  device="${GPU_DEVICE:-cuda}" own_device=0
  rows=8229 few_rows=2000 sizes=() teacher_layers=12
  if [ "$device" = cpu ]; then
    own_device=cpu rows=256 few_rows=64 sizes=(--texts 64 --repeat 1) teacher_layers=1
    export TORCH_COMPILE_DISABLE=1
  fi
  mkdir -p "$out"
  failed="$out/failed-unpack.txt"
  rm -rf "$programs" "$student" "$failed"
  exec > >(tee -a "$out/log.txt") 2>&1
  trap finish EXIT
  trap 'exit 143' TERM INT HUP
  # Python unpacks: the machine may have no xz.
  limited 20 python3 -m tarfile -e "$kit/programs.tar.xz" "$work"
  limited 5 python3 -m tarfile -e "$kit/student.tar.xz" "$work"
  export CARGO_MANIFEST_DIR="$PWD" CARGO_BIN_EXE_kdlora="$programs/kdlora" PYTHONUNBUFFERED=1
  LD_LIBRARY_PATH="$(python_libraries):${LD_LIBRARY_PATH:-}"
  export LD_LIBRARY_PATH
  if [ "$device" = cpu ]; then
    echo "no GPU: a trial of the script"
  else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  fi | tee "$out/gpu.txt"
  [ -e "$teacher/tokenizer.json" ] || make_teacher
  local step
  for step in ${GPU_STEPS:-tests forward training}; do
    failed="$out/failed-$step.txt"
    rm -f "$failed"
    "run_$step"
  done
}

case "$1" in build | run) "$1" ;; *) usage ;; esac
