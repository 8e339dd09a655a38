"""vLLM behind a pipe: one JSON request a line in, the seconds it took out.

Runs under the Python of vLLM's own environment, so it imports nothing of ExpertMesh.
`python -I vllm_process.py CHECKPOINT THREADS`: without -I the files beside it would hide packages of the same names.
A request is `{"prompts": [[ids], ...], "n_new": 1}`.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is not a reply
    directory, threads = sys.argv[1], int(sys.argv[2])
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # processes of its own would outlive this one
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory, dtype="float32", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=64,
        max_num_batched_tokens=2048, enable_prefix_caching=False, distributed_executor_backend="uni",
    )  # fmt: skip
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        params = SamplingParams(
            max_tokens=request["n_new"], min_tokens=request["n_new"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        replies.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")


if __name__ == "__main__":
    main()
