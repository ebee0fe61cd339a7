"""The step is the state: what a step contains is a function of its number, exactly in size and ratio."""

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch_recipe import BatchRecipe
from data_pipeline.class_index import ClassIndex
from data_pipeline.class_ratio import ClassRatio
from data_pipeline.global_batch import BatchPlan
from data_pipeline.packing import SampleCost
from data_pipeline.records import LatentRecord
from foundation.errors import RecipeError
from models.layout import document_length, document_targets
from models.layout.tokens import TemplateLengths

TEMPLATE = TemplateLengths(3, 2, 3)
COST = SampleCost(per_token=1e6, per_pair=10.0)
GRIDS = {64: [(4, 4), (2, 8)], 128: [(8, 8), (4, 12)], 256: [(16, 16)]}


class FakeDataset:
    """Side indexes in memory; a record knows its key alone."""

    def __init__(self, samples: Mapping[int, int], longest_caption: int = 12, shard: int = 10):
        rng = np.random.default_rng(0)
        self.classes = {
            name: ClassIndex(
                resolution=name,
                grids=np.array(GRIDS[name]),
                shard_sizes=np.diff([*range(0, count, shard), count]),
                n_text=rng.integers(0, longest_caption + 1, count).astype(np.uint16),
                bucket=rng.integers(0, len(GRIDS[name]), count).astype(np.uint8),
                dropped=np.zeros(0, np.int64),
            )
            for name, count in samples.items()
        }

    def record(self, resolution: int, sample_id: int) -> LatentRecord:
        return LatentRecord(b"", 16, 16, "", 12, f"key-{resolution}-{sample_id}")


SAMPLES = {64: 35, 128: 50, 256: 21}


def make_plan(ranks: int = 1, samples: Mapping[int, int] = SAMPLES, **changes: object) -> BatchPlan:
    values: dict = {"global_batch_size": 16, "ratio": {64: 2, 128: 3, 256: 1}, "max_tokens": 700, "window": 3}
    recipe = BatchRecipe(**(values | {"image_to_caption": 0.25, "text_drop": 0.2, "seed": 5} | changes))
    return BatchPlan(recipe, FakeDataset(samples), 2, TEMPLATE, ranks, COST)


@given(
    weights=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    batch=st.integers(1, 40),
    step=st.integers(0, 10**7),
)
@settings(deadline=None)
def test_a_class_never_drifts_from_its_ratio_by_a_sample(weights: list[int], batch: int, step: int) -> None:
    ratio = ClassRatio(dict(enumerate(weights)))
    before = dict.fromkeys(ratio.classes, 0)
    for number in range(step, step + 25):
        counts = ratio.counts_before(number * batch)
        assert sum(counts.values()) == number * batch
        for name, count in counts.items():
            assert abs(count - Fraction(number * batch * weights[name], sum(weights))) < 1
            assert count >= before[name]
        before = counts


def test_ratios_that_mean_nothing_are_refused() -> None:
    for weights in ({}, {64: 0}, {64: -1, 128: 2}):
        with pytest.raises(ValueError, match="at least one of them positive"):
            ClassRatio(weights)
        with pytest.raises(pydantic.ValidationError, match="whole weights"):
            make_plan(ratio=weights)


def test_a_batch_has_exactly_its_size_and_the_published_ratio() -> None:
    plan = make_plan(global_batch_size=20, ratio={64: 2, 128: 7, 256: 1})
    for step in range(5):
        assert Counter(plan.step(step).resolution.tolist()) == {64: 4, 128: 14, 256: 2}


def test_every_sample_once_per_epoch_of_its_class() -> None:
    plan = make_plan()
    batches = [plan.step(step) for step in range(30)]
    for name, size in SAMPLES.items():
        ids = np.concatenate([batch.sample_id[batch.resolution == name] for batch in batches])
        positions = np.concatenate([batch.position[batch.resolution == name] for batch in batches])
        assert positions.tolist() == list(range(len(ids)))
        for epoch in range(len(ids) // size):
            assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(step=st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_a_step_alone_equals_the_step_reached_by_iterating(step: int) -> None:
    iterating, alone = make_plan(), make_plan()
    for number in range(step, step + 3):
        iterated = list(iterating.step(number))
    assert list(alone.step(step + 2)) == iterated


def test_what_is_in_a_step_does_not_depend_on_the_ranks() -> None:
    for step in (0, 7, 10**6):
        batches = [make_plan(ranks).step(step) for ranks in (1, 2, 4)]
        assert list(batches[0]) == list(batches[1]) == list(batches[2])


def test_a_seed_changes_order_and_cases() -> None:
    one, other = make_plan(seed=1).step(0), make_plan(seed=2).step(0)
    assert one.sample_id.tolist() != other.sample_id.tolist()


def test_lengths_and_targets_are_those_of_the_layout() -> None:
    plan = make_plan()
    cases = set()
    for step in range(20):
        batch = plan.step(step)
        for index, ref in enumerate(batch):
            cases.add((ref.task, ref.drop_text))
            n_text = max(
                ref.n_text, 1
            )  # a sample without caption is dropped, so its length does not count it
            assert ref.length == document_length(n_text, ref.h, ref.w, 2, ref.task, ref.drop_text, TEMPLATE)
            targets = document_targets(n_text, ref.h, ref.w, ref.task, ref.drop_text)
            assert (batch.vision_targets[index], batch.text_targets[index]) == targets
            assert (ref.n_text > 0) or (ref.task, ref.drop_text) == ("t2i", True)
            index_ = plan.dataset.classes[ref.resolution]
            assert ref.n_text == index_.n_text[ref.sample_id]
            assert [ref.h, ref.w] == index_.grids[index_.bucket[ref.sample_id]].tolist()
    assert cases == {("t2i", False), ("t2i", True), ("i2t", False)}


def test_shares_of_tasks_and_dropped_captions_are_the_recipes() -> None:
    plan = make_plan(global_batch_size=6000, max_tokens=10**6)
    batch = plan.step(3)
    captioned = batch.n_text > 0
    assert abs((batch.case[captioned] == 2).mean() - 0.25) < 0.03
    generated = captioned & (batch.case != 2)
    assert abs((batch.case[generated] == 1).mean() - 0.2) < 0.03
    # Keyed by position: a sample is not bound to the case that it had in the epoch before.
    again = {}
    for ref in batch:
        again.setdefault((ref.resolution, ref.sample_id), set()).add(ref.drop_text)
    assert any(len(cases) == 2 for cases in again.values())


def test_the_whole_step_is_cut_for_the_ranks() -> None:
    for ranks in (1, 2, 4):
        plan = make_plan(ranks)
        batch = plan.step(11)
        assignment = plan.assign(batch)
        packs = [pack for packs in assignment.packs for pack in packs]
        assert len(assignment.packs) == ranks
        assert sorted(np.concatenate(packs)) == list(range(16))
        assert max(batch.length[pack].sum() for pack in packs) <= 700


def test_samples_that_cannot_fit_are_refused_by_key_with_everything_else_that_is_wrong() -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(max_tokens=270, ratio={64: 1, 256: 1, 512: 1, 1024: 0})
    message = str(caught.value)
    assert (
        "key-256-" in message and "data.max_tokens = 270" in message and "more samples do not fit" in message
    )
    assert "data.ratio.512: the dataset has no samples of this class (it has 64, 128, 256)" in message
    assert "key-64-" not in message and "1024" not in message


def test_the_longest_case_of_a_sample_counts() -> None:
    longest = 16 * 16 + 3 + 4 + 8 + 12  # picture -> caption feeds the last patch and a longer template
    make_plan(ratio={256: 1}, max_tokens=longest)
    with pytest.raises(RecipeError, match="does not fit"):
        make_plan(ratio={256: 1}, max_tokens=longest - 1)
    make_plan(ratio={256: 1}, max_tokens=longest - 1, image_to_caption=0.0)


@pytest.mark.parametrize(("batch", "ranks"), [(3, 4), (10, 4)])
def test_a_batch_that_no_packing_can_hold_is_refused(batch: int, ranks: int) -> None:
    with pytest.raises(
        RecipeError, match=rf"data\.global_batch_size: .*equally many for each of {ranks} ranks"
    ):
        make_plan(ranks, global_batch_size=batch, ratio={256: 1}, max_tokens=300)


def test_grids_that_patches_do_not_tile_are_refused() -> None:
    with pytest.raises(RecipeError, match="class 128: a grid of 4x12 tokens can't be cut into 8x8"):
        BatchPlan(make_plan().recipe, FakeDataset(SAMPLES), 8, TEMPLATE, 1, COST)


def test_an_empty_class_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.ratio\.64: the dataset has no samples"):
        make_plan(samples={64: 0, 128: 10, 256: 5})
