"""Group-wise LFQ against the plain definition, its gradient, and the global batch on two ranks."""

import os
import socket
from pathlib import Path

import plain_tokenizer as plain
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import GroupLFQ


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    bits=st.integers(1, 4),
    spread=st.sampled_from([0.003, 0.05, 1.0]),
    temperature=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 99),
)
def test_losses_agree_with_the_plain_definition(
    groups: int, bits: int, spread: float, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = spread * torch.randn(2, groups * bits, 2, 3, dtype=torch.float32)
    out = GroupLFQ(groups * bits, groups, temperature, eps=1e-5)(x)
    for name, value in plain.group_lfq(x.double().numpy(), groups, temperature, 1e-5).items():
        assert getattr(out, name).item() == pytest.approx(value, abs=2e-5), name


def test_codes_by_hand() -> None:
    # One token, two groups of three bits: (+, -, +) is 1 + 4, (-, -, 0) is no bit at all.
    x = torch.tensor([0.2, -0.1, 3.0, -1.0, -2.0, 0.0]).view(1, 6, 1, 1)
    out = GroupLFQ(6, 2)(x)
    assert out.indices.tolist() == [[[5, 0]]]
    assert out.bits.flatten().tolist() == [1, -1, 1, -1, -1, -1]


def test_entropies_at_their_ends() -> None:
    quantizer = GroupLFQ(4, 1)
    every_code = quantizer.codes.T.reshape(1, 4, 4, 4)  # sure, and all 16 codes in equal use
    out = quantizer(every_code)
    assert out.per_sample_entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert out.codebook_entropy.item() == pytest.approx(torch.log(torch.tensor(16.0)).item(), abs=1e-3)
    assert out.commitment.item() == 0.0
    unsure = quantizer(torch.zeros(1, 4, 4, 4))
    assert unsure.entropy_loss.item() == pytest.approx(0.0, abs=1e-3)
    one_code = quantizer(torch.ones(1, 4, 4, 4))
    assert one_code.codebook_entropy.item() == pytest.approx(0.0, abs=1e-4)


def test_gradient_passes_straight_through() -> None:
    x = torch.randn(2, 6, 2, 2, requires_grad=True)
    weights = torch.randn(2, 6, 2, 2)
    bits = GroupLFQ(6, 2)(x).bits
    assert set(bits.detach().unique().tolist()) == {-1.0, 1.0}  # exactly, in spite of the gradient
    (gradient,) = torch.autograd.grad((bits * weights).sum(), x)
    assert torch.equal(gradient, weights)


def test_losses_stay_float32_under_autocast() -> None:
    x = torch.randn(1, 8, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = GroupLFQ(8, 1)(x)
    assert out.entropy_loss.dtype == out.commitment.dtype == torch.float32
    assert torch.allclose(out.entropy_loss, GroupLFQ(8, 1)(x.float()).entropy_loss)


@pytest.mark.parametrize(
    ("channels", "groups", "message"), [(32, 5, "divisor"), (32, 0, "divisor"), (64, 2, "32 bits a group")]
)
def test_groups_that_cannot_be(channels: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupLFQ(channels, groups)


def test_input_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"expected \[batch, 8, h, w\]"):
        GroupLFQ(8, 1)(torch.zeros(1, 4, 2, 2))


def global_batch() -> torch.Tensor:
    return 0.01 * torch.randn(4, 8, 2, 3, generator=torch.Generator().manual_seed(3))


def one_rank(rank: int, port: int, folder: str) -> None:
    """Half of the global batch on each of two ranks: save losses, and the gradient as ranks average it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x = global_batch()[2 * rank : 2 * rank + 2].requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)  # stands for the shared weights before the quantizer
    out = GroupLFQ(8, 2)(scale * x)
    out.entropy_loss.backward()
    gradient = scale.grad.clone()  # type: ignore[union-attr]
    dist.all_reduce(gradient)
    result = {"loss": out.entropy_loss.detach(), "codebook": out.codebook_entropy.detach()}
    torch.save(result | {"scale": gradient / 2, "x": x.grad / 2}, f"{folder}/{rank}.pt")  # type: ignore[operator]
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    x = global_batch().requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    whole = GroupLFQ(8, 2)(scale * x)
    whole.entropy_loss.backward()

    for rank in ranks:
        torch.testing.assert_close(rank["codebook"], whole.codebook_entropy.detach())
        torch.testing.assert_close(rank["scale"], scale.grad)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole.entropy_loss.detach())
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]), x.grad)
    # The test would see a codebook entropy that each rank computes alone:
    alone = [GroupLFQ(8, 2)(0.7 * half).codebook_entropy for half in global_batch().chunk(2)]
    assert abs(alone[0] - whole.codebook_entropy) > 0.01
