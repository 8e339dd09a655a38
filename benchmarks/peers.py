"""Other engines on the same checkpoint, each in processes of its own. One that is not installed is named so.

They live in environments of their own, because they pin other versions: `EXPERTMESH_BENCH_VLLM` names the Python that
has vLLM, `EXPERTMESH_BENCH_LLAMA` llama.cpp's `llama-batched-bench`. Without them this Python and PATH are searched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, Self

from benchmarks.child import Child
from benchmarks.gguf_file import write_gguf
from benchmarks.workload import DECODE_PROMPT, DECODE_STEPS, Runner, prompts
from cluster.errors import ExpertMeshError
from workers.families.registry import read_spec


class Peer(Runner, Protocol):
    """A runner with something to end."""

    def close(self) -> None:
        """End its processes."""


class Vllm:
    """vLLM's CPU build. It can only be asked to generate, so decoding is the difference of two times."""

    name = "vllm"

    def __init__(self, python: str, directory: Path, n_threads: int) -> None:
        self._vocab_size = read_spec(directory).vocab_size
        script = Path(__file__).with_name("vllm_process.py")
        self._child = Child(self.name, [python, "-I", str(script), str(directory), str(n_threads)])

    @classmethod
    def find(cls, directory: Path, work: Path, n_threads: int) -> Self | None:
        """A running one, or None where vLLM is not installed."""
        python = os.environ.get("EXPERTMESH_BENCH_VLLM") or (sys.executable if find_spec("vllm") else None)
        return cls(python, directory, n_threads) if python else None

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` greedy sequences, from the first generated token on."""
        prompt_ids = prompts(batch, DECODE_PROMPT, self._vocab_size)
        seconds = self._seconds(prompt_ids, 1 + DECODE_STEPS) - self._seconds(prompt_ids, 1)
        return batch * DECODE_STEPS / seconds

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second of one sequence, up to the first generated token."""
        return n_tokens / self._seconds(prompts(1, n_tokens, self._vocab_size), 1)

    def close(self) -> None:
        """End its process."""
        self._child.close()

    def _seconds(self, prompt_ids: list[list[int]], n_new: int) -> float:
        """How long `n_new` tokens for every prompt take, all prompts at once."""
        reply = self._child.ask(prompts=prompt_ids, n_new=n_new)
        if reply["tokens"] != n_new * len(prompt_ids):
            raise ExpertMeshError(f"vllm gave {reply['tokens']} tokens instead of {n_new * len(prompt_ids)}")
        return float(reply["seconds"])


class LlamaCpp:
    """llama.cpp's own `llama-batched-bench`, on the checkpoint converted to GGUF in float32."""

    name = "llama.cpp"

    def __init__(self, program: str, directory: Path, work: Path, n_threads: int) -> None:
        self._gguf = work / "model.gguf"
        write_gguf(directory, self._gguf)
        self._command = [program, "-m", str(self._gguf), "-t", str(n_threads), "--output-format", "jsonl"]

    @classmethod
    def find(cls, directory: Path, work: Path, n_threads: int) -> Self | None:
        """One that is ready to run, or None where llama.cpp is not installed."""
        program = os.environ.get("EXPERTMESH_BENCH_LLAMA") or shutil.which("llama-batched-bench")
        return cls(program, directory, work, n_threads) if program else None

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` greedy sequences, from the first generated token on."""
        return self._run("speed_tg", batch, DECODE_PROMPT, DECODE_STEPS)

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second of one sequence."""
        return self._run("speed_pp", 1, n_tokens, 1)

    def close(self) -> None:
        """See `Vllm`; here nothing stays open."""

    def _run(self, figure: str, batch: int, n_prompt: int, n_new: int) -> float:
        context = batch * (n_prompt + n_new) + 256
        # Measured twice, the first counts: the program sometimes ends before it has written its last line.
        arguments = f"-npp {n_prompt} -ntg {n_new} -npl {batch},{batch} -c {context}".split()
        ended = subprocess.run(self._command + arguments, capture_output=True, text=True, check=False)
        lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
        if ended.returncode or not lines:
            raise ExpertMeshError(f"llama-batched-bench ended with exit code {ended.returncode}: {ended.stderr[-500:]}")
        return float(json.loads(lines[0])[figure])


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
