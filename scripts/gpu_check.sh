#!/usr/bin/env bash
# What needs a GPU, in one run of less than 8 minutes: tests marked `gpu`, the benchmark's quick form, steps through device
# memory, and a served chat where Ray is installed. Prints one summary; fails when a part fails.
# usage: scripts/gpu_check.sh [PYTHON]       from the repository's root
set -u
python=${1:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
logs=$(mktemp -d)
summary=()
failed=0

part() { # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$logs/$name" 2>&1; then
    summary+=("ok      $name ($((SECONDS - began)) s): $(tail -n 1 "$logs/$name")")
  else
    summary+=("FAILED  $name ($((SECONDS - began)) s): $logs/$name")
    tail -n 20 "$logs/$name"
    failed=1
  fi
}

chat() {
  local model=$logs/model port=18123 server status
  "$python" -c "
import sys, torch
from dataclasses import replace
from pathlib import Path
from cluster.models.random import SMALL, write_random
write_random(Path(sys.argv[1]), replace(SMALL, dtype=torch.bfloat16, hidden_size=512, ffn_size=1024, head_dim=128))" "$model"
  "$python" -c 'from cluster.cli import app; app()' serve "$model" --port $port >"$logs/serve" 2>&1 &
  server=$!
  for _ in $(seq 240); do
    grep -q 'ready in' "$logs/serve" && break
    kill -0 $server 2>/dev/null || break
    sleep 0.5
  done
  curl -sS --fail --max-time 30 "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "model", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello!"}]}'
  status=$?
  kill -INT $server 2>/dev/null
  wait $server
  [ $status = 0 ] || cat "$logs/serve"
  return $status
}

part tests 200 "$python" -m pytest -q -m gpu tests
part bench 150 "$python" -c 'from cluster.cli import app; app()' bench gpu --quick
part device-steps 60 "$python" -m benchmarks.device_steps --layers 4
if "$python" -c 'import ray' 2>/dev/null; then
  export -f chat
  export python logs
  part chat 100 bash -c chat
else
  summary+=("left    chat: Ray is not installed")
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
printf '%s\n' "${summary[@]}"
exit $failed
