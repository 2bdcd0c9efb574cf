#!/usr/bin/env bash
# Tests and benchmarks on an NVIDIA GPU, in two steps: the machine with the GPU may have no Rust.
#
#   tests/gpu.sh build KIT   makes programs.tar.xz and student.tar.xz in the folder KIT. Needs Rust,
#                            a C++ compiler and Python 3 with safetensors, numpy and tokenizers, and
#                            the student (kdlora pull minilm-l6); no GPU.
#   tests/gpu.sh run KIT     on the machine with the GPU, in a checkout of the same commit: runs the
#                            tests and the benchmarks, and PyTorch beside them, and prints a table.
#                            Needs Python 3 with torch, transformers and peft, for CUDA 13. All that
#                            was printed is in KIT/out (or the folder OUT). About ten minutes.
#
#   GPU_STEPS   steps of `run`, all by default: tests forward training table
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
[ $# -eq 2 ] || { sed -n '/^#   tests/,/^$/p' "$0" >&2; exit 2; }
mkdir -p "$2"
kit="$(cd "$2" && pwd)"
say() { printf '\n== %s\n' "$*"; }

# executables: of Cargo's messages, the paths of the programs that it made
executables() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'; }

build() {
  [ -n "${CUDA_HOME:-}" ] || eval "$(deploy/cuda/toolkit.sh target/cuda-toolkit)"
  local programs="$kit/programs"
  rm -rf "$programs"
  mkdir -p "$programs"
  local cargo=(--release --locked --features cuda --message-format json-render-diagnostics)
  local made
  made="$(cargo build "${cargo[@]}" --bin kdlora | executables)"
  cp "$made" "$programs/kdlora"
  made="$(cargo test --no-run "${cargo[@]}" --lib --test gpu --bench device | executables)"
  cp "$(grep '/kdlora-[^/]*$' <<<"$made")" "$programs/lib-tests"
  cp "$(grep '/gpu-[^/]*$' <<<"$made")" "$programs/gpu-tests"
  cp "$(grep '/device-[^/]*$' <<<"$made")" "$programs/device"
  strip "$programs"/*
  # The programs are much alike: a dictionary over all of them.
  tar -C "$kit" -c programs | xz -T1 --lzma2=preset=6,dict=256MiB > "$kit/programs.tar.xz"
  rm -rf "$programs"
  "${PYTHON:-python3}" tests/gpu_student.py \
    "${KDLORA_CACHE:-$HOME/.cache/kdlora}/encoders/minilm-l6" data/movie-sentiment "$kit/student"
  tar -C "$kit" -c student | xz -T1 > "$kit/student.tar.xz"
  rm -rf "$kit/student"
  ls -l "$kit"
}

# The folders of CUDA's libraries that Python packages bring.
python_libraries() {
  python3 -c 'import glob, site
print(":".join(d for s in site.getsitepackages() for d in glob.glob(s + "/nvidia/*/lib")))'
}

# A teacher of mpnet-base's shape with random weights, and the student's tokenizer.
make_teacher() {
  python3 - "$work/teacher" <<'PYTHON'
import sys, torch
from transformers import MPNetConfig, MPNetModel
torch.manual_seed(1)
MPNetModel(MPNetConfig()).save_pretrained(sys.argv[1])
PYTHON
  cp "$work"/student/tokenizer* "$work/teacher"
}

run_tests() {
  say "ops on the GPU against the CPU; copies; memory"
  "$programs/lib-tests" --ignored --test-threads 1 2>&1 | tee "$out/lib-tests.txt" || true
  say "golden answers, a server, a pass"
  "$programs/gpu-tests" --ignored --test-threads 1 --nocapture 2>&1 | tee "$out/gpu-tests.txt" || true
}

run_forward() {
  say "forwards"
  "$programs/device" --student "$work/student" --teacher "$work/teacher" | tee "$out/kdlora.jsonl"
  python3 loadtest/peers/gpu_forward.py --student "$work/student" --teacher "$work/teacher" \
    | tee "$out/torch.jsonl"
}

# distil NAME STUDENT ROWS TEACHER: a pass of one epoch, whose report goes to $out/NAME.json
distil() {
  head -n "$3" data/movie-sentiment/train.jsonl > "$work/train.jsonl"
  local teacher=""
  [ -z "$4" ] || teacher="\"teacher\": {\"model\": \"$4\", \"finetune\": {\"mode\": \"lora\", \"epochs\": 1}},"
  cat > "$work/spec.json" <<JSON
{"task": "movie-sentiment", $teacher "data": {"train": {"path": "$work/train.jsonl"},
 "validation": {"path": "data/movie-sentiment/validation.jsonl"},
 "test": {"path": "data/movie-sentiment/test.jsonl"}},
 "training": {"epochs": 1, "batch_size": 32, "max_length": 128, "seed": 1}}
JSON
  rm -rf "$work/version"
  "$programs/kdlora" --log warn distill --spec "$work/spec.json" --student "$2" \
    --out "$work/version" --device cuda > "$out/$1.md"
  cp "$work/version/report.json" "$out/$1.json"
}

run_training() {
  say "training"
  distil student "$work/student" 8229 ""
  python3 loadtest/peers/peft_training.py --encoder "$work/student" --device cuda --epochs 1 \
    --train data/movie-sentiment/train.jsonl --out "$out/peft.json"
  distil kd-lora "$work/student" 2000 "$work/teacher"
  distil lora-teacher "$work/teacher" 2000 ""
}

run() {
  work="$kit/work" out="${OUT:-$kit/out}"
  mkdir -p "$work" "$out"
  tar -C "$work" -xf "$kit/programs.tar.xz"
  tar -C "$work" -xf "$kit/student.tar.xz"
  programs="$work/programs"
  export CARGO_MANIFEST_DIR="$root" CARGO_BIN_EXE_kdlora="$programs/kdlora"
  LD_LIBRARY_PATH="$(python_libraries):${LD_LIBRARY_PATH:-}"
  export LD_LIBRARY_PATH
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
  [ -d "$work/teacher" ] || make_teacher
  local step
  for step in ${GPU_STEPS:-tests forward training table}; do
    case "$step" in
      tests) run_tests ;;
      forward) run_forward ;;
      training) run_training ;;
      table) python3 tests/gpu_table.py "$out" | tee "$out/table.md" ;;
    esac
  done
}

"$1"
