#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that a machine with a GPU is asked to measure, in ten minutes at most: build (CUDA for the present device),
# check, compute-sanitizer on the CUDA kernels, benchmarks, tests and a sweep of the Triton tiles. Run it from the
# repository; it writes to ${OUT:-gpu-results} as it goes, so an interrupted run keeps what it has. PYTHON names the
# interpreter, LIMIT_SECONDS the whole time. What one run had no time for, a second does with STAGES naming it, as in
# STAGES="build bench_rest tests_large sweep_triton sweep_rows".
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
out="${OUT:-gpu-results}"
limit="${LIMIT_SECONDS:-590}"
mkdir -p "$out"
summary="$out/summary.txt"
: > "$summary"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# stage NAME SECONDS COMMAND...: run a command under the shorter of its own limit and what is left of the whole.
stage() {
  local name="$1" seconds="$2" status begin="$SECONDS"
  shift 2
  [[ -z "${STAGES:-}" || " $STAGES " == *" $name "* ]] || return 0
  local left=$((limit - SECONDS))
  if ((left < 5)); then
    say "$name: not run, the time is up"
    return 1
  fi
  ((seconds > left)) && seconds="$left"
  timeout --kill-after=5 "$seconds" "$@" > "$out/$name.log" 2>&1
  status=$?
  case "$status" in
    0) say "$name: ok ($((SECONDS - begin)) s)" ;;
    124 | 137) say "$name: stopped after $seconds s, what it wrote so far is in $out" ;;
    *) say "$name: failed with status $status ($((SECONDS - begin)) s), see $name.log" ;;
  esac
  tail -n 3 "$out/$name.log" | sed 's/^/    /'
  return "$status"
}

has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  say "no GPU: $python has no torch, or its torch sees no CUDA device"
  exit 2
fi
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || say "nvidia-smi: failed"

capability="$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")"
export KDKERNELS_CUDA_ARCHITECTURES="${KDKERNELS_CUDA_ARCHITECTURES:-$capability}"
command -v nvcc > /dev/null || say "build: nvcc was not found; no CUDA library"
if command -v c++ > /dev/null || command -v g++ > /dev/null; then
  stage build 150 "$python" -m pip install --no-build-isolation --no-deps -e . ||
    stage build_in_place 150 "$python" setup.py build_ext --inplace ||
    say "build: no native libraries; the Triton kernels and the reference need none"
else
  say "build: not run, there is no C++ compiler; the Triton kernels and the reference need none"
fi

stage env 30 "$python" -m kdkernels env
stage check 80 "$python" -m kdkernels check --device cuda --json "$out/check.json"

# Status 99 is an error that the sanitizer found; what the check itself found is above.
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 55 compute-sanitizer --tool "$tool" --error-exitcode 99 "$python" -m kdkernels \
      check --device cuda --backend cuda --dtype float32 bfloat16 --quick
  done
else
  say "memcheck, racecheck: not run, compute-sanitizer was not found"
fi

# Before the tests, whose first compilations take long: a time is what this machine was asked for. First the ops that have
# CUDA kernels, against what compiles nothing.
with_cuda=($("$python" -c '
from importlib.util import find_spec
from kdkernels.testing.opinfo import opinfos
print(*(info.name for info in opinfos() if find_spec(f"kdkernels.cuda.{info.op}")))'))
quick=(triton cuda eager mm)
stage bench_bf16 110 "$python" -m kdkernels bench --device cuda --dtype bf16 --time 1 --output "$out/bf16" \
  --op "${with_cuda[@]}" --backend "${quick[@]}"
stage bench_fp32 90 "$python" -m kdkernels bench --device cuda --dtype fp32 --time 1 --output "$out/fp32" \
  --op "${with_cuda[@]}" --backend "${quick[@]}"

if has_module pytest && has_module hypothesis; then
  stage tests 120 "$python" -m pytest -q -m "gpu and not large" -p no:cacheprovider tests
  stage tests_large 40 "$python" -m pytest -q -m "gpu and large" -p no:cacheprovider tests
else
  say "tests: not run, pytest or hypothesis is not installed"
fi

stage sweep_triton 110 "$python" benchmarks/sweep_triton.py --seconds 100 --output "$out/sweep_triton.jsonl"
stage sweep_rows 60 "$python" -m kdkernels bench --device cuda --dtype bf16 --sweep --time 1 --output "$out/rows"
stage bench_rest 400 "$python" -m kdkernels bench --device cuda --dtype bf16 fp32 --time 2 --output "$out/rest"
say "finished after $SECONDS s"
