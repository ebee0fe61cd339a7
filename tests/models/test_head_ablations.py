"""The heads of the paper's table 13 that the diffusion head is compared with."""

import pytest
import torch

from models.head import BitwiseHead, TokenHead


def fit(head: BitwiseHead | TokenHead, target: torch.Tensor, cond: torch.Tensor) -> float:
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(target, cond).mean()
        loss.backward()
        optimizer.step()
    return float(loss)


def test_only_the_token_head_learns_that_bits_agree() -> None:
    target = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]).repeat(32, 1)[:, None]  # [64, 1, 3]
    cond = torch.ones(64, 1, 4)
    bitwise, token = BitwiseHead(3, 4), TokenHead(3, 4)
    # Entropies in nats: log 2 per bit if they are independent; log 2 for the whole token if not.
    assert fit(bitwise, target, cond) == pytest.approx(0.693, abs=0.01)
    assert fit(token, target, cond) == pytest.approx(0.693, abs=0.03)
    generator, many = torch.Generator().manual_seed(0), torch.ones(2000, 1, 4)
    agree = [
        float((head.sample(many, generator).sum(-1).abs() == 3).float().mean()) for head in (bitwise, token)
    ]
    assert agree[0] == pytest.approx(0.25, abs=0.05)
    assert agree[1] > 0.95


def test_losses_follow_a_known_distribution() -> None:
    bitwise, token = BitwiseHead(2, 1), TokenHead(2, 1)
    target = torch.tensor([[[1.0, -1.0]]])  # class 1: the first bit is the least significant
    with torch.no_grad():
        for head in (bitwise, token):
            head.linear.weight.zero_()
            head.linear.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    cond = torch.zeros(1, 1, 1)
    expected = -0.5 * (torch.tensor(0.2 / 0.3).log() + torch.tensor(0.3 / 0.7).log())
    torch.testing.assert_close(bitwise.loss(target, cond), expected.view(1, 1))
    torch.testing.assert_close(token.loss(target, cond), -torch.tensor(0.2).log().view(1, 1))


def test_token_head_refuses_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"needs 4\.4e\+12 parameters"):
        TokenHead(32, 1024)


def test_token_classification_stops_where_its_classes_cannot_be_drawn() -> None:
    with pytest.raises(
        ValueError, match=r"25 bits has 33,554,432 classes \(67,108,864 parameters at width 1\)"
    ):
        TokenHead(25, 1)
    with torch.device("meta"):
        assert TokenHead(24, 1).linear.weight.shape == (2**24, 1)
