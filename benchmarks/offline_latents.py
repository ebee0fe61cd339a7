"""What offline latents save: a training step from bits against one that encodes its pictures itself.

    python benchmarks/offline_latents.py [--batch 1] [--repeats 2] [--threads 2]

Both ways run in turn in one process, with the published tokenizer's geometry (ae_d16c32) and random
weights, on 256 px pictures: class-conditional B with 16 tokens a step, and a small text-to-image model. A
step is forward, backward and AdamW in float32; encoding is without gradients. The fastest of the repeats
counts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.made_up_packs import made_up_packs
from benchmarks.small_models import small_text_to_image
from data_pipeline.batch_recipe import BatchRecipe
from models.class_conditional import CLASS_CONDITIONAL_PRESETS, ClassConditionalModel
from models.text_to_image import TextToImageModel
from models.tokenizer import TOKENIZER_PRESETS, BinaryTokenizer

SIDE, GRID, BITS = 256, 16, 32


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss().backward()
        adam.step()
        adam.zero_grad()

    return step


def class_conditional_step(batch: int) -> Callable[[], None]:
    model = ClassConditionalModel(CLASS_CONDITIONAL_PRESETS["B-16x"]).train()
    bits = torch.randn(batch, BITS, GRID, GRID).sign()
    labels = torch.arange(batch)
    return step_of(model, lambda: model(bits, labels).mean())


def text_to_image_step(batch: int) -> Callable[[], None]:
    config = small_text_to_image(vocabulary=4096, width=512, layers=8, heads=8, head_blocks=3)
    model = TextToImageModel(config).train()
    (pack,), _ = made_up_packs(
        config, BatchRecipe(global_batch_size=batch, ratio={SIDE: 1}, max_tokens=1024 * batch), 0
    )

    def loss() -> Tensor:
        losses = model(pack)
        return losses.vision.mean() + 0.01 * losses.text.mean()

    return step_of(model, loss)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(batch: int, repeats: int) -> None:
    tokenizer = BinaryTokenizer(TOKENIZER_PRESETS["ae_d16c32"].config()).eval()
    pictures = torch.rand(batch, 3, SIDE, SIDE) * 2 - 1

    @torch.no_grad()
    def encode() -> Tensor:
        return tokenizer.encode(pictures)

    print(f"{batch} pictures of {SIDE} px a step, {torch.get_num_threads()} threads, best of {repeats}")
    for name, make in (
        ("class-conditional B-16x", class_conditional_step),
        ("small t2i", text_to_image_step),
    ):
        step, fast, slow = make(batch), [], []
        step()
        for _ in range(repeats):
            fast.append(seconds_of(step))
            slow.append(seconds_of(lambda step=step: (encode(), step())))  # type: ignore[misc]
        print(
            f"{name:<24} from latents {min(fast):6.2f} s, encoding {min(slow):6.2f} s: "
            f"{min(slow) / min(fast):.1f} times as long",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    main(options.batch, options.repeats)
