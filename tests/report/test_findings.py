"""Ranking and words of findings."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from bnviz.findings import LARGE, amount, place, rank, saving_words, share_of
from bnviz.schema import SEVERITIES, Finding, Saving, Severity

savings = st.none() | st.builds(
    Saving, st.floats(0, 1e12), st.sampled_from(["B", "s", "FLOP", "%"]), st.floats(0, 1), st.just("computed")
)
findings = st.builds(
    Finding,
    code=st.text("abc", min_size=1),
    sentence=st.just("x"),
    severity=st.sampled_from(SEVERITIES),
    saving=savings,
)


@given(st.lists(findings, max_size=12))
def test_rank_is_by_large_share_then_severity_then_share_then_estimated_first(some: list[Finding]) -> None:
    ranked = rank(some)
    assert sorted(map(id, ranked)) == sorted(map(id, some))
    for a, b in pairwise(ranked):
        if max(share_of(a), share_of(b)) >= LARGE:
            assert share_of(a) >= share_of(b)
        elif a.severity == b.severity:
            assert share_of(a) >= share_of(b)
            assert share_of(a) > share_of(b) or a.saving is not None or b.saving is None
        else:
            assert SEVERITIES.index(a.severity) < SEVERITIES.index(b.severity)


def test_severity_is_not_drowned_by_small_savings() -> None:
    def saves(severity: Severity, share: float) -> Finding:
        return Finding("a/b", f"{severity} {share}", severity, saving=Saving(1, "B", share, "computed"))

    grave, small, large = Finding("a/b", "grave", "high"), saves("low", 0.049), saves("low", 0.05)
    middle, least = saves("medium", 0.0), saves("note", 0.01)
    ranked = rank([small, least, grave, middle, large])
    assert [one.sentence for one in ranked] == [one.sentence for one in (large, grave, middle, small, least)]


@given(st.lists(findings, max_size=6))
def test_equals_keep_their_order(some: list[Finding]) -> None:
    twice = rank([*some, *some])
    for finding in {id(f): f for f in some}.values():
        assert sum(f is finding for f in twice) == 2 * sum(f is finding for f in some)


def test_a_share_that_is_no_number_ranks_as_none() -> None:
    broken = Finding("a/b", "x", "high", saving=Saving(1, "B", float("nan"), "computed"))
    assert share_of(broken) == 0.0
    assert share_of(Finding("a/b", "x", "high", saving=Saving(1, "B", 1.7, "computed"))) == 1.0


def test_places() -> None:
    assert place({}) == ""
    assert place({"path": "model.lm_head"}) == "model.lm_head"
    assert place({"layer": 2, "kv_head": 1}) == "layer 2, KV head 1"
    assert place({"layer": [3]}) == "layer 3"
    assert place({"layer": 1, "expert": [4, 7, 8, 9, 10]}) == "layer 1, experts 4, 7, 8 and 2 more"
    assert place({"layer": [0, 1], "head": [5, 6], "path": ["a", "b"]}) == "layer 0 head 5; layer 1 head 6"
    assert place({"unknown": 1, "layer": 0}) == "layer 0"


def test_savings_in_words() -> None:
    assert amount(Saving(3.0, "s", 0.5, "measured")) == "3.00 s"
    assert amount(Saving(2e9, "FLOP", 0.5, "computed")) == "2.00 GFLOP"
    assert saving_words(Finding("a/b", "x", "low", saving=Saving(12.0, "%", 0.12, "measured"))) == "saves 12 %"
    assert saving_words(Finding("a/b", "x", "low")) == "saving not estimated"
