"""The page: pictures beside their captions, histograms, the funnel."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_pipeline.inspect.bars import STYLE as BARS_STYLE
from data_pipeline.inspect.bars import draw_bars, draw_histogram, histogram, length_histogram
from data_pipeline.inspect.look import ClassLook, Look
from data_pipeline.metadata.funnel import Funnel
from data_pipeline.records import LatentRecord, unpack_bits
from foundation.html_page import details, document, embedded_picture, facts, section, table

BINS = 48
CAPTION_SHOWN = 400  # characters; a longer one ends in an ellipsis
STYLE = """
.charts { margin-top: 18px; } svg { max-width: 640px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 18px 14px; }
.pictures img { display: block; width: 100%; border-radius: 4px; background: var(--tile); }
.pictures figcaption { font-weight: 400; font-size: 13px; overflow-wrap: anywhere; margin-top: 4px; }
"""


def render_page(look: Look, tokenizer: Path) -> str:
    """The whole page.

    Args:
        look: what it shows.
        tokenizer: folder of the binary tokenizer that made the dataset.
    """
    manifest = look.dataset.manifest
    pairs = [
        ("samples", f"{sum(c.samples for c in manifest.classes):,}"),
        ("near-duplicates left out", f"{manifest.near_duplicates:,}"),
        ("refused", f"{manifest.quarantined:,}"),
        ("tasks", f"{manifest.tasks:,}"),
        ("bits per token", f"{manifest.tokenizer.bits_per_token} at {manifest.tokenizer.downsample}×"),
        ("tokenizer", manifest.tokenizer.fingerprint[:12]),
    ]
    parts = [f'<p class="status">{_in_words(look)}</p>', facts(pairs)]
    for shown, pictures in zip(look.classes, _decoded(look, tokenizer), strict=True):
        parts.append(section(f"{shown.resolution} px: pictures", pictures, "No sample."))
        parts.append(_class_charts(shown))
    note = f"Of {look.records_read:,} records, spread over the dataset."
    parts.append(section("Scores", _scores(look), "The records carry no scores."))
    parts.append(f'<p class="note">{note}</p>')
    parts.append(section("Funnel", _funnel(look.funnel), "No filter's output is known (see --filter)."))
    parts.append(details("Manifest", manifest.to_json()))
    return document(look.dataset.folder, parts, BARS_STYLE + STYLE)


def _in_words(look: Look) -> str:
    classes = (f"{c.samples:,} of {c.resolution} px" for c in look.dataset.manifest.classes)
    return "Samples: " + ", ".join(classes) + "."


def _decoded(look: Look, tokenizer: Path) -> Iterator[str]:
    """The grid of each class: what a trainer will see, which is the bits and not the photos."""
    import torch

    from models.tokenizer import load_tokenizer, to_uint8

    decoder = load_tokenizer(tokenizer)
    channels = look.dataset.manifest.tokenizer.bits_per_token
    for shown in look.classes:
        figures = []
        for number, record in enumerate(shown.shown):
            bits = torch.from_numpy(unpack_bits(record.bits, record.h, record.w, channels)).float()
            # A GAN decoder draws noise; the same picture each time the page is made.
            torch.manual_seed(number)
            with torch.inference_mode():
                picture = decoder.decode(bits.T.unflatten(1, (record.h, record.w))[None])
            pixels = to_uint8(picture)[0].permute(1, 2, 0).numpy()
            figures.append(_figure(record, Image.fromarray(pixels)))
        yield f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _figure(record: LatentRecord, picture: Image.Image) -> str:
    caption = record.caption
    if len(caption) > CAPTION_SHOWN:
        caption = caption[: CAPTION_SHOWN - 1] + "…"
    notes = [record.key, f"{picture.width} × {picture.height} px", f"{record.n_text} tokens"]
    notes += [f"{name} {value:.3g}" for name, value in record.scores.items()]
    return (
        f"<figure>{embedded_picture(picture, record.key)}<figcaption>{html.escape(caption)}<br>"
        f"<small>{html.escape(', '.join(notes))}</small></figcaption></figure>"
    )


def _class_charts(look: ClassLook) -> str:
    if not look.lengths.sum():
        return ""
    used = {size: count for size, count in look.buckets.items() if count}
    names = [f"{width} × {height}" for height, width in used]
    buckets = draw_bars(names, list(used.values()), "samples by bucket")
    lengths = draw_histogram(*length_histogram(look.lengths, BINS), "captions by tokens")
    empty = len(look.buckets) - len(used)
    unused = f"empty: {empty} of {len(look.buckets)}" if empty else "every bucket is used"
    return (
        '<div class="charts">'
        f"<figure><figcaption>Buckets <small>width × height; {unused}</small></figcaption>{buckets}</figure>"
        f"<figure><figcaption>Caption length <small>tokens</small></figcaption>{lengths}</figure></div>"
    )


def _scores(look: Look) -> str:
    figures = [
        f"<figure><figcaption>{html.escape(name)} <small>{len(values):,} records</small></figcaption>"
        f"{draw_histogram(*histogram(values, BINS), name)}</figure>"
        for name, values in look.scores.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _funnel(funnel: Funnel | None) -> str:
    if funnel is None:
        return ""
    names = ["all rows", *(step.rule for step in funnel.steps)]
    bars = draw_bars(names, [funnel.rows, *(step.after for step in funnel.steps)], "rows after each rule")
    rows = [(s.rule, f"{s.before:,}", f"{s.dropped:,}", f"{s.after:,}") for s in funnel.steps]
    return f'<div class="charts"><figure>{bars}</figure></div>' + table(
        ("rule", "before", "dropped", "after"), rows
    )
