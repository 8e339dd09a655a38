"""Numbers of bits whose truth is known, and the classes of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.analyze.analysis import Analysis, analyse
from cluster.analyze.information import entropy, estimate, mutual_information
from cluster.analyze.recording import Recording
from cluster.analyze.token_class import CLASSES, token_classes

RNG = np.random.default_rng(0)
A, B = RNG.integers(0, 2, 20_000), RNG.integers(0, 2, 20_000)


def test_bits_of_cases_that_are_known() -> None:
    """Would catch a wrong sign or base, and a conditional that forgets its condition."""
    assert entropy(np.repeat([0, 5, 7, 9], 10)) == pytest.approx(2.0)
    assert entropy(np.array([3, 3, 3])) == 0 and entropy(np.array([], np.int64)) == 0
    assert mutual_information(A, A) == pytest.approx(1.0, abs=1e-3)
    assert mutual_information(A, B) < 1e-3
    assert mutual_information(A ^ B, A) < 1e-3  # either alone tells nothing of their difference,
    assert mutual_information(A ^ B, A, B) == pytest.approx(1.0, abs=1e-3)  # beside the other all of it


@pytest.mark.parametrize("given", [None, B])
def test_chance_is_taken_off(given: np.ndarray | None) -> None:
    """With few tokens of many values the counts show bits that are not there."""
    label = RNG.integers(0, 500, len(A))
    (bits,) = estimate([RNG.integers(0, 8, len(A))], label, given)
    assert bits.plug_in > 0.05 and abs(bits.corrected) < 4 * bits.spread + 1e-3
    (bits,) = estimate([label % 8], label, given)
    assert bits.corrected == pytest.approx(3.0, abs=0.3)


def recorded(expert_N: np.ndarray, domain_N: np.ndarray, class_N: np.ndarray) -> Analysis:
    order = np.argsort(domain_N, kind="stable")
    choices = np.stack([expert_N, (expert_N + 1) % 8], 1)[order, None].astype(np.int16)
    ids = RNG.integers(0, 50, len(order))
    ends = (0, int((domain_N == 0).sum()), len(order))
    recording = Recording(("a", "b"), ids, domain_N[order], class_N[order], ends, choices, np.array([0.6]))
    return analyse("model", 8, [0], recording)


def test_experts_by_syntax_and_by_topic_are_told_apart() -> None:
    """Also where class and domain go together, which makes either alone tell of the other."""
    domain_N = RNG.integers(0, 2, 6000)
    class_N = np.where(RNG.random(6000) < 0.7, domain_N, RNG.integers(0, 4, 6000))
    assert recorded(class_N, domain_N, class_N).syntax_share == pytest.approx(1.0, abs=0.02)
    assert recorded(domain_N, domain_N, class_N).syntax_share == pytest.approx(0.0, abs=0.02)
    assert 0.2 < (recorded(2 * class_N % 8 + domain_N, domain_N, class_N).syntax_share or 0) < 0.9
    assert recorded(np.zeros(6000, np.int64), domain_N, class_N).syntax_share is None


def test_pairs_that_come_together_have_lift() -> None:
    analysis = recorded(RNG.integers(0, 2, 6000) * 4, RNG.integers(0, 2, 6000), np.zeros(6000, np.int64))
    lift = analysis.lift(0)
    assert analysis.together_LEE[0].sum() == 2 * 6000 and analysis.together_LEE[0].trace() == 0
    assert lift[0, 1] > 1.9 and lift[4, 5] > 1.9 and lift[0, 4] == 0 and lift[2, 3] == 0
    assert analysis.evenness(0) == pytest.approx(2 / 3, abs=1e-3)  # 4 of 8 experts, evenly


@pytest.mark.parametrize(
    ("pieces", "classes"),
    [
        ([b"The", b" fer", b"ry", b" left", b"."], "capitalised word continuation word punctuation"),
        ([b"x", b" =", b" 12", b"3", b"\n    ", b"return"], "word symbol number number space word"),
        ([b"(", b"self", b"_", b"id"], "punctuation word punctuation word"),
        ([" été".encode(), "é".encode()[:1], "é".encode()[1:]], "word other other"),
        ([b""], "other"),
    ],
)  # fmt: skip
def test_classes_of_tokens(pieces: list[bytes], classes: str) -> None:
    assert [CLASSES[index] for index in token_classes(pieces)] == classes.split()
