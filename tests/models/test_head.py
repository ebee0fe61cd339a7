"""The diffusion head: against a plain version, its draws, its invariants, what it refuses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_models import head_predicts
from torch import Tensor, nn

from models.head import DiffusionHead, HeadConfig
from models.packed_linear import packed_linears

T2I = HeadConfig(
    ch_target=8, ch_cond=24, ch_latent=256, depth_latent=4, depth_adanln=2, parallel_num=4, time_shift=1.0
)
C2I = replace(T2I, ch_latent=128, variant="class_conditional", diff_batch_mul=2)
VARIANTS = {
    "text_to_image": T2I,
    "text_to_image_mlp": replace(T2I, use_swiglu=False, time_schedule="uniform", time_shift=3.0),
    "class_conditional": C2I,
    "single_token": replace(C2I, parallel_num=1, diff_batch_mul=1),
}


def random_head(config: HeadConfig) -> DiffusionHead:
    """A head with nothing at zero, so that every weight matters."""
    torch.manual_seed(0)
    head = DiffusionHead(config)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return head.eval()


def inputs(config: HeadConfig, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(2, (groups, config.parallel_num, config.ch_target), generator=generator) * 2.0 - 1.0
    return bits, torch.randn(groups, config.parallel_num, config.ch_cond, generator=generator)


def plain(head: DiffusionHead, x: Tensor, t: float, cond: Tensor) -> np.ndarray:
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    heads = max(1, head.config.ch_latent // head.config.attention_head_width)
    rows = zip(x.double().numpy(), cond.double().numpy(), strict=True)
    return np.stack([head_predicts(weights, *row_at(row, t), head.config.variant, heads) for row in rows])


def row_at(row: tuple[np.ndarray, np.ndarray], t: float) -> tuple[np.ndarray, float, np.ndarray]:
    return row[0], t, row[1]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_net_agrees_with_the_plain_one(config: HeadConfig) -> None:
    head = random_head(config)
    _, cond = inputs(config, 2)
    x = torch.randn(2, config.parallel_num, config.ch_target)
    predicted = head.net(x, torch.full((2,), 0.3), cond).detach().numpy()
    np.testing.assert_allclose(predicted, plain(head, x, 0.3, cond), atol=2e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_agrees_with_the_plain_one_and_draws_t_then_noise(config: HeadConfig) -> None:
    head = random_head(config)
    target, cond = inputs(config, 2)
    loss = head.loss(target, cond, generator=torch.Generator().manual_seed(5))

    generator, k = torch.Generator().manual_seed(5), config.diff_batch_mul
    if config.time_schedule == "uniform":
        t = torch.rand(2 * k, generator=generator)
    else:
        t = torch.sigmoid(torch.randn(2 * k, generator=generator) * 0.8 - 0.8)
    t = (1 / config.time_shift) / (1 / config.time_shift + 1 / t - 1)
    noise = torch.randn(2 * k, *target.shape[1:], generator=generator)
    expected = np.zeros((2, config.parallel_num))
    for copy in range(2 * k):
        at, row = float(t[copy]), copy % 2  # the batch is tiled, not interleaved
        x_t = at * target[row] + (1 - at) * noise[copy]
        predicted = plain(head, x_t[None], at, cond[row : row + 1])[0]
        difference = (target[row].numpy() - predicted) / max(1 - at, 0.05)
        expected[row] += (difference**2).mean(-1) / k
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    given = head.loss(target, cond, t=t, noise=noise)
    torch.testing.assert_close(given, loss)


@pytest.mark.parametrize("sampler", ["euler_maruyama", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_sample_agrees_with_the_plain_one(config: HeadConfig, guidance: float, sampler: str) -> None:
    head, steps = random_head(config), 3
    _, cond = inputs(config, 2)
    drawn = head.sample(
        cond, guidance, steps=steps, sampler=sampler, generator=torch.Generator().manual_seed(5)
    )

    generator, s = torch.Generator().manual_seed(5), config.time_shift
    rows = 2 if guidance == 1.0 else 1
    shape = (rows, config.parallel_num, config.ch_target)
    linspace = np.linspace(0, 0.95, steps + 1)
    times = [0.0, *((1 / s) / (1 / s + 1 / u - 1) for u in linspace[1:])]
    x = torch.randn(shape, generator=generator).double().numpy()
    for i, t in enumerate(times):
        both = np.concatenate([x] * (2 // rows))
        v = (plain(head, torch.from_numpy(both), t, cond) - both) / max(1 - t, 0.05)
        if guidance > 1.0:
            v = v[1:] + guidance * (v[:1] - v[1:])
        if i == steps:
            x = x + v * (1 - t)
            break
        dt = times[i + 1] - t
        if sampler == "euler":
            x = x + v * dt
        else:
            noise = torch.randn(shape, generator=generator).double().numpy()
            score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
            x = x + (v + (1 - t) * score) * dt + np.sqrt(2 * (1 - t) * dt) * noise
    assert drawn.shape == (2, *shape[1:]) and drawn.dtype == torch.float32
    np.testing.assert_allclose(drawn.numpy(), np.concatenate([x] * (2 // rows)), atol=1e-3)


def test_solver_stays_float32_around_a_bfloat16_net() -> None:
    head = random_head(T2I).to(torch.bfloat16)
    target, cond = inputs(T2I, 4)
    assert head.sample(cond.bfloat16(), 2.0, steps=2).dtype == torch.float32
    assert head.loss(target, cond.bfloat16()).dtype == torch.float32


def test_loss_under_autocast_is_close_and_float32() -> None:
    head, (target, cond) = random_head(T2I), inputs(T2I, 4)
    exact = head.loss(target, cond, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(target, cond, generator=torch.Generator().manual_seed(2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_new_heads_start_as_published() -> None:
    net = DiffusionHead(T2I).net
    zero = [*net.ada_ln_blocks, net.final_layer.ada_ln_modulation, net.final_layer.linear]
    assert all(not p.any() for layer in zero for p in layer.parameters())
    assert 0.015 < float(net.time_embed.mlp[0].weight.std()) < 0.025
    limit = (6.0 / (T2I.ch_cond + T2I.ch_latent)) ** 0.5  # Xavier uniform
    largest = float(net.cond_embed.weight.abs().max())
    assert 0.95 * limit < largest <= limit and not net.cond_embed.bias.any()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_norms_have_the_published_epsilon(config: HeadConfig) -> None:
    """Too small for outputs of random weights to show it, not for those of a trained head."""
    norms = [module for module in DiffusionHead(config).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) > config.depth_latent and {norm.eps for norm in norms} == {1e-6}


def test_packed_weights_change_nothing_and_leave_no_trace() -> None:
    head, (_, cond) = random_head(T2I), inputs(T2I, 4)
    plain_draw = head.sample(cond, 2.0, steps=2, generator=torch.Generator().manual_seed(3))
    with packed_linears([head.net], rows=16), packed_linears([head], rows=16):
        packed = head.sample(cond, 2.0, steps=2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(packed, plain_draw, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        head.net.cond_embed.weight.add_(1.0)
    changed = head.sample(cond, 2.0, steps=2, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(changed, plain_draw)
    head.loss(*inputs(T2I, 4)).mean().backward()
    assert head.net.cond_embed.weight.grad is not None


def test_steps_made_ready_once_draw_the_same() -> None:
    head, (_, cond) = random_head(T2I), inputs(T2I, 4)
    solver = head.solver_steps(3)
    for _ in range(2):
        drawn = [
            head.sample(cond, 2.0, steps=steps, generator=torch.Generator().manual_seed(3))
            for steps in (3, solver)
        ]
        assert torch.equal(*drawn)


def test_a_compiled_net_is_what_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself needs a GPU; that its product does the passes, and keeps the weights' names, does
    not."""
    head, (_, cond) = random_head(C2I), inputs(C2I, 4)
    names, passes = list(head.state_dict()), []

    def compiler(function: Callable[..., torch.Tensor], mode: str) -> Callable[..., torch.Tensor]:
        assert mode == "reduce-overhead"
        return lambda *args: passes.append(args[0].shape) or function(*args)

    plain = head.sample(cond, 2.0, steps=3, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "compile", compiler)
    head.compile_for_sampling()
    assert torch.equal(head.sample(cond, 2.0, steps=3, generator=torch.Generator().manual_seed(3)), plain)
    assert len(passes) == 4 and len(set(passes)) == 1  # one shape: one graph
    assert list(head.state_dict()) == names


@pytest.mark.parametrize(
    ("rows", "options", "found"),
    [
        (4, {"guidance": 0.5}, "guidance is 0.5"),
        (3, {"guidance": 2.0}, "found 3 rows"),
        (4, {"sampler": "heun"}, "sampler is 'heun'"),
        (4, {"steps": 0}, "steps is 0"),
        (4, {"steps": 2.0, "generator": 1}, "steps is 2.0: .*; generator is 1"),
    ],
)
def test_sampling_refuses(rows: int, options: dict[str, object], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        DiffusionHead(C2I).sample(torch.zeros(rows, 4, 24), **{"steps": 2, **options})


def test_wrong_shapes_are_named() -> None:
    head, (target, cond) = DiffusionHead(T2I), inputs(T2I, 2)
    with pytest.raises(ValueError, match=r"condition of the head: found shape \[2, 4, 23\]"):
        head.sample(cond[..., :23], steps=2)
    for wrong, found in ((cond.tolist(), "found list"), (cond.to(torch.int64), "found torch.int64")):
        with pytest.raises(ValueError, match=f"{found}, expected a tensor of floats"):
            head.sample(wrong, steps=2)
    with pytest.raises(ValueError, match=r"target of the head's loss: found shape \[1, 4, 8\]"):
        head.loss(target[:1], cond)
    with pytest.raises(ValueError, match=r"t of the head's loss: found shape \[3\], expected \[2\]"):
        head.loss(target, cond, t=torch.zeros(3))


def test_a_config_lists_all_its_problems() -> None:
    with pytest.raises(ValueError, match=r"(?s)depth_adanln = 2 does not.*ch_latent is 100"):
        replace(T2I, depth_latent=3, ch_latent=100)
    with pytest.raises(ValueError, match="use_swiglu"):
        replace(C2I, use_swiglu=False)


def test_config_survives_json() -> None:
    assert HeadConfig.from_json(T2I.to_json()) == T2I
    assert HeadConfig.from_json(T2I.to_json() | {"grad_checkpointing": True}) == T2I
    needed = ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln", "parallel_num")
    bare = HeadConfig.from_json({name: T2I.to_json()[name] for name in needed})
    assert (bare.P_mean, bare.P_std, bare.use_swiglu) == (0.0, 1.0, False), "as the published code reads it"
    assert "variant" not in T2I.to_json()
    with pytest.raises(ValueError, match=r"missing keys \['ch_cond'\], unknown keys \['ch_condition'\]"):
        values = T2I.to_json()
        values["ch_condition"] = values.pop("ch_cond")
        HeadConfig.from_json(values)


@pytest.mark.parametrize(
    "name", ["ch_target", "ch_latent", "depth_latent", "parallel_num", "time_shift", "P_mean"]
)
def test_numbers_beyond_any_model_are_refused(name: str) -> None:
    """Before anything of that size is computed, or a float is made of what none can hold."""
    with pytest.raises(ValueError, match=f"{name} is 1000"):
        HeadConfig.from_json(
            HeadConfig(ch_target=32, ch_cond=64, ch_latent=128, depth_latent=2).to_json() | {name: 10**400}
        )
