#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a machine with a GPU is asked in ten minutes: whether the kernels are right there, how long they take, and what
# its hardware counters say. Run it from anywhere; it needs no network, and what it lacks it names and goes on without.
#
#   make gpu-libraries               before, on a machine that may have no GPU: no C++ is compiled in the ten minutes then
#   benchmarks/run_on_gpu.sh         the whole plan
#   benchmarks/run_on_gpu.sh --plan  prints it
#
# Without gpu-libraries the script builds them, for which the seconds of that stage are few on a machine with few cores:
# STAGES=libraries LIMIT_SECONDS=6000 does it before.
#
# OUT            folder of the results: summary.txt, and results.tar.gz with all logs and records, which is renewed after
#                every stage, so that a run which is killed leaves what it has (default: gpu-results)
# PYTHON         interpreter (default: python3)
# STAGES         only these, as in STAGES="warm tiles"; what earlier runs found is kept beside
# LIMIT_SECONDS  the whole time; the limits of the stages grow and shrink with it (default: 580)
#
# A stage that fails or runs out of time is named in the summary and never stops the next one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

# Stage and its limit in seconds. "beside": it shares the time of the next stage. The last one takes what the others left.
plan=(
  "versions       15"
  "libraries      25"
  "warm           50 beside"
  "check_cuda     50"
  "check_triton   75"
  "table         100"
  "kernels        30"
  "counters       70"
  "memcheck       35"
  "racecheck      35"
  "graphs         45"
  "tiles          90"
)
planned=580 # the limits of all stages together, and those of packing
packing=10

python="${PYTHON:-python3}"
out="${OUT:-gpu-results}"
limit="${LIMIT_SECONDS:-$planned}"
results=build/gpu-results
parts=$(($(nproc) / 4))
((parts > 0)) || parts=1
summary="$out/summary.txt"

versions() { limited "$python" -m kdkernels env --json "$results/env.json"; }

libraries() { limited "$python" benchmarks/gpu_libraries.py install; }

# The CUDA kernels, which need no compilation, are checked on the GPU meanwhile.
warm() { limited "$python" -m kdkernels.testing.warm --table --seconds "$soon"; }

# A check keeps Python busy more than the GPU, so parts of it run side by side.
check_cuda() { check cuda; }
check_triton() { check triton; }
check() {
  limited xargs -P "$parts" -I '{}' "$python" -m kdkernels check --device cuda --backend "$1" \
    --dtype bfloat16 float32 float16 --shard "{}/$parts" --lines "$results/$stage-{}.jsonl" --limit "$soon" \
    < <(seq "$parts")
}

# Of each shape of the table all backends, eager mode and the products alone: by graph replay, by calls, and each kernel.
table() { bench --mode graph call --time 2; }
kernels() { bench --mode kernels; }
bench() {
  limited "$python" -m kdkernels bench --device cuda --table "$@" --lines "$results/$stage.jsonl" --limit "$soon"
}

counters() {
  limited "$python" benchmarks/counters.py --table "$results/kernels.jsonl" --lines "$results/counters.jsonl" \
    --limit "$soon"
}

# Status 99 is an error that the sanitizer found. Each tensor is an allocation of its own there, so that memcheck sees where
# it ends.
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
sanitize() {
  limited env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 "${our_kernels[@]}" \
    "$python" -m kdkernels check --device cuda --backend cuda triton --dtype bfloat16 float32 --quick \
    --lines "$results/$stage.jsonl" --limit "$soon"
}

graphs() { limited "$python" -m pytest -v --tb=short -m "gpu and not large" -p no:cacheprovider tests/test_ops_gpu.py; }

tiles() {
  limited "$python" benchmarks/sweep_triton.py --seconds "$soon" --output "$results/tiles.jsonl"
}

# Run a command for the seconds that the stage has, in the place of this process.
limited() { exec timeout --kill-after=3 "$seconds" "$@"; }

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# begin STAGE LIMIT: start it in the background, unless it was not asked for or the time is up.
begin() {
  stage="$1"
  local left=$((limit - SECONDS - packing * limit / planned))
  seconds=$(($2 * limit / planned))
  [[ -z "${STAGES:-}" || " $STAGES " == *" $stage "* ]] || return 1
  ((seconds < 1)) && seconds=1
  if [[ "$stage" == "${plan[-1]%% *}" ]] || ((seconds > left)); then
    seconds="$left"
  fi
  if ((seconds < 1)); then
    say "$stage: not run, the time is up"
    return 1
  fi
  soon=$((seconds * 19 / 20)) # what a command is told, so that it ends by itself
  ((soon < 1)) && soon=1
  began[$stage]="$SECONDS" given[$stage]="$seconds"
  "$stage" > "$results/$stage.log" 2>&1 &
  process[$stage]="$!"
}

# end STAGE: wait for it, and say what became of it.
end() {
  local name="$1" status
  [[ -n "${process[$name]:-}" ]] || return 0
  wait "${process[$name]}"
  status="$?"
  unset "process[$name]"
  local took=$((SECONDS - began[$name]))
  case "$status" in
    0) say "$name: ok ($took s)" ;;
    124 | 137) say "$name: stopped after ${given[$name]} s, what it wrote so far is kept" ;;
    127) say "$name: not run, $(tail -n 1 "$results/$name.log")" ;;
    *) say "$name: failed with status $status ($took s), see $name.log" ;;
  esac
  tail -n 3 "$results/$name.log" | cut -c 1-200 | sed 's/^/    /'
  pack
}

# All results as one archive, which is never half written.
pack() {
  tar -czf "$out/results.tar.gz.new" -C "$results" . && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}

interrupted() {
  trap '' INT TERM
  say "interrupted after $SECONDS s"
  kill "${process[@]}" 2> /dev/null
  wait
  pack
  exit 130
}

if [[ "${1:-}" == --plan ]]; then
  printf '%s\n' "${plan[@]}" "pack $packing" | awk '{ print $1, $2, $3 }'
  exit 0
fi

[[ -n "${STAGES:-}" ]] || rm -rf "$results" "$summary"
mkdir -p "$results" "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/gpu-triton}"
declare -A process=() began=() given=()
trap interrupted INT TERM

if ! nvidia-smi > "$results/nvidia-smi.txt" 2>&1; then
  say "no GPU: $(tail -n 1 "$results/nvidia-smi.txt")"
  exit 2
fi
nvidia-smi dmon -s puc -d 2 -o T > "$results/clocks.txt" 2>&1 & # what the times below were measured at
process[clocks]="$!"

# The sanitizer looks at kernels by a part of their names: the namespace of the CUDA ones, the functions of the Triton ones.
our_kernels=(--kernel-name kns=_ZN3kdk)
while read -r name; do
  our_kernels+=(--kernel-name "kns=$name")
done < <(grep -rhoP --include='*.py' '^def \K_\w+_kernel\w*(?=\()' kdkernels/triton | sort -u)

beside=
for row in "${plan[@]}"; do
  read -r name wanted mode <<< "$row"
  begin "$name" "$wanted"
  if [[ "$mode" == beside ]]; then
    beside="$name"
    continue
  fi
  end "$name"
  [[ -n "$beside" ]] && end "$beside"
  beside=
done

kill "${process[clocks]}" 2> /dev/null
say "finished after $SECONDS s; everything is in $out/results.tar.gz"
pack
