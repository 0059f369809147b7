#!/usr/bin/env bash
# Everything there is to know about a GPU, in one command and ten minutes.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bench/gpu.sh [--out DIR] [--minutes N] [--python PYTHON] [step...]

Needs an NVIDIA GPU, a PyTorch with CUDA, nvcc, pytest; no network. Nothing is installed: the extension is built in place.

steps, all by default, in this order:
  build      the extension, for this GPU, into the source tree
  tests      pytest -m gpu
  sanitizer  compute-sanitizer's memcheck and racecheck over small shapes
  ceilings   bandwidth of a copy, speed of matrix products
  kernels    each kernel's bandwidth over ResNet-50's shapes at batch 256, as a fraction of the copy's
  models     training img/s of ResNet-18 and -50, bf16 and fp16: eager AMP, torch.compile, ours
  inference  img/s of ResNet-50 and -18 with folded batch norms, batch 64 and 1: eager, torch.compile, ours
  graphs     training steps as CUDA graphs
  probe      fused convolution graphs of cuDNN
A table of all results in the folder comes last.

  --out DIR      where results go (default: $OUT, else bench/results/<gpu name>)
  --minutes N    time for all steps together (default: 10); what a step leaves is the next one's
  --python P     the interpreter (default: $PYTHON, else the first of .venv/bin/python and python3 that sees a GPU)

Exit status: 0 when all steps went well, 1 when one failed or left out something that it should have measured, 2 for bad
arguments or no GPU.
TEXT
}

STEPS=(build tests sanitizer ceilings kernels models inference graphs probe)
# Seconds each is entitled to; together 575. An H200 with 16 cores took 63 to build, 48 for the sanitizer, 11, 32 and 127
# for the three after it, and 24 for four of the probe's convolutions with the cuDNN frontend.
declare -A BUDGET=([build]=70 [tests]=125 [sanitizer]=55 [ceilings]=14 [kernels]=40 [models]=135 [inference]=60 [graphs]=50 [probe]=26)
TABLE=15 # seconds that the table may take; it and a step that must be killed are why 25 of each run are nobody's
GRACE=5 # a script is told to begin nothing new this long before it is stopped

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-} minutes=10 python=${PYTHON:-} chosen=()

die() {
  echo "bench/gpu.sh: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --out | --minutes | --python)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -*) die "unknown option $1 (--help lists them)" ;;
    *)
      [[ -v BUDGET[$1] ]] || die "unknown step $1: expected one of ${STEPS[*]}"
      chosen+=("$1")
      ;;
  esac
  shift
done
# Before the folder changes.
[[ -z $out || $out == /* ]] || out=$PWD/$out
[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "--minutes: expected a whole number above 0, got $minutes"
((${#chosen[@]})) || chosen=("${STEPS[@]}")

# What an interpreter sees: "yes", or why not.
sees_gpu() {
  "$1" -c 'import torch; print("yes" if torch.cuda.is_available() else f"torch {torch.__version__} sees none")' \
    2>/dev/null || echo "no PyTorch"
}

candidates=("$ROOT/.venv/bin/python" python3)
[[ -n $python ]] && candidates=("$python")
python='' seen=''
for candidate in "${candidates[@]}"; do
  path=$(command -v "$candidate") || continue
  [[ $path == /* ]] || path=$PWD/$path
  answer=$(sees_gpu "$path")
  [[ $answer == yes ]] && python=$path && break
  seen+="${seen:+; }$path: $answer"
done
[[ -n $python ]] || die "no GPU: ${seen:-no such Python: ${candidates[*]}}"

cd "$ROOT" || die "cannot enter $ROOT"
export PYTHONPATH=$ROOT/bench:$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# What models compiles, graphs takes from there.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$ROOT/build/inductor}
unset FUSED_RESNET_DISABLE FUSED_RESNET_VERBOSE # a good build would look like none, or talk into its answers
if [[ -z $out ]]; then
  name=$("$python" -c 'import timing, torch; print(timing.slug(torch.cuda.get_device_name()))') || die "cannot name the GPU"
  out=$ROOT/bench/results/$name
fi
mkdir -p "$out" || die "cannot write to $out"
out=$(cd "$out" && pwd)
: >"$out/steps.tsv"

# Runs a command for at most $limit seconds; its output goes to the terminal and to a log.
limited() {
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/$step.log"
  return "${PIPESTATUS[0]}"
}

script() {
  local module=$1
  shift
  limited "$python" -m "gpu.$module" --out "$out" --seconds $((limit > 2 * GRACE ? limit - GRACE : limit)) "$@"
}

# Fails also where the tool itself did not run: its last line must be in its log.
sanitize() {
  local tool=$1 verdict=$2 log=$out/sanitizer-$1.txt
  rm -f "$log"
  # Without PyTorch's caching allocator, so that an access beyond a tensor is an access beyond a block.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no \
    --log-file "$log" "$python" -m gpu.sanitized "${@:3}" || return
  grep -q "$verdict" "$log" || { echo "$tool did not say '$verdict'; see $log" | tee -a "$out/$step.log" && return 1; }
  grep "$verdict" "$log" | tee -a "$out/$step.log"
}

step_sanitizer() {
  local half=$((limit / 2)) status=0
  sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) || {
    echo "compute-sanitizer not found" | tee -a "$out/$step.log"
    return 1
  }
  limit=$half
  sanitize memcheck "ERROR SUMMARY: 0 errors" || status=$?
  sanitize racecheck "RACECHECK SUMMARY: 0 hazards" --unchecked || status=$?
  return "$status"
}

step_build() { limited "$python" -m gpu.build; }
step_tests() { script suite; }
step_ceilings() { script ceilings; }
step_kernels() { script kernels; }
step_models() { script models; }
step_inference() { script inference; }
step_graphs() { script models --graphs; }
step_probe() { script probe; }

# What is left for this step when those after it get what they are entitled to, or their part of less than that.
# SECONDS counts from the start of the script: looking for an interpreter takes time too.
share() {
  local later=0 seen=0 all=0 name
  for name in "${chosen[@]}"; do
    ((all += BUDGET[$name])) || true
    ((seen)) && ((later += BUDGET[$name]))
    [[ $name == "$1" ]] && seen=1
  done
  local total=$((minutes * 60 - 25))
  local left=$((total - SECONDS))
  local reserved=$((later * total / all)) part=$((later * left / (later + BUDGET[$1])))
  [[ $1 == build ]] && reserved=0 # nothing runs without it
  echo $((left - (part < reserved ? part : reserved)))
}

failed=0
for step in "${chosen[@]}"; do
  began=$SECONDS
  limit=$(share "$step")
  rm -f "$out/$step".{log,json,part} "$out/$step"-*.txt # those of an earlier run
  echo "== $step (at most $limit s)"
  if ((limit >= 5)); then
    "step_$step"
    status=$?
  else
    status=none
  fi
  case $status in
    0) state=ok ;;
    4) state=incomplete ;;
    none) state="no time was left" ;;
    124 | 137) state="out of time, partial results" ;;
    *) state="FAILED (status $status)" ;;
  esac
  [[ $step == probe && $status == 3 ]] && state="not available here" status=0
  [[ $status == 0 ]] || failed=1
  printf '%s\t%s\t%s\n' "$step" "$state" $((SECONDS - began)) >>"$out/steps.tsv"
  echo "== $step: $state, $((SECONDS - began)) s"
  if [[ $step == build && $status != 0 ]]; then
    echo "bench/gpu.sh: nothing else is run without a build" >&2
    break
  fi
done
echo
timeout --kill-after=2 "$TABLE" "$python" -m gpu.table "$out" | tee "$out/table.txt"
exit "$failed"
