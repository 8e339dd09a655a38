"""What a process that computes steps has loaded: a compiler in it costs 66 MB and a second of every restart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_STEP = """
import sys
from itertools import product
from pathlib import Path

import torch

from cluster.config import Config
from cluster.models.random import write_random
from cluster.placement.placement import striped
from cluster.router.build import build_engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams
from workers.checkpoint import Checkpoint
from workers.shard import load_shard
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.server import ExpertServer

directory = Path(sys.argv[1])
write_random(directory)
checkpoint = Checkpoint(directory)
layers, experts = checkpoint.spec.n_layers, checkpoint.spec.n_experts
shard = load_shard(checkpoint, product(range(layers), range(experts)), torch.float32)
credentials = Credentials.generate()
server = ExpertServer(shard, "w", "127.0.0.1", model="m", credentials=credentials)
server.start()
exchange = Exchange(
    striped(layers, experts, ("w",)),
    {"w": server.address},
    GrpcTransport("r", "m", credentials),
    reply_timeout_s=30,
    rejoin_timeout_s=30,
)
engine = build_engine(Config(kv_cache_mb=1), directory, exchange)
engine.submit("x", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
tokens = [token for _ in range(3) for output in engine.step() for token in output.token_ids]
assert len(tokens) == 3, tokens
server.stop(0)
print("compiler:", [name for name in sys.modules if name.split(".")[0] == "numba"])
"""


def test_router_and_worker_compute_without_the_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STEP, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiler: []" in done.stdout
