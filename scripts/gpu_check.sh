#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes: the tests marked gpu, the kernels' tests, the
# benchmark's quick form, and a chat that is served, where Ray is installed. Needs no network, and not the project
# installed: the packages it asks for are enough. Prints one summary, whatever fails, hangs or is interrupted; fails if
# any part does. Whole outputs are in $OUT, by default a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
results=() status=0 names=() pids=()

summary() {
  status=$?
  printf '%s\n' "== summary (whole outputs: $out)" "${results[@]}"
  exit "$status"
}
trap summary EXIT
trap 'results+=("FAILS interrupted"); kill "${pids[@]}" 2> /dev/null; exit 143' INT TERM

begin() {  # name, seconds it may take, command: starts it; parts that have begun run side by side until `finish`
  local name=$1 limit=$2
  shift 2
  (
    began=$SECONDS
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 &
    trap "kill $!" TERM
    wait $!
    code=$?
    took="$((SECONDS - began)) s"
    case $code in
      0) echo "ok    $name ($took)" ;;
      124 | 137) echo "FAILS $name: not done after $took" ;;
      *) echo "FAILS $name ($took)" ;;
    esac > "$out/$name.result"
  ) &
  names+=("$name") pids+=($!)
}

finish() {  # waits for all that have begun
  local i name result
  for i in "${!names[@]}"; do
    name=${names[$i]}
    wait "${pids[$i]}"
    result=$(< "$out/$name.result")
    results+=("$result")
    printf '%s\n' "== $name"
    case $result in
      ok*) tail -n "${lines:-3}" "$out/$name.log" ;;
      *) tail -n 40 "$out/$name.log" && failed=1 ;;
    esac
  done
  names=() pids=()
}

failed=0
tests=("$python" -m pytest -q -p no:cacheprovider)
# The limits of what runs one after the other: 15 + 150 + 90 + 120 + 95 = 470 s.
begin packages 15 "$python" scripts/gpu_packages.py
lines=20 finish
begin kernels 150 "${tests[@]}" tests/unit/workers/kernels/cuda/test_kernels.py tests/unit/cluster/router/test_device_sampler.py
begin bits 150 "${tests[@]}" tests/gpu/test_same_bits.py
begin collective 150 "${tests[@]}" tests/gpu/test_collective_steps.py
finish
begin steps 90 "${tests[@]}" tests/gpu/test_device_steps.py
finish
begin benchmark 120 "$python" -c 'from cluster.cli import app; app()' bench gpu --quick --layers 8
lines=60 finish
if "$python" -c 'import ray' 2> /dev/null; then
  begin served 95 "${tests[@]}" tests/gpu/test_served.py
  finish
else
  results+=("-     served: Ray is not installed")
fi
exit "$failed"
