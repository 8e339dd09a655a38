"""The experts that every token of every text is given to: the model over the texts, in this process.

Legend: N tokens of all texts, L layers, K experts a token, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.analyze.texts import Domain
from cluster.analyze.token_class import token_classes
from cluster.errors import TextError
from cluster.gateway.tokenizer import Tokenizer
from workers.model.batch import Batch
from workers.model.decoder import Decoder

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Recording:
    """What was chosen. Rows are tokens of the texts, domain after domain; what the tokenizer puts before a text is run
    and left out, as models park surplus attention there."""

    domains: tuple[str, ...]
    ids_N: NDArray[np.int64]
    domain_N: NDArray[np.int64]  # place in `domains`
    class_N: NDArray[np.int64]  # place in `token_class.CLASSES`
    q_start: tuple[int, ...]  # tokens q_start[i]:q_start[i + 1] are consecutive in one text
    choices_NLK: NDArray[np.int16]  # first choice first; -1 in layers without experts
    weight_L: NDArray[np.float64]  # mean weight of the first choice

    def span(self, domain: int) -> tuple[slice, tuple[int, ...]]:
        """The rows of a domain, and `q_start` within them."""
        rows = np.flatnonzero(self.domain_N == domain)
        first, end = int(rows[0]), int(rows[-1]) + 1
        return slice(first, end), tuple(start - first for start in self.q_start if first <= start <= end)


class _Chosen:
    """A RoutingObserver that keeps all choices of a step."""

    def __init__(self, n_layers: int, top_k: int) -> None:
        self._shape = (n_layers, top_k)
        self.choices_TLK = np.zeros((0, *self._shape), np.int16)
        self.weight_L = np.zeros(n_layers)

    def begin(self, n_rows: int) -> None:
        self.choices_TLK = np.full((n_rows, *self._shape), -1, np.int16)

    def chosen(self, layer: int, q_start: tuple[int, ...] | None, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self.choices_TLK[:, layer] = ids_TK.cpu().numpy()
        self.weight_L[layer] += float((weights_TK[:, 0] / weights_TK.sum(1)).sum())


def record(
    model: Decoder,
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    *,
    most_tokens: int,
    max_context: int,
    max_batch_tokens: int,
    progress: Progress = lambda what, fraction: None,
) -> Recording:
    """Run the model over the texts, each from its begin; a text longer than the context is cut into several.

    most_tokens: of each domain; 0: all. Raises TextError when the tokenizer gives ids that the model does not know.
    """
    texts = [_encode(tokenizer, domain, most_tokens, model.spec.vocab_size) for domain in domains]
    start_ids = _start_ids(tokenizer)
    room = max_context - len(start_ids)
    total = sum(len(ids) for documents in texts for ids in documents)
    observer = _Chosen(model.spec.n_layers, model.spec.top_k)
    choices, ids_N, domain_N, classes, q_start = [], [], [], [], [0]
    for index, (domain, documents) in enumerate(zip(domains, texts, strict=True)):
        for document in documents:
            classes.append(token_classes([tokenizer.token_bytes(token_id) for token_id in document]))
            for first in range(0, len(document), room):
                part = document[first : first + room]
                choices.append(_run(model, [*start_ids, *part], max_batch_tokens, observer)[len(start_ids) :])
                ids_N += part
                domain_N += [index] * len(part)
                q_start.append(len(ids_N))
                progress(domain.name, len(ids_N) / total)
    n_run = total + len(start_ids) * (len(q_start) - 1)
    return Recording(
        tuple(domain.name for domain in domains), np.array(ids_N), np.array(domain_N), np.concatenate(classes),
        tuple(q_start), np.concatenate(choices), observer.weight_L / n_run,
    )  # fmt: skip


def _encode(tokenizer: Tokenizer, domain: Domain, most_tokens: int, vocab_size: int) -> list[list[int]]:
    documents, left = [], most_tokens or None
    for text in domain.documents:
        ids = tokenizer.encode(text, add_special_tokens=False)[:left]
        if ids and max(ids) >= vocab_size:
            raise TextError(f"{domain.name}: token {max(ids)} is not one of the {vocab_size} that the model knows")
        if ids:
            documents.append(ids)
        if left is not None and (left := left - len(ids)) == 0:
            break
    return documents


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    return [token_id for token_id in tokenizer.encode("")[:1] if token_id == tokenizer.bos_id]


def _run(model: Decoder, ids: Sequence[int], max_batch_tokens: int, observer: _Chosen) -> NDArray[np.int16]:
    """The choices of every token, [T, L, K]: one sequence, in the first blocks of the cache."""
    table_1B = torch.arange(-(-len(ids) // model.cache.block_size), dtype=torch.int32)[None]
    steps = []
    for first in range(0, len(ids), max_batch_tokens):
        part = ids[first : first + max_batch_tokens]
        position_T = torch.arange(first, first + len(part))
        batch = Batch(
            token_ids_T=torch.tensor(part), positions_T=position_T, slots_T=position_T, q_start=(0, len(part)),
            context_S=torch.tensor([first + len(part)], dtype=torch.int32), block_table_SB=table_1B,
            logit_rows_R=torch.arange(len(part)),  # in the last layer only rows whose logits are wanted go on
        )  # fmt: skip
        observer.begin(len(part))
        model.experts.begin_step(0)
        model.forward([batch], observer)
        steps.append(observer.choices_TLK)
    return np.concatenate(steps)
