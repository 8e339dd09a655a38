"""A cluster on this machine's GPUs, as a user starts it: catches one that answers nobody, computes on CPUs, or gives
other tokens when an expert worker is killed in the middle of an answer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("ray", reason="needs Ray")

from tests.cluster_fixture import chat, running_cluster, stream, text  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

OPTIONS = ("--dtype", "bfloat16", "--expert-workers", "2", "--kv-cache-mb", "64", "--max-sequences", "8")
N_TOKENS = 600


def test_a_chat_and_an_answer_that_outlives_a_worker(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with running_cluster(tmp_path, tiny_checkpoint, *OPTIONS) as cluster:
        processes = {process["id"]: process for process in cluster.status()["processes"]}
        for name in ("router-0", "expert-0", "expert-1"):
            assert processes[name]["detail"]["device"].startswith("cuda"), processes[name]
        first = chat(cluster, "hello", max_tokens=16)
        assert first and chat(cluster, "hello", max_tokens=16) == first

        undisturbed: list[str] = []
        stream(cluster, N_TOKENS, undisturbed)
        disturbed: list[str] = []
        reader = threading.Thread(target=stream, args=(cluster, N_TOKENS, disturbed))
        reader.start()
        wait_until(lambda: len(disturbed) > 20 or not reader.is_alive(), 60)
        cluster.kill("expert-0")
        reader.join(60)
        assert text(disturbed) == text(undisturbed)
        router = cluster.process_of("router-0")
        assert router["detail"]["captured_steps"] > 0, "no step went through device memory"
        print({name: process["detail"].get("device") for name, process in processes.items()}, router)
