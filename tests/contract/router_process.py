"""A router as a process of its own: asks the workers named `NAME=ADDRESS` step after step until it is killed."""

from __future__ import annotations

import sys

from cluster.placement.placement import striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import MODEL_NAME
from tests.contract.model import Model, batch
from tests.credentials import CREDENTIALS, PATIENT_S
from workers.transport.grpc.client import GrpcTransport
from workers.transport.shm.router import ShmWay

model = Model()
addresses = dict(argument.split("=") for argument in sys.argv[1:])
exchange = Exchange(
    striped(model.n_layers, model.n_experts, tuple(addresses)),
    addresses,
    GrpcTransport("router", MODEL_NAME, CREDENTIALS, ways=(ShmWay(),), silent_after_s=PATIENT_S),
    reply_timeout_s=20,
    rejoin_timeout_s=20,
)
given, step = batch(model, 9), 0
while True:
    exchange.begin_step(step)
    for layer in range(model.n_layers):
        exchange.combine(exchange.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
    if not step:
        print("asked", flush=True)
    step += 1
