"""Every score on small attention solved on paper, and what all of them promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnviz.catalog import load, names
from bnviz.errors import NotCaptured, SchemaError, UnknownName
from bnviz.scores import Statistics, keep_order, over_group, score

INF = np.inf


def uniform_causal(keys: int, heads: int = 2) -> np.ndarray:
    """(head, query, key): every query attends evenly to what it sees."""
    rows = np.tril(np.ones((keys, keys))) / np.arange(1, keys + 1)[:, None]
    return np.repeat(rows[None], heads, axis=0)


def statistics(weights: np.ndarray, kv_heads: int = 1, window: int = 2, **more: object) -> Statistics:
    heads, _, keys = weights.shape
    ones = np.ones((kv_heads, keys))
    inside = (np.arange(keys) >= 4) & (np.arange(keys) < 4 + (keys - 4) // 4 * 4 - 4)
    return Statistics(
        mass=weights.sum(1),
        window_mass=weights[:, -window:].sum(1),
        recent_mass=weights.sum(1),
        recent_pivotal=(weights > 1 / np.arange(1, keys + 1)[:, None]).sum(1).astype(float),
        noisy_mass=weights.sum(1),
        expected_logit=weights.sum(1),
        ranged_mass=(weights * np.arange(keys)[:, None])[:, -window:].sum(1),
        last_row=weights[:, -1],
        seen=np.arange(keys, 0, -1.0),
        key_norm=ones,
        value_norm=ones,
        value_norm_l1=ones,
        key_cosine=ones,
        lag_key=np.where(inside, ones, np.nan),
        lag_value=np.where(inside, ones, np.nan),
        options={"lag": 4, "history": keys},
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        **more,  # type: ignore[arg-type]
    )


def test_h2o_of_uniform_heads_is_a_harmonic_tail() -> None:
    scores = load("scores", "h2o")(statistics(uniform_causal(4)), recent=0.25)
    assert scores[0, :3] == pytest.approx([1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4])
    assert scores[0, 3] == INF


def test_h2o_of_a_sink_puts_all_mass_on_it() -> None:
    sink = np.zeros((1, 5, 5))
    sink[:, :, 0] = 1
    assert load("scores", "h2o")(statistics(sink), recent=0.0).tolist() == [[5, 0, 0, 0, 0]]


def test_h2o_recent_share_is_a_whole_number_of_keys() -> None:
    scores = load("scores", "h2o")(statistics(uniform_causal(30)))
    assert np.isinf(scores[0]).sum() == 3  # 0.1 x 30, although the product is 3.0000000000000004


@pytest.mark.parametrize("recent", [-0.1, 1.5])
def test_h2o_refuses_a_recent_share_that_is_none(recent: float) -> None:
    with pytest.raises(SchemaError, match="expected a share of the keys"):
        load("scores", "h2o")(statistics(uniform_causal(4)), recent=recent)


def test_snapkv_pools_with_zeros_beyond_the_ends_and_a_fixed_divisor() -> None:
    window_mass = np.array([[2.0, 0.0, 4.0, 0.0, 0.0, 9.0, 9.0]])
    given_ = Statistics(window_mass=window_mass, keys=7, heads=1, kv_heads=1, window=2)
    # weights 1 0 2 0 0 before the window of 2; a box of 3
    expected = [[1 / 3, 1.0, 2 / 3, 2 / 3, 0.0, INF, INF]]
    assert load("scores", "snapkv")(given_, kernel=3) == pytest.approx(np.array(expected))


def test_snapkv_is_the_mean_weight_and_its_group_sum_is_twice_its_mean() -> None:
    given_ = statistics(uniform_causal(6, heads=2))
    mean = load("scores", "snapkv")(given_, kernel=1)
    assert mean[0, :4] == pytest.approx([(1 / 5 + 1 / 6) / 2] * 4)
    assert load("scores", "snapkv")(given_, kernel=1, aggregate="sum")[0, :4] == pytest.approx(2 * mean[0, :4])


def test_snapkv_refuses_a_prompt_that_is_not_longer_than_its_window() -> None:
    with pytest.raises(SchemaError, match=r"4 keys and the observation window 4 queries.*longer prompt"):
        load("scores", "snapkv")(statistics(uniform_causal(4), window=4))


@pytest.mark.parametrize("kernel", [0, 4])
def test_snapkv_refuses_a_kernel_without_a_middle(kernel: int) -> None:
    with pytest.raises(SchemaError, match="expected an odd number"):
        load("scores", "snapkv")(statistics(uniform_causal(6)), kernel=kernel)


def test_tova_is_the_last_row_over_all_heads_and_the_same_for_each_kv_head() -> None:
    weights = uniform_causal(3, heads=4)
    weights[0, -1] = [0.9, 0.1, 0.0]
    scores = load("scores", "tova")(statistics(weights, kv_heads=2))
    expected = (np.array([0.9, 0.1, 0.0]) + 3 * np.full(3, 1 / 3)) / 4
    assert scores == pytest.approx(np.stack([expected, expected]))


def test_key_norm_keeps_small_keys() -> None:
    scores = load("scores", "key_norm")(Statistics(key_norm=np.array([[3.0, 1.0, 2.0]]), keys=3, heads=1, kv_heads=1))
    assert keep_order(scores).tolist() == [[2, 0, 1]]


def test_streaming_llm_keeps_sinks_then_the_most_recent() -> None:
    scores = load("scores", "streaming_llm")(Statistics(keys=8, heads=1, kv_heads=1))
    kept = np.flatnonzero(keep_order(scores)[0] < 6)
    assert kept.tolist() == [0, 1, 2, 3, 6, 7]
    with pytest.raises(SchemaError, match="sinks is -1"):
        load("scores", "streaming_llm")(Statistics(keys=8, heads=1, kv_heads=1), sinks=-1)


def test_random_is_reproducible_and_differs_between_layers_heads_and_seeds() -> None:
    random, one = load("scores", "random"), Statistics(keys=50, heads=2, kv_heads=2)
    before = np.random.get_state()[1].copy()
    first = random(one)
    assert (first == random(one)).all()
    assert (np.random.get_state()[1] == before).all()
    assert (first[0] != first[1]).any()
    assert (first != random(one, seed=1)).any()
    assert (first != random(Statistics(keys=50, heads=2, kv_heads=2, layer=1))).any()


@pytest.mark.parametrize(("name", "needs"), [(n, load("scores", n).spec.needs) for n in names("scores")])
def test_a_score_says_what_it_needs_and_how_to_get_it(name: str, needs: tuple[str, ...]) -> None:
    bare = Statistics(keys=6, heads=2, kv_heads=1, window=2)
    if not needs:
        assert load("scores", name)(bare).shape == (1, 6)
        return
    with pytest.raises(
        NotCaptured,
        match=f"{name}.*needs '{needs[0].partition('.')[2]}'.*add \"({needs[0].partition('.')[0]})\" to probes=",
    ):
        load("scores", name)(bare)


@pytest.mark.parametrize("name", names("scores"))
def test_every_score_gives_a_number_or_forced_for_each_key_of_each_kv_head(name: str) -> None:
    scores = load("scores", name)(statistics(uniform_causal(12, heads=4), kv_heads=2))
    assert scores.shape == (2, 12)
    assert not np.isnan(scores).any() and not np.isneginf(scores).any()
    assert load("scores", name).spec.paper


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova"])
def test_the_order_of_the_query_heads_of_a_group_does_not_matter(name: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(9), size=(4, 9))
    swapped = weights[[1, 0, 3, 2]]
    one, two = (load("scores", name)(statistics(w, kv_heads=2)) for w in (weights, swapped))
    assert one == pytest.approx(two)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, INF]), min_size=1, max_size=30))
def test_keep_order_is_a_permutation_that_never_prefers_a_smaller_score(values: list[float]) -> None:
    scores = np.array([values])
    rank = keep_order(scores)[0]
    assert sorted(rank.tolist()) == list(range(len(values)))
    for a in range(len(values)):
        for b in range(a):
            if values[a] >= values[b]:  # a is the later: it wins ties
                assert rank[a] < rank[b]


def test_over_group_takes_mean_max_and_sum_and_names_the_choices() -> None:
    values = np.array([[1.0, 5.0], [3.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    assert over_group(values, 2, "mean").tolist() == [[2, 3], [1, 1]]
    assert over_group(values, 2, "max").tolist() == [[3, 5], [2, 2]]
    assert over_group(values, 2, "sum").tolist() == [[4, 6], [2, 2]]
    with pytest.raises(UnknownName, match=r"Unknown aggregate 'median'.*Valid: max, mean, sum"):
        over_group(values, 2, "median")


def test_observed_attention_is_h2os_sum_over_the_queries_that_see_a_key() -> None:
    found = load("scores", "observed_attention")(statistics(uniform_causal(4)))
    sums = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    assert found[0] == pytest.approx([m / n for m, n in zip(sums, (4, 3, 2, 1), strict=True)])
    unseen = Statistics(mass=np.zeros((1, 2)), seen=np.array([0.0, 1.0]), keys=2, heads=1, kv_heads=1)
    assert load("scores", "observed_attention")(unseen).tolist() == [[0, 0]]


def test_scissorhands_counts_pivotal_rows_and_keeps_the_last_keys() -> None:
    given_ = Statistics(recent_pivotal=np.array([[3.0, 0, 1, 2], [1, 2, 1, 0]]), keys=4, heads=2, kv_heads=1)
    assert load("scores", "scissorhands")(given_, recent=1).tolist() == [[2, 1, 1, INF]]
    with pytest.raises(SchemaError, match=r"4 keys and the last 4 always stay"):
        load("scores", "scissorhands")(given_, recent=4)
    with pytest.raises(SchemaError, match=r"recent is 0.5, expected a whole number of tokens"):
        load("scores", "scissorhands")(given_, recent=0.5)


def test_keyformer_ranks_by_noisy_mass_and_keeps_the_recent_share() -> None:
    given_ = Statistics(noisy_mass=np.array([[3.0, 0, 1, 2], [1, 2, 1, 0]]), keys=4, heads=2, kv_heads=1)
    keyformer = load("scores", "keyformer")
    assert keyformer(given_, recent=0.25).tolist() == [[2, 1, 1, INF]]
    assert keyformer(given_, recent=0.5, aggregate="max").tolist() == [[3, 2, INF, INF]]
    assert keyformer(given_).tolist() == [[2, 1, 1, 1]]  # int(0.1 x 4) keys
    with pytest.raises(SchemaError, match=r"keyformer: recent is 1.5, expected a share of the keys"):
        keyformer(given_, recent=1.5)


def test_finch_weights_rows_by_their_position_and_keeps_its_window() -> None:
    weights = uniform_causal(4, heads=1)  # rows 2 and 3 are a third of three keys and a quarter of four
    found = load("scores", "finch")(statistics(weights))
    assert found == pytest.approx(np.array([[(2 / 3 + 3 / 4) / 2, (2 / 3 + 3 / 4) / 2, INF, INF]]))
    with pytest.raises(SchemaError, match=r"finch: the sequence has 4 keys and the observation window 4 queries"):
        load("scores", "finch")(statistics(weights, window=4))


def test_vatp_multiplies_by_the_value_and_forces_the_sinks() -> None:
    given_ = Statistics(
        mass=np.array([[4.0, 1.0, 1.0]]),
        recent_mass=np.array([[1.0, 1.0, 0.0]]),
        value_norm_l1=np.array([[0.1, 1.0, 3.0]]),
        options={"history": 2},
        keys=3,
        heads=1,
        kv_heads=1,
    )
    vatp = load("scores", "vatp")
    assert vatp(given_, sinks=1) == pytest.approx(np.array([[INF, 1, 3]]))
    assert vatp(given_, sinks=0, of="scissorhands") == pytest.approx(np.array([[0.05, 0.5, 0]]))
    with pytest.raises(UnknownName, match="Unknown form of vatp 'h20'; did you mean 'h2o'"):
        vatp(given_, of="h20")


def test_cur_takes_shares_of_windows_of_which_the_last_may_be_short() -> None:
    key, value = np.array([[1.0, 2.0, 1.0]]), np.array([[1.0, 1.0, 5.0]])
    given_ = Statistics(key_norm=key, value_norm=value, keys=3, heads=1, kv_heads=1)
    product = np.array([1 / 5 * 1 / 2, 4 / 5 * 1 / 2, 1.0])
    assert load("scores", "cur")(given_, window=2, sinks=0)[0] == pytest.approx(product / product.sum())
    nothing = Statistics(key_norm=key * 0, value_norm=value, keys=3, heads=1, kv_heads=1)
    assert load("scores", "cur")(nothing, sinks=0).tolist() == [[0, 0, 0]]


def test_lagkv_ranks_within_each_block_and_keeps_what_has_no_next_one() -> None:
    nan = np.nan
    key = np.array([[nan, 0.3, 0.1, 0.2, 5.0, 4.0, 6.0, nan, nan, nan, nan]])
    given_ = Statistics(lag_key=key, lag_value=key, options={"lag": 3}, keys=11, heads=1, kv_heads=1)
    expected = [INF, 2 / 3, 0, 1 / 3, 1 / 3, 0, 2 / 3, INF, INF, INF, INF]
    assert load("scores", "lagkv")(given_)[0] == pytest.approx(expected)
    short = Statistics(lag_key=key * nan, lag_value=key * nan, options={"lag": 3}, keys=11, heads=1, kv_heads=1)
    with pytest.raises(SchemaError, match="11 keys, fewer than its sinks and two blocks of 3"):
        load("scores", "lagkv")(short)


def test_value_norm_may_be_of_the_value_or_of_what_the_projection_makes_of_it() -> None:
    given_ = Statistics(
        value_norm=np.array([[2.0, 1.0]]),
        value_norm_l1=np.array([[3.0, 1.0]]),
        value_norm_projected=np.array([[1.0, 2.0], [3.0, 4.0]]),
        keys=2,
        heads=2,
        kv_heads=1,
    )
    found = {norm: load("scores", "value_norm")(given_, norm=norm).tolist() for norm in ("l2", "l1", "projected")}
    assert found == {"l2": [[2, 1]], "l1": [[3, 1]], "projected": [[2, 3]]}
    with pytest.raises(UnknownName, match=r"Unknown norm of value_norm 'l3'.*Valid: l1, l2, projected"):
        load("scores", "value_norm")(given_, norm="l3")


def test_scores_refuse_shapes_and_groups_that_do_not_fit() -> None:
    with pytest.raises(SchemaError, match=r"mass has shape \(2, 3\), expected \(2, 4\)"):
        load("scores", "h2o")(Statistics(mass=np.ones((2, 3)), keys=4, heads=2, kv_heads=1))
    with pytest.raises(SchemaError, match=r"key_norm has shape \(2, 4\), expected \(1, 4\)"):
        load("scores", "key_norm")(Statistics(key_norm=np.ones((2, 4)), keys=4, heads=2, kv_heads=1))
    with pytest.raises(SchemaError, match="3 query heads cannot share 2"):
        Statistics(keys=4, heads=3, kv_heads=2)


def test_a_statistic_of_which_nothing_was_captured_is_as_one_that_is_absent() -> None:
    with pytest.raises(NotCaptured, match="needs 'mass'"):
        load("scores", "h2o")(Statistics(mass=np.full((1, 3), np.nan), keys=3, heads=1, kv_heads=1))


@pytest.mark.parametrize("name", names("scores"))
def test_what_a_score_needs_is_a_variable_of_a_probe(name: str) -> None:
    for need in load("scores", name).spec.needs:
        record, _, variable = need.partition(".")
        assert variable in {one.name for one in load("probes", record).spec.variables}


def test_a_score_declares_records_and_variables() -> None:
    with pytest.raises(SchemaError, match=r"A score needs 'mass'; expected \"record.variable\""):
        score(needs=("mass",), paper="none")
