"""Packing: a partition, under the limit, equally many packs on each rank, level, and the same for
everybody."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import Assignment, SampleCost, assign

COST = SampleCost(per_token=28e9, per_vision_target=3e9, per_text_target=1.5e9, per_pair=0.8e6)


def costs_of(lengths: np.ndarray) -> np.ndarray:
    return COST.of(lengths, lengths * 9 // 10, lengths // 10)


def check(
    assignment: Assignment, lengths: np.ndarray, costs: np.ndarray, ranks: int, max_tokens: int
) -> None:
    """The properties that every assignment has."""
    assert len(assignment.packs) == ranks
    assert {len(packs) for packs in assignment.packs} == {assignment.micro_steps}
    flat = [pack for packs in assignment.packs for pack in packs]
    assert sorted(np.concatenate(flat)) == list(range(len(lengths)))
    assert all(len(pack) and lengths[pack].sum() <= max_tokens for pack in flat)
    assert assignment.tokens.ravel().tolist() == [lengths[pack].sum() for pack in flat]
    assert assignment.costs.ravel().tolist() == [costs[pack].sum() for pack in flat]


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60).map(np.array),
    ranks=st.integers(1, 8),
    max_tokens=st.integers(100, 400),
)
@settings(deadline=None)
def test_an_assignment_is_a_partition_under_the_limit(
    lengths: np.ndarray, ranks: int, max_tokens: int
) -> None:
    costs = costs_of(lengths)
    if len(lengths) < ranks:
        with pytest.raises(ValueError, match="raise max_tokens"):
            assign(lengths, costs, ranks, max_tokens)
        return
    if len(lengths) % ranks:  # then nothing promises that the packs come out equally many for each rank
        lengths = lengths // 2 + 1
    assignment = assign(lengths, costs, ranks, max_tokens)
    check(assignment, lengths, costs, ranks, max_tokens)
    again = assign(lengths.copy(), costs.copy(), ranks, max_tokens)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(itertools.chain(*assignment.packs), itertools.chain(*again.packs), strict=True)
    )


@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6).map(np.array),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(5, 20),
)
@settings(deadline=None, max_examples=60)
def test_what_is_refused_is_impossible(lengths: np.ndarray, ranks: int, max_tokens: int) -> None:
    def possible(packs: int) -> bool:
        return any(
            len(set(choice)) == packs
            and np.bincount(choice, weights=lengths, minlength=packs).max() <= max_tokens
            for choice in itertools.product(range(packs), repeat=len(lengths))
        )

    try:
        check(assign(lengths, lengths, ranks, max_tokens), lengths, lengths, ranks, max_tokens)
    except ValueError:  # more packs are never harder to fill, so the largest number of them decides
        assert len(lengths) < ranks or not possible(len(lengths) // ranks * ranks)


@given(lengths=st.lists(st.integers(1, 50), min_size=3, max_size=8).map(np.array), ranks=st.integers(2, 3))
@settings(deadline=None, max_examples=40)
def test_the_heaviest_pack_is_close_to_the_best_possible(lengths: np.ndarray, ranks: int) -> None:
    costs = lengths * 10
    found = assign(lengths, costs, ranks, max_tokens=1000).costs
    assert found.shape == (ranks, 1)
    best = min(
        np.bincount(choice, weights=costs, minlength=ranks).max()
        for choice in itertools.product(range(ranks), repeat=len(lengths))
    )
    assert found.max() <= best * 4 / 3  # LPT's own bound; exchanges only lower it


def test_samples_that_hardly_share_a_pack_are_still_cut_evenly() -> None:
    lengths = np.array([90, 90, 90, 40, 60])
    assignment = assign(lengths, lengths, ranks=2, max_tokens=100)  # one way only: 40 and 60 together
    check(assignment, lengths, lengths, 2, 100)
    with pytest.raises(ValueError, match="equally many for each of 2 ranks"):
        assign(np.array([90, 90, 90, 40, 61]), lengths, ranks=2, max_tokens=100)


def test_the_limit_holds_where_balancing_costs_alone_would_break_it() -> None:
    lengths = np.array([60, 60, 20, 20, 20, 20])
    costs = np.array([10, 10, 400, 400, 10, 10])  # even costs would put what is long together
    assignment = assign(lengths, costs, ranks=2, max_tokens=100)
    check(assignment, lengths, costs, 2, 100)
    assert assignment.imbalance == 1.0 and assignment.utilization == 1.0


def test_packs_of_one_micro_step_are_neighbours_in_cost() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 300)
    costs = assign(lengths, costs_of(lengths), ranks=4, max_tokens=1200).costs
    assert (costs[:, :-1].min(axis=0) >= costs[:, 1:].max(axis=0)).all()


@pytest.mark.parametrize(("ranks", "micro_steps"), [(64, 3), (512, 1)])
@pytest.mark.parametrize("mix", [{256: 512, 512: 1792, 1024: 256}, {512: 1240, 1024: 1240}])
def test_realistic_batches_are_level(mix: dict[int, int], ranks: int, micro_steps: int) -> None:
    rng = np.random.default_rng(7)
    areas = {256: [240, 256], 512: [960, 960, 1024], 1024: [3840, 4032, 4096]}
    lengths = np.concatenate(
        [rng.choice(areas[name], count) + 20 + rng.integers(8, 90, count) for name, count in mix.items()]
    )
    costs = costs_of(lengths)
    max_tokens = int(lengths.sum() / (ranks * micro_steps) / 0.975) + 1
    assignment = assign(lengths, costs, ranks, max_tokens)
    check(assignment, lengths, costs, ranks, max_tokens)
    assert assignment.micro_steps == micro_steps and assignment.utilization > 0.97
    assert assignment.imbalance < 1.03


def test_costs_count_tokens_targets_and_pairs() -> None:
    cost = SampleCost(per_token=2.0, per_vision_target=1.0, per_text_target=3.0, per_pair=0.5)
    found = cost.of(np.array([10, 0]), np.array([4, 0]), np.array([2, 0]))
    assert found.tolist() == [(20 + 4 + 6 + 0.5 * 55) * 500, 1]
