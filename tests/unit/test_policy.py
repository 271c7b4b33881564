"""When to cut: each rule at its edge, and never without writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcdp.errors import UsageError
from pgcdp.intervals.policy import (
    DEFAULT_CUT,
    RATE_LONGEST,
    RATE_SHORTEST,
    Decision,
    Policy,
    Progress,
    decide,
    parse_policy,
    rate_period,
    smooth_rate,
)

policies = st.builds(
    Policy,
    st.booleans(),
    st.none() | st.floats(1, 1000),
    st.none() | st.integers(1, 10**9),
    st.none() | st.floats(1, 10**8),
)
progresses = st.builds(
    Progress,
    st.floats(0, 10**5),
    st.integers(0, 10**6),
    st.integers(0, 10**10),
    st.floats(0, 10**9),
    st.booleans(),
    st.booleans(),
)


def test_default_words() -> None:
    assert parse_policy(DEFAULT_CUT) == Policy(True, 300.0, 1 << 30, None)


@pytest.mark.parametrize(
    ("word", "policy"),
    [
        ("30s", Policy(period_seconds=30.0)),
        ("1GiB", Policy(quantity_bytes=1 << 30)),
        ("64M", Policy(quantity_bytes=64 << 20)),
        ("rate", Policy(rate_bytes_per_second=1048576.0)),
        ("rate:4M", Policy(rate_bytes_per_second=4194304.0)),
        ("rate:4M/s", Policy(rate_bytes_per_second=4194304.0)),
    ],
)
def test_words(word: str, policy: Policy) -> None:
    assert parse_policy([word]) == policy


@pytest.mark.parametrize("words", [[], ["soon"], ["5min", "1h"], ["0s"], ["0"], ["rate:"], ["rate:0"], ["checkpoints"]])
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_policy(words)


@given(policies, progresses)
def test_without_writes_or_while_a_checkpoint_is_asked_nothing_happens(policy: Policy, progress: Progress) -> None:
    decision = decide(policy, progress)
    if not progress.writes or progress.checkpoint_asked:
        assert decision == Decision("wait")
    assert (decision.action == "wait") == (decision.reason is None)
    assert (decision.action == "cut") == (decision.reason == "checkpoint")


def test_each_rule_at_its_edge() -> None:
    policy = parse_policy(["checkpoint", "5min", "1M", "rate"])
    assert decide(policy, Progress(299.9, 1, 1048575)).action == "wait"
    assert decide(policy, Progress(300.0, 1, 0)) == Decision("ask", "period")
    assert decide(policy, Progress(1.0, 1, 1048576)) == Decision("ask", "quantity")
    assert decide(policy, Progress(1.0, 1, 0, checkpoint_seen=True)) == Decision("cut", "checkpoint")
    assert decide(Policy(period_seconds=1.0), Progress(0.5, 1, 0, checkpoint_seen=True)).action == "wait"
    assert decide(policy, Progress(30.0, 1, 0, rate=10 * 1048576.0)) == Decision("ask", "rate")
    assert decide(policy, Progress(29.9, 1, 0, rate=10 * 1048576.0)).action == "wait"


@given(st.floats(1, 10**9), st.floats(1, 10**9))
def test_busier_is_cut_more_often(rate: float, more: float) -> None:
    slow, fast = rate_period(1048576.0, rate), rate_period(1048576.0, rate + more)
    assert RATE_SHORTEST <= fast <= slow <= RATE_LONGEST


def test_recent_rate_forgets() -> None:
    rate = 0.0
    for _ in range(300):
        rate = smooth_rate(rate, 1000, 1.0)
    assert rate == pytest.approx(1000, rel=0.01)
    assert smooth_rate(rate, 0, 30.0) == pytest.approx(rate / 2)
    assert smooth_rate(rate, 5, 0.0) == rate
