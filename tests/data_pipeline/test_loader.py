"""The loader: a rank's part of any step, with counts of the whole step, however the step was reached."""

import dataclasses
import time

import pytest
import torch
from latent_folder import CHANNELS, encode_caption, write_latent_folder

from data_pipeline.batch_recipe import BatchRecipe
from data_pipeline.global_batch import BatchPlan
from data_pipeline.latents import LatentDataset
from data_pipeline.loader import StepBatch, StepLoader
from data_pipeline.packing import SampleCost
from foundation.errors import DataError
from models.head import HeadConfig
from models.layout import PackedBatch, SequenceTokens

P_SIDE = 2
TOKENS = SequenceTokens(
    1, 2, 3, 4, {k: 20 + k for k in range(1, 33)}, query=(5, 6, 7), user_prefix=(1, 8, 9), turn_end=(2, 9),
    assistant=(1, 10, 9),
)  # fmt: skip
HEAD = HeadConfig(ch_target=CHANNELS, ch_cond=16, ch_latent=128, depth_latent=2, parallel_num=P_SIDE**2)
RECIPE = BatchRecipe(
    global_batch_size=12, ratio={64: 1, 128: 2}, max_tokens=220, seed=3, window=2, image_to_caption=0.3
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("latents")
    return LatentDataset(str(write_latent_folder(folder, {64: 20, 128: 37}, dropped={128: [1, 2]})))


def loader(dataset: LatentDataset, rank: int = 0, ranks: int = 1, **changes: object) -> StepLoader:
    plan = BatchPlan(
        RECIPE.model_copy(update=changes), dataset, P_SIDE, TOKENS.template, ranks, SampleCost(1e6)
    )
    return StepLoader(plan, encode_caption, TOKENS, HEAD, rank)


def same_tensors(one: PackedBatch, other: PackedBatch) -> bool:
    names = [field.name for field in dataclasses.fields(PackedBatch) if field.name != "keys"]
    return one.keys == other.keys and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def by_key(batch: StepBatch) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the model is given of each sample, wherever it was packed."""
    found = {}
    for pack in batch.micro_batches:
        for number, key in enumerate(pack.keys):
            patches = pack.patch_sample == number
            text = pack.text_labels[pack.text_sample == number]
            found[key] = (pack.target_bits[patches], pack.t[patches], pack.noise[patches], text)
    return found


def test_counts_are_those_of_all_ranks_packs(dataset: LatentDataset) -> None:
    for ranks in (1, 2, 3):
        steps = []
        for rank in range(ranks):
            with loader(dataset, rank, ranks) as one:
                steps.append(one.step(4))
        assert len({len(step.micro_batches) for step in steps}) == 1
        packs = [(pack, res) for s in steps for pack, res in zip(s.micro_batches, s.resolutions, strict=True)]
        counts = steps[0].counts
        assert all(step.counts == counts for step in steps)
        assert counts.samples == 12 == sum(len(pack.keys) for pack, _ in packs)
        assert counts.tokens == sum(len(pack.input_ids) for pack, _ in packs)
        assert counts.text_targets == sum(len(pack.text_at) for pack, _ in packs)
        assert counts.vision_targets == sum(len(pack.predict_at) for pack, _ in packs)
        for name, count in counts.vision_targets_by_resolution.items():
            patches = sum(int((res[pack.patch_sample] == name).sum()) for pack, res in packs)
            assert count == patches * P_SIDE**2
        assert max(len(pack.input_ids) for pack, _ in packs) <= RECIPE.max_tokens


def test_the_union_over_ranks_is_the_same_for_any_number_of_ranks(dataset: LatentDataset) -> None:
    unions = []
    for ranks in (1, 2, 4):
        union: dict[str, tuple[torch.Tensor, ...]] = {}
        for rank in range(ranks):
            with loader(dataset, rank, ranks) as one:
                union |= by_key(one.step(2))
        unions.append(union)
    assert all(union.keys() == unions[0].keys() for union in unions)
    for union in unions[1:]:
        for key, tensors in union.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, unions[0][key], strict=True))


def test_a_step_is_the_same_by_iterating_by_jumping_and_again(dataset: LatentDataset) -> None:
    with loader(dataset) as iterating, loader(dataset) as jumping:
        iterated = [batch for _, batch in zip(range(7), iterating.steps(), strict=False)]
        for number in (6, 0, 3, 3, 5, 1):
            jumped = jumping.step(number)
            assert jumped.step == number and jumped.counts == iterated[number].counts
            assert jumped.names == iterated[number].names
            assert all(map(same_tensors, jumped.micro_batches, iterated[number].micro_batches))
        assert jumping.step(10**12).counts.samples == 12


def test_names_and_resolutions_tell_which_sample_is_where(dataset: LatentDataset) -> None:
    with loader(dataset) as one:
        batch = one.step(0)
    for pack, names, resolutions in zip(batch.micro_batches, batch.names, batch.resolutions, strict=True):
        for key, name, resolution in zip(pack.keys, names, resolutions.tolist(), strict=True):
            class_name, sample_id = name.split("/")
            assert int(class_name) == resolution
            assert dataset.record(resolution, int(sample_id)).key == key


def test_captions_of_another_tokenizer_are_refused_by_key(dataset: LatentDataset) -> None:
    plan = BatchPlan(RECIPE, dataset, P_SIDE, TOKENS.template, 1, SampleCost(1e6))
    with (
        StepLoader(plan, lambda caption: [*encode_caption(caption), 0], TOKENS, HEAD, 0) as one,
        pytest.raises(DataError, match=r"the sample '\d+-\d+' .*text tokenizer"),
    ):
        one.step(0)


def test_latents_of_another_width_are_refused_by_key(dataset: LatentDataset) -> None:
    plan = BatchPlan(RECIPE, dataset, P_SIDE, TOKENS.template, 1, SampleCost(1e6))
    wider = dataclasses.replace(HEAD, ch_target=32)
    with (
        StepLoader(plan, encode_caption, TOKENS, wider, 0) as one,
        pytest.raises(DataError, match=r"the sample '\d+-\d+' .*tokens of 32 bits"),
    ):
        one.step(0)


def test_prefetched_steps_are_ready_before_they_are_asked_for(dataset: LatentDataset) -> None:
    reads = []

    class Watched:
        classes = dataset.classes

        def record(self, resolution: int, sample_id: int):  # type: ignore[no-untyped-def]
            reads.append((resolution, sample_id))
            return dataset.record(resolution, sample_id)

    plan = BatchPlan(RECIPE, Watched(), P_SIDE, TOKENS.template, 1, SampleCost(1e6))
    expected = {(ref.resolution, ref.sample_id) for number in (5, 6, 7) for ref in plan.step(number)}
    with StepLoader(plan, encode_caption, TOKENS, HEAD, 0, prefetch=2, threads=1) as one:
        one.step(5)
        deadline = time.monotonic() + 60
        while set(reads) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(reads) == expected
