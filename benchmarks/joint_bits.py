"""Which heads learn how bits depend on one another? (paper, table 13 and figure 5; arXiv 2602.14041)

    python benchmarks/joint_bits.py            # about a minute on two cores

Two toy distributions, each learned by several heads in the same number of steps on the same batches:

1. one token, uniform over 16 codewords of 32 bits, every bit +1 in exactly half of them. A head that gets
   each bit right but not their dependence emits a codeword once in 2^28 draws;
2. four tokens that are all the same codeword. A head that draws each token from what is known before the
   step, however well, makes them agree once in 16^3 draws.

The total variation distance is between the empirical distribution of the draws and the true one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script, from wherever
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.head import BitwiseHead, DiffusionHead, HeadConfig
from models.tokenizer import binarize

CODEWORDS, BITS, CONDITION_WIDTH = 16, 32, 16
WIDTH, DEPTH, BATCH, DRAWS, SOLVER_STEPS = 64, 2, 128, 2048, 20

Loss = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    codewords: float  # share of tokens that are codewords
    joint: float  # share of groups whose tokens are all the same codeword
    distance: float  # total variation, 0 to 1


def balanced_codewords(seed: int) -> Tensor:
    """`[16, 32]` of -1/+1, distinct rows, every column half +1."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.ones(CODEWORDS)
    half[: CODEWORDS // 2] = -1.0
    return torch.stack([half[torch.randperm(CODEWORDS, generator=generator)] for _ in range(BITS)], dim=1)


def diffusion_head(tokens: int) -> DiffusionHead:
    """The class-conditional head: an MLP for one token, a DiT over several."""
    return DiffusionHead(
        HeadConfig(
            ch_target=BITS,
            ch_cond=CONDITION_WIDTH,
            ch_latent=WIDTH,
            depth_latent=DEPTH,
            depth_adanln=1,
            parallel_num=tokens,
            variant="class_conditional",
        )
    )


def train(head: nn.Module, loss: Loss, codewords: Tensor, tokens: int, steps: int) -> None:
    """AdamW with cosine decay on groups of `tokens` equal codewords; the condition says nothing."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        picks = torch.randint(CODEWORDS, (BATCH,), generator=generator)
        target = codewords[picks][:, None].expand(-1, tokens, -1)
        optimizer.zero_grad()
        loss(target, condition(BATCH, tokens)).mean().backward()
        optimizer.step()
        schedule.step()


def condition(groups: int, tokens: int) -> Tensor:
    return torch.ones(groups, tokens, CONDITION_WIDTH)


def score(bits: Tensor, codewords: Tensor) -> Score:
    """bits `[N, P, C]` of -1/+1; in truth all tokens of a group are the same codeword, any as likely."""
    matches = (bits[:, :, None] == codewords).all(dim=-1)  # [N, P, codewords]
    agreed = matches.all(dim=1)  # [N, codewords]
    shares = agreed.float().mean(dim=0)
    joint = float(shares.sum())
    distance = 0.5 * (float((shares - 1.0 / CODEWORDS).abs().sum()) + 1.0 - joint)
    return Score(float(matches.any(dim=-1).float().mean()), joint, distance)


def measure(head: nn.Module, tokens: int, loss: Loss, draw: Draw, steps: int) -> tuple[Score, float]:
    """Train on groups of `tokens`, draw groups of them; the score, and the seconds both took."""
    codewords = balanced_codewords(seed=0)
    start = time.perf_counter()
    train(head, loss, codewords, tokens, steps)
    bits = draw(condition(DRAWS, tokens))
    return score(bits, codewords), time.perf_counter() - start


def token_by_token(head: DiffusionHead) -> tuple[Loss, Draw]:
    """The single-token head on groups: every token is learned and drawn on its own."""

    def loss(target: Tensor, cond: Tensor) -> Tensor:
        return head.loss(target.reshape(-1, 1, BITS), cond.reshape(-1, 1, CONDITION_WIDTH))

    def draw(cond: Tensor) -> Tensor:
        bits = head.sample(cond.reshape(-1, 1, CONDITION_WIDTH), steps=SOLVER_STEPS)
        return binarize(bits).view(*cond.shape[:2], BITS)

    return loss, draw


def run(steps: int) -> Iterator[tuple[str, int, Score, float]]:
    """The rows of the table: head, tokens per group, score, seconds."""
    for tokens in (1, 4):
        torch.manual_seed(0)
        bitwise = BitwiseHead(BITS, CONDITION_WIDTH)
        yield ("bit-wise", tokens, *measure(bitwise, tokens, bitwise.loss, bitwise.sample, steps))
        single = diffusion_head(1)
        name = "diffusion" if tokens == 1 else "diffusion, token by token"
        yield (name, tokens, *measure(single, tokens, *token_by_token(single), steps))
    joint = diffusion_head(4)

    def draw(cond: Tensor) -> Tensor:
        return binarize(joint.sample(cond, steps=SOLVER_STEPS))

    yield ("diffusion, jointly", 4, *measure(joint, 4, joint.loss, draw, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each head (default 400)")
    steps = parser.parse_args().steps
    print(f"{CODEWORDS} codewords of {BITS} bits; {steps} steps of {BATCH} groups, {DRAWS} draws")
    print(f"{'head':27} {'P':>2} {'codewords':>10} {'all agree':>10} {'total variation':>16} {'seconds':>8}")
    for name, tokens, result, seconds in run(steps):
        shares = f"{100 * result.codewords:9.1f}% {100 * result.joint:9.1f}%"
        print(f"{name:27} {tokens:2} {shares} {result.distance:16.3f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
