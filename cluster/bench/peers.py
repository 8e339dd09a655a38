"""Other engines on the same checkpoint, each in processes of its own. One that is not installed is named so.

They live in environments of their own, because they pin other versions: `EXPERTMESH_BENCH_VLLM` names the Python that
has vLLM, `EXPERTMESH_BENCH_LLAMA_SERVER` llama.cpp's `llama-server`. Without them this Python and PATH are searched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import httpx

from cluster.bench.child import Child
from cluster.bench.gguf_file import write_gguf
from cluster.bench.workload import DECODE_BATCHES, DECODE_PROMPT, DECODE_STEPS, Runner, prompts
from cluster.errors import ExpertMeshError
from workers.spec import ModelSpec

_TIMEOUT_S = 600.0


class Peer:
    """An engine that can only be asked to generate, so that decoding is a difference of two times."""

    name: str

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` greedy sequences, from the first generated token on."""
        prompt_ids = prompts(batch, DECODE_PROMPT, self._vocab_size)
        seconds = self.seconds(prompt_ids, 1 + DECODE_STEPS) - self.seconds(prompt_ids, 1)
        return batch * DECODE_STEPS / seconds

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second of one sequence, up to the first generated token."""
        return n_tokens / self.seconds(prompts(1, n_tokens, self._vocab_size), 1)

    def seconds(self, prompt_ids: list[list[int]], n_new: int) -> float:
        """How long `n_new` tokens for every prompt take, all prompts at once."""
        raise NotImplementedError

    def close(self) -> None:
        """End its processes."""
        raise NotImplementedError


class Vllm(Peer):
    """vLLM's CPU build."""

    name = "vllm"

    def __init__(self, python: str, directory: Path, n_threads: int) -> None:
        super().__init__(ModelSpec.from_config(directory).vocab_size)
        script = Path(__file__).with_name("vllm_process.py")
        self._child = Child(self.name, [python, str(script), str(directory), str(n_threads)])

    @classmethod
    def find(cls, directory: Path, work: Path, n_threads: int) -> Self | None:
        """A running one, or None where vLLM is not installed."""
        python = os.environ.get("EXPERTMESH_BENCH_VLLM") or (sys.executable if find_spec("vllm") else None)
        return cls(python, directory, n_threads) if python else None

    def seconds(self, prompt_ids: list[list[int]], n_new: int) -> float:
        """See `Peer`."""
        reply = self._child.ask(prompts=prompt_ids, n_new=n_new)
        if reply["tokens"] != n_new * len(prompt_ids):
            raise ExpertMeshError(f"vllm gave {reply['tokens']} tokens instead of {n_new * len(prompt_ids)}")
        return float(reply["seconds"])

    def close(self) -> None:
        """See `Peer`."""
        self._child.close()


class LlamaCpp(Peer):
    """llama.cpp's server, on the checkpoint converted to GGUF in float32."""

    name = "llama.cpp"

    def __init__(self, server: str, directory: Path, work: Path, n_threads: int) -> None:
        super().__init__(ModelSpec.from_config(directory).vocab_size)
        gguf = work / "model.gguf"
        write_gguf(directory, gguf)
        port = free_port()
        command = [
            server, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--threads", str(n_threads),
            "--parallel", str(max(DECODE_BATCHES)), "--ctx-size", str(max(DECODE_BATCHES) * 640), "--no-warmup",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_TIMEOUT_S)
        self._pool = ThreadPoolExecutor(max(DECODE_BATCHES))
        self._await_ready()

    @classmethod
    def find(cls, directory: Path, work: Path, n_threads: int) -> Self | None:
        """A running one, or None where llama.cpp is not installed."""
        server = os.environ.get("EXPERTMESH_BENCH_LLAMA_SERVER") or shutil.which("llama-server")
        return cls(server, directory, work, n_threads) if server else None

    def seconds(self, prompt_ids: list[list[int]], n_new: int) -> float:
        """See `Peer`."""
        start = time.perf_counter()
        for tokens in self._pool.map(lambda ids: self._complete(ids, n_new), prompt_ids):
            if tokens != n_new:
                raise ExpertMeshError(f"llama.cpp gave {tokens} tokens instead of {n_new}")
        return time.perf_counter() - start

    def close(self) -> None:
        """See `Peer`."""
        self._process.terminate()
        self._process.wait()

    def _complete(self, ids: list[int], n_new: int) -> int:
        request = {
            "prompt": ids, "n_predict": n_new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        reply = self._client.post("/completion", json=request).raise_for_status().json()
        return int(reply["tokens_predicted"])

    def _await_ready(self) -> None:
        for _ in range(600):
            if (code := self._process.poll()) is not None:
                raise ExpertMeshError(f"llama-server ended with exit code {code}")
            with suppress(httpx.TransportError):
                if self._client.get("/health").status_code == 200:
                    return
            time.sleep(0.2)
        self.close()
        raise ExpertMeshError("llama-server did not get ready in two minutes")


@contextmanager
def installed(directory: Path, work: Path, n_threads: int) -> Iterator[tuple[list[Runner], dict[str, str]]]:
    """The peers that run here, started, and a remark on each that does not. `work` takes converted models."""
    running: list[Peer] = []
    absent: dict[str, str] = {}
    kinds: list[tuple[str, Callable[[Path, Path, int], Peer | None]]] = [
        (LlamaCpp.name, LlamaCpp.find), (Vllm.name, Vllm.find),
    ]  # fmt: skip
    try:
        for name, find in kinds:
            try:
                peer = find(directory, work, n_threads)
            except ExpertMeshError as error:
                absent[name] = str(error)
                continue
            if peer is None:
                absent[name] = "not installed"
            else:
                running.append(peer)
        yield list(running), absent
    finally:
        for peer in running:
            peer.close()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
