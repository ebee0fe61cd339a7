"""Images per second of sampling, where the time goes, and how far it is from the matrix products alone.

    python benchmarks/sampling.py [--threads 2] [--repeats 3] [--baseline] [--only t2i-0.6b-b1 ...]

Random weights of the real geometry: time does not depend on what they are. Each case is sampled and its
matrix products are replayed by themselves in turn, `repeats` times, and the fastest of each counts.

    seconds, images/s            sampling: prompts to bits
    backbone, head, rest         its parts; `rest` is outside of both
    decode                       bits to pixels by the published tokenizer `ae_d16c32`, all pictures in one
                                 batch, once; to be added to `seconds`
    products, ratio              the floor, and sampling time over it: the same products as torch computes
                                 them, without norms, activations, the solver, random numbers and Python.
                                 Weights that sampling lays out anew count as laid out plainly, so a ratio may
                                 be below 1
    plain, of plain, equal bits  with --baseline: seconds of `benchmarks/plain_sampling.py`, which leaves out
                                 what makes sampling fast, on the same weights in the same run; ours over
                                 them; and whether one seed gave the same bits

On a GPU, also the class-conditional models at batch 64 in bfloat16 (paper, arXiv 2602.14041, table 3: 24.18
and 90.26 images/s on an A100), and the 14B geometry at 1024 px, 8x8 patches, 50 steps with guidance; the head
is compiled in all of them.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script, from wherever
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.matrix_products import MatrixProducts
from benchmarks.plain_sampling import plain_class_conditional, plain_text_to_image
from models.class_conditional import (
    CLASS_CONDITIONAL_PRESETS,
    PUBLISHED_GUIDANCE,
    ClassConditionalModel,
    sample,
)
from models.flow_settings import FlowSettings
from models.head import DiffusionHead
from models.layout import SequenceTokens
from models.text_to_image import TextToImageModel, preset
from models.tokenizer import TOKENIZER_PRESETS, BinaryTokenizer

PROMPT_TOKENS = 40
GUIDANCE = 7.5
BITS, TOKEN_PIXELS = 32, 16  # of `ae_d16c32`


class Split:
    """Seconds spent in named parts, by wrapping the methods that do their work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: nn.Module, method: str, part: str) -> None:
        run = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = run(*args, **kwargs)
            synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, method, timed)


@dataclass
class Case:
    """Something to sample: `draw()` makes `images` pictures, and `split` sees where its time goes."""

    images: int
    pixels: int
    model: nn.Module
    draw: Callable[[], Tensor]
    draw_plainly: Callable[[], Tensor]
    split: Split


def ready(head: DiffusionHead, device: str) -> None:
    """Fresh adaLN and final layers are zero, and bits would depend on nothing; on a GPU, compile."""
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if device == "cuda":
        head.compile_for_sampling()


def text_to_image(
    backbone: str, images: int, pixels: int, p: int, steps: int, device: str, dtype: torch.dtype
) -> Case:
    """A model of the geometry of `preset(backbone, p)`, one prompt."""
    config = preset(backbone, p, vocabulary=152_064)
    with torch.device(device):
        model = TextToImageModel(config).to(dtype).eval()
    ready(model.vision_head, device)
    tokens = SequenceTokens(
        im_start=0,
        im_end=1,
        vision_start=2,
        vision_end=3,
        res={k: 10 + k for k in range(1, 257)},
        query=tuple(range(300, 299 + p * p)),
        user_prefix=(0, 4, 5),
        turn_end=(1, 5),
        assistant=(0, 6, 5),
    )
    prompts = tokens.prompt(range(1000, 1000 + PROMPT_TOKENS)), tokens.unconditional_prompt()
    side = pixels // config.tokenizer_downsample
    flow = FlowSettings(GUIDANCE, steps)

    def draw() -> Tensor:
        return model.generate(*prompts, side, side, tokens=tokens, num_images=images, flow=flow)

    def draw_plainly() -> Tensor:
        return plain_text_to_image(model, prompts, (side, side), tokens, images, GUIDANCE, steps)

    split = Split()
    split.watch(model.llm.model, "forward", "backbone")
    split.watch(model.vision_head, "sample", "head")
    return Case(images, pixels, model, draw, draw_plainly, split)


def class_conditional(name: str, images: int, steps: int, device: str, dtype: torch.dtype) -> Case:
    with torch.device(device):
        model = ClassConditionalModel(CLASS_CONDITIONAL_PRESETS[name]).to(dtype).eval()
    ready(model.head, device)
    labels = torch.arange(images, device=device)
    guidance = PUBLISHED_GUIDANCE[name]

    def draw() -> Tensor:
        return sample(model, labels, guidance, steps=steps)

    def draw_plainly() -> Tensor:
        return plain_class_conditional(model, labels, guidance, steps)

    split = Split()
    split.watch(model, "run_layers", "backbone")
    split.watch(model.head, "sample", "head")
    return Case(images, model.config.resolution, model, draw, draw_plainly, split)


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """Name -> how to build it; one model is in memory at a time."""

    def t2i(*args: Any) -> Callable[[], Case]:
        return lambda: text_to_image(*args, device, dtype)

    def c2i(*args: Any) -> Callable[[], Case]:
        return lambda: class_conditional(*args, device, dtype)

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = {
        "t2i-0.6b-b1": t2i("0.6b", 1, 256, 4, 20),
        "t2i-0.6b-b4": t2i("0.6b", 4, 256, 4, 20),
        **{f"B-{P}x-b{n}": c2i(f"B-{P}x", n, 20) for P in (16, 4) for n in (1, 4, 8)},
    }
    if device == "cuda":
        found |= {f"B-{P}x-b64": c2i(f"B-{P}x", 64, 100) for P in (16, 4)}
        found["t2i-14b-1024px"] = t2i("14b", 1, 1024, 8, 50)
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def decoding(images: int, pixels: int, device: str, dtype: torch.dtype) -> float:
    """Seconds that the decoder of the published tokenizer takes for a batch of pictures."""
    with torch.device(device):
        tokenizer = BinaryTokenizer(TOKENIZER_PRESETS["ae_d16c32"].config()).to(dtype).eval()
        side = pixels // TOKEN_PIXELS
        bits = torch.randint(0, 2, (images, BITS, side, side)).to(dtype) * 2 - 1
    if device == "cuda":
        tokenizer.decode(bits)  # cuDNN chooses its kernels
    return seconds_of(lambda: tokenizer.decode(bits))


def seeded(draw: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return draw()


def report(name: str, case: Case, repeats: int, baseline: bool) -> str:
    """Sample once to record the products (and to warm up), then time all in turn."""
    with MatrixProducts(case.model) as products:
        case.draw()
    best, floor, plain, parts = float("inf"), float("inf"), float("inf"), {}
    equal = float((seeded(case.draw) == seeded(case.draw_plainly)).float().mean()) if baseline else 0.0
    for _ in range(repeats):
        case.split.seconds.clear()
        seconds = seconds_of(case.draw)
        if seconds < best:
            best, parts = seconds, dict(case.split.seconds)
        floor = min(floor, products.replay())
        if baseline:
            plain = min(plain, seconds_of(case.draw_plainly))
    device, dtype = next(case.model.parameters()).device.type, next(case.model.parameters()).dtype
    line = (
        f"{name:14} {best:8.2f} {case.images / best:9.3f} {parts['backbone']:9.2f} {parts['head']:7.2f} "
        f"{best - sum(parts.values()):6.2f} {decoding(case.images, case.pixels, device, dtype):7.2f} "
        f"{floor:9.2f} {best / floor:6.2f} {products.flops / best / 1e9:8.0f}"
    )
    return line + (f" {plain:8.2f} {best / plain:9.2f} {equal:11.2%}" if baseline else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline", action="store_true", help="also sample plainly, and compare")
    parser.add_argument("--only", nargs="*", help="names of cases")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {arguments.threads} threads"
    available = cases(device)
    wanted = arguments.only or [*available]
    if unknown := set(wanted) - {*available}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(available)}")
    print(f"torch {torch.__version__}, {where}, {arguments.repeats} repeats, fastest counts")
    print(
        f"{'case':14} {'seconds':>8} {'images/s':>9} {'backbone':>9} {'head':>7} {'rest':>6} {'decode':>7} "
        f"{'products':>9} {'ratio':>6} {'GFLOP/s':>8}"
        + (f" {'plain':>8} {'of plain':>9} {'equal bits':>11}" if arguments.baseline else "")
    )
    for name in wanted:
        torch.manual_seed(0)
        print(report(name, available[name](), arguments.repeats, arguments.baseline), flush=True)


if __name__ == "__main__":
    main()
