"""An expert worker as a process of its own.

It prints its address, drains on SIGUSR1, and ends when its standard input does.
"""

from __future__ import annotations

import signal
import sys
import threading

from tests.contract.harness import MODEL_NAME
from tests.contract.model import Model
from tests.credentials import CREDENTIALS
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.worker import ShmAcceptor

model = Model()
shard = model.shard((layer, expert) for layer in range(model.n_layers) for expert in range(model.n_experts))
server = ExpertServer(shard, sys.argv[1], "127.0.0.1", model=MODEL_NAME, credentials=CREDENTIALS, ways=(ShmAcceptor,))
server.start()
signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=server.drain).start())
print(server.address, flush=True)
sys.stdin.read()
server.stop(1)
