#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes: the tests marked gpu, the benchmark's quick form,
# and a chat that is served, where Ray is installed. Prints one summary; fails if any part does.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
results=()
status=0

part() {  # name, seconds it may take, command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name"
  if timeout "$limit" "$@"; then results+=("ok    $name ($((SECONDS - began)) s)"); else
    results+=("FAILS $name ($((SECONDS - began)) s)")
    status=1
  fi
}

part "tests" 240 "$python" -m pytest -q -m gpu tests/gpu
part "kernels" 90 "$python" -m pytest -q tests/unit/workers/kernels/cuda/test_kernels.py tests/unit/cluster/router/test_device_sampler.py
part "benchmark" 120 "$python" -c 'from cluster.cli import app; app()' bench gpu --quick --layers 8
if "$python" -c 'import ray' 2>/dev/null; then
  part "served chat" 150 "$python" -m pytest -q tests/integration/test_serve.py
else
  results+=("-     served chat: Ray is not installed")
fi
printf '%s\n' "== summary" "${results[@]}"
exit $status
