"""The page of a run: one file, no script, nothing loaded from anywhere; all text from files is escaped."""

from __future__ import annotations

import html
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import yaml

from foundation.html_page import details, document, facts, section, table
from trainer.report.chart import Curve, Marks, draw_chart, legend
from trainer.report.pictures import sample_grid
from trainer.report.run_data import RunData
from trainer.report.style import STYLE

SAMPLES_NAMED = 12  # samples of a skipped step that are named in the table; all are in events.jsonl


@dataclass(frozen=True)
class Panel:
    """A chart and the metrics that it shows; a name that ends in `_` stands for all that begin so."""

    title: str
    unit: str
    keys: tuple[str, ...]
    logarithmic: bool = False


PANELS = (
    Panel("Loss", "vision + weighted text", ("loss",)),
    Panel("Vision loss by class", "squared velocity error", ("vision_loss_",)),
    Panel("Text loss", "nats per token", ("text_loss",)),
    Panel("Gradient norm", "before clipping", ("grad_norm",), logarithmic=True),
    Panel("Learning rate", "", ("lr",)),
    Panel("Images", "per second", ("images_per_second",)),
    Panel("Tokens", "per second", ("tokens_per_second",)),
    Panel("MFU", "share of peak", ("mfu",)),
    Panel("Step", "seconds", ("seconds", "data_wait")),
    Panel("Imbalance across ranks", "heaviest pack over mean", ("imbalance",)),
    Panel("Token utilization", "share of the packs", ("utilization",)),
    Panel("Memory", "GB, peak of the rank that needs most", ("memory_gb",)),
    Panel("Effective time", "share since the first start that trained", ("effective_share",)),
)


def render_page(data: RunData, now: float) -> str:
    """The whole page.

    Args:
        now: seconds since 1970, for the page's own date.
    """
    parts = [
        f'<p class="status">{html.escape(_status(data))}</p>',
        _facts(data),
        "<h2>Curves</h2>",
        '<p class="note">Lines are means over neighbouring steps, bands their range. Dashed: a start of the '
        "run; short red line: a skipped step.</p>",
        f'<div class="charts">{"".join(_charts(data))}</div>',
        section("Samples", sample_grid(data.run.samples), "No pictures were sampled."),
        section("Restarts", _restarts(data), "The run was never started."),
        section("Skipped steps and rewinds", _skips(data), "No step was skipped."),
        section("What else went wrong", _trouble(data), "Nothing."),
        details("Recipe", yaml.safe_dump(data.recipe, sort_keys=False, allow_unicode=True)),
        details("Lineage", json.dumps(data.lineage, indent=1, ensure_ascii=False)),
        details("Provenance", json.dumps(data.provenance, indent=1, ensure_ascii=False)),
        f'<p class="note">Written {_date(now)}.</p>',
    ]
    return document(str(data.run.path), parts, STYLE)


def _status(data: RunData) -> str:
    steps = data.recipe.get("steps", "?")
    if data.finished_at is not None:
        return f"Finished: {data.finished_at} steps, exported."
    if not data.metrics:
        return f"No step of {steps} is done."
    last = data.metrics[-1]
    left = last.get("eta_seconds")
    return f"After step {last['step'] + 1} of {steps}" + (
        f", {_duration(left)} left then." if isinstance(left, int | float) else "."
    )


def _facts(data: RunData) -> str:
    last = data.metrics[-1] if data.metrics else {}
    skipped = len({event.get("step") for event in data.of_kind("skipped")})
    pairs = [
        ("loss", _number(last.get("loss"))),
        ("images", _number(last.get("images"))),
        ("tokens", _number(last.get("tokens"))),
        ("images/s", _number(last.get("images_per_second"))),
        ("effective time", _percent(last.get("effective_share"))),
        ("starts", str(len(data.starts))),
        ("skipped steps", str(skipped)),
        ("ranks", str(data.starts[-1].get("ranks", "-") if data.starts else "-")),
    ]
    return facts(pairs)


def _charts(data: RunData) -> list[str]:
    restarts = [start.get("step", 0) for start in data.starts[1:]]
    marks = Marks(restarts, [e["step"] for e in data.of_kind("skipped") if type(e.get("step")) is int])
    figures = []
    for panel in PANELS:
        curves = [Curve(_curve_name(key, panel), _points(data, key)) for key in _keys(data, panel)]
        curves = [curve for curve in curves if curve.points]
        chart = draw_chart(curves, marks, panel.logarithmic)
        if chart:
            title = f"{html.escape(panel.title)} <small>{html.escape(panel.unit)}</small>"
            names = [curve.name for curve in curves]
            figures.append(f"<figure><figcaption>{title}</figcaption>{legend(names)}{chart}</figure>")
    return figures


def _keys(data: RunData, panel: Panel) -> list[str]:
    known = dict.fromkeys(key for line in data.metrics for key in line)
    found = [
        key
        for wanted in panel.keys
        for key in known
        if key == wanted or (wanted[-1] == "_" and key.startswith(wanted))
    ]
    return sorted(found, key=lambda key: (len(key), key)) if panel.keys[0].endswith("_") else found


def _curve_name(key: str, panel: Panel) -> str:
    prefix = panel.keys[0]
    return f"{key.removeprefix(prefix)} px" if prefix.endswith("_") else key.replace("_", " ")


def _points(data: RunData, key: str) -> list[tuple[float, float]]:
    values = ((line["step"], line.get(key)) for line in data.metrics)
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v)]


def _restarts(data: RunData) -> str:
    ends = {event.get("start"): event for event in data.of_kind("stopped", "finished")}
    rows = []
    for number, start in enumerate(data.starts, 1):
        end = ends.get(number)
        how = "no orderly end on record"
        if end is not None:
            how = f"{end['event']} at step {end.get('step')}" + (
                f" by {end['signal']}" if end.get("signal") else ""
            )
        elif number == len(data.starts):
            how = "-"
        values = (
            number,
            _date(start.get("time")),
            start.get("host"),
            start.get("ranks"),
            start.get("step"),
            how,
        )
        rows.append(values)
    return table(("start", "when", "host", "ranks", "from step", "how it ended"), rows)


def _skips(data: RunData) -> str:
    rows: list[tuple[Any, ...]] = []
    for event in data.of_kind("skipped", "rewound"):
        if event["event"] == "rewound":
            over = ", ".join(str(step) for step in event.get("passed_over", ()))
            rows.append((event.get("step"), f"back to step {event.get('to_step')}; passed over: {over}", ""))
            continue
        samples = [str(sample) for sample in event.get("samples", ())]
        more = f" and {len(samples) - SAMPLES_NAMED} more" if len(samples) > SAMPLES_NAMED else ""
        rows.append((event.get("step"), event.get("reason"), ", ".join(samples[:SAMPLES_NAMED]) + more))
    return table(("step", "why", "samples"), rows)


def _trouble(data: RunData) -> str:
    rows = [
        (
            _date(event.get("time")),
            event["event"].replace("_", " "),
            event.get("step", event.get("checkpoint")),
            "; ".join(event.get("problems", ())) or event.get("problem") or event.get("reason"),
        )
        for event in data.of_kind("save_failed", "checkpoint_passed_over", "copy_failed", "sampling_failed")
    ]
    return table(("when", "what", "step", "why"), rows)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _date(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes} min"
