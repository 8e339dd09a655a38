"""What the step loop counts, in plain numbers: it adds, others read."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.observe.distribution import Distribution
from cluster.observe.series import router as series
from cluster.router.sequence import Sequence


@dataclass(slots=True)
class StepCounters:
    """Sums since start. Times are in seconds, by time.monotonic()."""

    steps: int = 0
    rows: int = 0  # token rows computed: prompts, decoding and recomputation
    tokens: int = 0  # emitted
    queried: int = 0  # prompt tokens that were looked for in the KV cache
    cached: int = 0  # those that were there
    seconds: Distribution = field(default_factory=lambda: Distribution(series.STEP.buckets))
    sizes: Distribution = field(default_factory=lambda: Distribution(series.ROWS.buckets))
    queue: Distribution = field(default_factory=lambda: Distribution(series.QUEUE.buckets))
    prefill: Distribution = field(default_factory=lambda: Distribution(series.PREFILL.buckets))
    decode: Distribution = field(default_factory=lambda: Distribution(series.DECODE.buckets))

    def started(self, n_rows: int) -> None:
        """A step of `n_rows` rows begins."""
        self.steps += 1
        self.rows += n_rows
        self.sizes.add(n_rows)

    def emitted(self, sequence: Sequence, now: float) -> int:
        """`sequence` got one more token. With its first one: how many tokens of its prompt were cached."""
        self.tokens += 1
        if sequence.first_token_at:
            return 0
        sequence.first_token_at = now
        self.queue.add(sequence.admitted_at - sequence.arrived)
        self.prefill.add(now - sequence.admitted_at)
        if sequence.n_emitted != 1:  # another router began it
            return 0
        self.queried += sequence.n_prompt
        self.cached += sequence.cached
        return sequence.cached

    def ended(self, sequence: Sequence, now: float) -> None:
        """`sequence` has its last token."""
        self.decode.add(now - sequence.first_token_at)
