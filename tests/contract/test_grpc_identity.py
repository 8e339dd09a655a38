"""Who may call, and whom: the cluster's token, mutual TLS, and names in the handshake.

Catches a worker that computes for strangers, a router that believes whoever answers at a port that was used again, and
a certificate that is replaced without effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.gateway.session import Session
from cluster.router.codec import SERVICE
from cluster.router.service import GenerationService
from tests.certificates import Authority
from tests.contract.harness import MODEL_NAME
from tests.contract.model import Model
from tests.credentials import CREDENTIALS, PATIENT_S
from tests.fake_engine import FakeEngine
from tests.loop import in_loop, until
from workers.errors import ExpertMeshError, WorkerLost
from workers.transport.base import Rows, Tag
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.handshake import EXCHANGE_METHOD, EXPERTS_SERVICE, Hello
from workers.transport.grpc.server import ExpertServer

MODEL = Model()
TAG = Tag(1, 1, 1, 0, 0, 0)
ONE_P = torch.zeros(1, dtype=torch.int32)
Serve = Callable[[Credentials], ExpertServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ExpertServer] = []

    def start(credentials: Credentials) -> ExpertServer:
        shard = MODEL.shard([(0, 0)])
        server = ExpertServer(shard, "a", "127.0.0.1", model=MODEL_NAME, credentials=credentials, epoch=lambda: 7)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(0)


def ask(server: ExpertServer, credentials: Credentials, worker: str = "a", model: str = MODEL_NAME) -> torch.Tensor:
    transport = GrpcTransport("router-0", model, credentials, greet_timeout_s=5, silent_after_s=PATIENT_S)
    try:
        transport.connect(worker, server.address)
        transport.send(worker, Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        out_PD = torch.empty(1, 32)
        transport.receive(worker, TAG, 20, out_PD)
        return out_PD
    finally:
        transport.close()


def right() -> torch.Tensor:
    return MODEL.shard([(0, 0)]).forward(0, torch.ones(1, 32), ONE_P, ONE_P)


def test_a_worker_of_another_name_model_or_cluster_is_refused_by_name(serve: Serve) -> None:
    server = serve(CREDENTIALS)
    with pytest.raises(WorkerLost, match=r"this is worker 'a' \(epoch 7\), not 'b'"):
        ask(server, CREDENTIALS, worker="b")
    with pytest.raises(WorkerLost, match=f"serves model '{MODEL_NAME}' .*not 'another'"):
        ask(server, CREDENTIALS, model="another")
    with pytest.raises(WorkerLost, match="token is missing or another cluster's"):
        ask(server, Credentials.generate())
    assert torch.equal(ask(server, CREDENTIALS), right())


def test_strangers_get_health_and_nothing_else(serve: Serve) -> None:
    server = serve(CREDENTIALS)
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", EXPERTS_SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.drain()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(80)]
        codes = [each.code() for each in watches if not each.is_active() or not _has_first(each)]
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}, "watches are a way to fill the memory"
        hello = Hello("a", "router-0", MODEL_NAME).metadata
        wrong = CREDENTIALS.token[:-1] + "x"
        for shown in ((), (("expertmesh-token", wrong),), (("expertmesh-token", ""),)):
            calls: list[Callable[..., Any]] = [
                lambda **given: list(channel.stream_stream(EXCHANGE_METHOD)(iter([b"x"]), **given)),
                lambda **given: channel.unary_unary(f"/{EXPERTS_SERVICE}/Describe")(b"", **given),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata=(*shown, *hello), timeout=20)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def _has_first(watch: Any) -> bool:
    try:
        next(watch)
    except grpc.RpcError:
        return False
    return True


@in_loop
async def test_a_gateway_shows_the_token_and_names_the_router_it_awaits() -> None:
    service = GenerationService(FakeEngine(), "127.0.0.1", router="router-1", credentials=CREDENTIALS)
    await service.start()
    async with grpc.aio.insecure_channel(service.address) as channel:
        stream: Any = channel.stream_stream(f"/{SERVICE}/Stream")
        for shown, code in (((), "UNAUTHENTICATED"), (CREDENTIALS.metadata, "FAILED_PRECONDITION")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream(metadata=(*shown, ("expertmesh-router", "router-0"))).read()
            assert caught.value.code().name == code
    async with Session(Credentials.generate(), {"router-1": service.address}) as session:
        async with Session(CREDENTIALS, {"router-1": service.address}) as member:
            await until(member.ready)
        assert not session.ready()
    await service.stop()


def test_mutual_tls_lets_in_whom_the_authority_names_and_takes_up_replaced_files(serve: Serve, tmp_path: Path) -> None:
    ours, others = Authority(), Authority()
    token = CREDENTIALS.token
    here, there = Credentials(token, ours.write(tmp_path / "here")), Credentials(token, ours.write(tmp_path / "there"))
    server = serve(here)
    assert torch.equal(ask(server, there), right())
    for stranger in (Credentials(token), Credentials(token, others.write(tmp_path / "others"))):
        with pytest.raises(WorkerLost):
            ask(server, stranger)
    misnamed = serve(Credentials(token, ours.write(tmp_path / "misnamed", name="somebody")))
    with pytest.raises(WorkerLost):
        ask(misnamed, there)

    # The authority is replaced at both ends, file by file, while the server runs.
    others.write(tmp_path / "here")
    with pytest.raises(WorkerLost):
        ask(server, there)
    others.write(tmp_path / "there")
    assert torch.equal(ask(server, there), right())
    (tmp_path / "here" / "key.pem").write_bytes(b"half of it")
    assert torch.equal(ask(server, there), right()), "a file that cannot be read ended the server"


@in_loop
async def test_a_gateway_comes_back_with_replaced_certificates(tmp_path: Path) -> None:
    authority = Authority()
    credentials = Credentials(CREDENTIALS.token, authority.write(tmp_path / "tls"))
    service = GenerationService(FakeEngine(), "127.0.0.1", credentials=credentials)
    await service.start()
    address = service.address
    async with Session(credentials, {"router-0": address}) as session:
        await until(session.ready)
        await service.stop()
        Authority().write(tmp_path / "tls")
        service = GenerationService(FakeEngine(), "127.0.0.1", int(address.rsplit(":")[-1]), credentials=credentials)
        await service.start()
        await until(lambda: bool(service.n_gateways) and session.ready())
    await service.stop()


def test_without_tls_a_server_is_for_this_machine_unless_the_network_is_trusted() -> None:
    shard = MODEL.shard([(0, 0)])
    with pytest.raises(ExpertMeshError, match=r"--tls-cert.*--trusted-network"):
        ExpertServer(shard, "a", "0.0.0.0", model=MODEL_NAME, credentials=CREDENTIALS)
    trusted = Credentials("token", trusted_network=True)
    ExpertServer(shard, "a", "0.0.0.0", model=MODEL_NAME, credentials=trusted).stop(0)


def test_the_token_is_in_no_text_and_its_file_is_the_users_alone(tmp_path: Path) -> None:
    credentials = Credentials.generate(Authority().write(tmp_path / "tls"), trusted_network=True)
    assert credentials.token not in f"{credentials!r}{credentials}"
    file = tmp_path / "credentials.json"
    credentials.write(file)
    assert file.stat().st_mode & 0o077 == 0
    assert Credentials.read(file) == credentials
    with pytest.raises(ExpertMeshError, match="not the credentials"):
        Credentials.read(tmp_path / "tls" / "key.pem")
