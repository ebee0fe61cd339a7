"""Class-conditional models: against a plain version, order of draws, the cache, sizes, what they refuse."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_models import hidden_states
from torch import Tensor, nn

from models.class_conditional import (
    CLASS_CONDITIONAL_PRESETS,
    ClassConditionalConfig,
    ClassConditionalModel,
    guidance_at,
    sample,
)
from models.class_conditional.order import from_sequence_order, to_sequence_order
from models.tokenizer import binarize

TINY = ClassConditionalConfig(
    dim=32,
    n_layer=2,
    n_head=2,
    diff_layers=2,
    diff_dim=64,
    diff_adanln_layers=1,
    latent_dim=8,
    resolution=64,
    diff_batch_mul=2,
    cls_token_num=3,
    num_classes=5,
    parallel_num=4,
)
KINDS = {
    "1x": replace(TINY, parallel_num=1),
    "4x": TINY,
    "16x": replace(TINY, parallel_num=16),
    "token_raster": replace(TINY, parallel_mode="standard"),
    "full_mask_off": replace(TINY, mask="causal"),
}
ALL_KINDS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def random_model(config: ClassConditionalConfig) -> ClassConditionalModel:
    torch.manual_seed(0)
    model = ClassConditionalModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pictures(config: ClassConditionalConfig, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, config.latent_dim, config.grid, config.grid)
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0


def places(config: ClassConditionalConfig) -> list[tuple[int, int]]:
    """(column, row) of the tokens in the model's order, spelled out."""
    p, grid = config.patch_side, config.grid
    return [
        (patch_column * p + column, patch_row * p + row)
        for patch_row in range(grid // p)
        for patch_column in range(grid // p)
        for row in range(p)
        for column in range(p)
    ]


def plain_hidden(model: ClassConditionalModel, bits: Tensor, label: int) -> np.ndarray:
    """bits `[h*w, C]` in the model's order -> `[h*w, D]`."""
    config = model.config
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    return hidden_states(
        weights,
        bits.double().numpy(),
        label,
        places(config),
        config.n_head,
        config.parallel_num,
        config.mask == "causal",
    )


@ALL_KINDS
def test_order_of_tokens(config: ClassConditionalConfig) -> None:
    bits = pictures(config, 2)
    in_order = to_sequence_order(bits, config)
    for i, (column, row) in enumerate(places(config)):
        assert torch.equal(in_order[:, i], bits[:, :, row, column])
    assert torch.equal(from_sequence_order(in_order, config), bits)


@ALL_KINDS
def test_hidden_states_agree_with_the_plain_model(config: ClassConditionalConfig) -> None:
    model = random_model(config)
    bits = to_sequence_order(pictures(config, 2), config)
    hidden = model.hidden_states(torch.tensor([3, 5]), bits).detach().numpy()
    for row, label in enumerate((3, 5)):
        np.testing.assert_allclose(hidden[row], plain_hidden(model, bits[row], label), atol=2e-5)


def test_norms_have_the_published_epsilon() -> None:
    """Too small for outputs of random weights to show it, not for those of a trained model."""
    norms = [module for module in ClassConditionalModel(TINY).modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 2 * TINY.n_layer + 2 and {norm.eps for norm in norms} == {1e-6}


@ALL_KINDS
def test_training_draws_flips_then_drops_then_the_heads(config: ClassConditionalConfig) -> None:
    model = random_model(replace(config, perturb_rate=0.9)).train()
    bits, labels = pictures(config, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = model(bits, labels, torch.Generator().manual_seed(8))
    assert loss.shape == (6, config.steps, config.parallel_num)

    generator = torch.Generator().manual_seed(8)
    clean = to_sequence_order(bits, config)
    flip = torch.rand(clean.shape, generator=generator) < 0.9 * torch.rand(clean.shape, generator=generator)
    dropped = torch.rand(6, generator=generator) < 0.1
    fed, given = torch.where(flip, -clean, clean), torch.where(dropped, config.num_classes, labels)
    assert flip.any() and dropped.any(), "choose a seed that drops a label"
    hidden = model.eval().hidden_states(given, fed)
    groups = (6 * config.steps, config.parallel_num, -1)
    expected = model.head.loss(clean.reshape(groups), hidden.reshape(groups), generator=generator)
    torch.testing.assert_close(loss, expected.view(loss.shape))


def test_eval_neither_flips_nor_drops() -> None:
    model, bits, labels = random_model(TINY), pictures(TINY, 2), torch.tensor([1, 2])
    clean = to_sequence_order(bits, TINY)
    hidden = model.hidden_states(labels, clean)
    groups = (2 * TINY.steps, TINY.parallel_num, -1)
    generator = torch.Generator().manual_seed(3)
    expected = model.head.loss(clean.reshape(groups), hidden.reshape(groups), generator=generator)
    loss = model(bits, labels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, expected.view(loss.shape))


def draw_without_cache(
    model: ClassConditionalModel, labels: list[int], guidance: float, scale: Callable[[int], float]
) -> Tensor:
    """Sampling by the definition: every step runs the plain model on everything again. `[B, C, h, w]`."""
    config, generator = model.config, torch.Generator().manual_seed(4)
    rows = labels + [config.num_classes] * (len(labels) if guidance > 1.0 else 0)
    drawn = torch.ones(len(rows), config.tokens, config.latent_dim)
    for step in range(config.steps):
        at = slice(step * config.parallel_num, (step + 1) * config.parallel_num)
        condition = np.stack(
            [plain_hidden(model, bits, label)[at] for bits, label in zip(drawn, rows, strict=True)]
        )
        drawn[:, at] = binarize(
            model.head.sample(torch.from_numpy(condition).float(), scale(step), steps=2, generator=generator)
        )
    return from_sequence_order(drawn[: len(labels)], config)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@ALL_KINDS
def test_cached_sampling_is_sampling(config: ClassConditionalConfig, schedule: str) -> None:
    model = random_model(config)
    drawn = sample(
        model,
        [4, 0],
        3.0,
        steps=2,
        schedule=schedule,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(4),
    )

    def scale(step: int) -> float:
        return 1.0 + 2.0 * step / config.steps if schedule == "linear" else 3.0

    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(drawn, draw_without_cache(model, [4, 0], 3.0, scale))


def test_without_guidance_there_is_no_second_half() -> None:
    model = random_model(TINY)
    drawn = sample(model, torch.tensor([1, 2]), steps=2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, draw_without_cache(model, [1, 2], 1.0, lambda step: 1.0))


def test_a_patch_is_fully_visible_only_under_the_block_mask() -> None:
    """Feeding another last token of patch 1 changes the hidden state of that patch's first place, or not."""
    for config, visible in ((TINY, True), (replace(TINY, mask="causal"), False)):
        model, bits = random_model(config), to_sequence_order(pictures(config, 1), config)
        changed = bits.clone()
        changed[:, config.parallel_num - 1] *= -1.0
        first_place = config.parallel_num  # fed patch 1 stands where patch 2 is predicted
        before, after = (model.hidden_states(torch.tensor([0]), x)[:, first_place] for x in (bits, changed))
        assert torch.equal(before, after) is not visible


def test_guidance_schedules() -> None:
    assert [guidance_at(i, 4, 5.0, "linear") for i in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert {guidance_at(i, 4, 5.0, "constant") for i in range(4)} == {5.0}


def test_parameter_counts_of_the_presets() -> None:
    """The paper's 242M, 260M, 260M, 527M and 1.0B, without the tokenizer."""
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in ClassConditionalModel(config).parameters())
            for name, config in CLASS_CONDITIONAL_PRESETS.items()
        }
    assert counts == {
        "B-1x": 242_373_152,
        "B-4x": 260_102_432,
        "B-16x": 260_111_648,
        "L-1x": 527_271_968,
        "L-4x": 567_176_224,
        "L-16x": 567_188_512,
        "H-1x": 1_007_960_352,
        "H-4x": 1_101_456_672,
        "H-16x": 1_101_472_032,
    }


@pytest.mark.parametrize(
    ("labels", "options", "found"),
    [
        ([6], {}, r"labels: found \[6\].*expected 0 to 4, or 5 for no class"),
        ([None], {}, r"labels: found \[None\], expected a non-empty list of class numbers"),
        (["cat"], {}, r"labels: found \['cat'\]"),
        ([True], {}, r"labels: found torch.bool of shape \[1\]"),
        ([-1, 2], {}, r"labels: found \[-1\]"),
        ([], {}, "expected a non-empty list"),
        (None, {}, "labels: found None"),
        ([0], {"guidance": 0.0}, "guidance is 0.0"),
        ([0], {"guidance": None}, "guidance is None: expected a number of at least 1"),
        ([0], {"schedule": "cosine"}, "schedule is 'cosine'"),
        ([0], {"steps": 0}, "steps is 0"),
        ([0], {"steps": 2.5}, "steps is 2.5: expected a whole number"),
        ([0], {"sampler": "heun", "generator": 3}, "sampler is 'heun': .*; generator is 3: expected"),
    ],
)
def test_sampling_refuses(labels: list[int], options: dict[str, object], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        sample(ClassConditionalModel(TINY), labels, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"parallel_num": 9}, "which patches of 3 x 3 do not tile"),
        ({"parallel_num": 8}, "is 8, no square"),
        ({"resolution": 100}, "resolution is 100"),
        ({"n_head": 3}, "n_head 3"),
        ({"parallel_num": 0, "mask": "full"}, r"(?s)parallel_num is 0.*mask is 'full'"),
    ],
)
def test_a_config_that_does_not_fit(changes: dict[str, object], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        replace(TINY, **changes)  # type: ignore[arg-type]


def test_bits_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \[1, 8, 5, 4\], expected \[B, 8, 4, 4\]"):
        ClassConditionalModel(TINY)(torch.ones(1, 8, 5, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="bits: found a list, expected a tensor"):
        ClassConditionalModel(TINY)([[1.0]], torch.tensor([0]))


def test_config_survives_json() -> None:
    assert ClassConditionalConfig.from_json(TINY.to_json()) == TINY
    shifted = replace(TINY, time_schedule="uniform", time_shift=2.0)
    assert ClassConditionalConfig.from_json(shifted.to_json()) == shifted
    assert (shifted.head.time_schedule, shifted.head.time_shift) == ("uniform", 2.0)
    with pytest.raises(ValueError, match="time_schedule is 'cosine'"):
        replace(TINY, time_schedule="cosine")
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]"):
        ClassConditionalConfig.from_json({"depth": 3})
