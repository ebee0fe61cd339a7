"""The page of a run: what it shows, and that nothing in a run folder can break or animate it."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image
from typer.testing import CliRunner

from foundation.errors import DataError
from trainer.report.chart import Curve, Marks, draw_chart
from trainer.report.cli import app
from trainer.report.page import render_page
from trainer.report.run_data import read_run

HOSTILE = "</pre><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>"


@pytest.fixture
def run(tmp_path):
    """A run that was stopped once, killed once, skipped a step, rewound, and is still going."""
    folder = tmp_path / "run"
    for name in ("starts", "checkpoints", "samples/step-20"):
        (folder / name).mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps({"run": HOSTILE, "steps": 60}))
    (folder / "lineage.json").write_text(json.dumps({"dataset": HOSTILE}))
    for number, step in enumerate((0, 20, 30), 1):
        start = {"time": 1.7e9 + number, "host": HOSTILE, "step": step, "ranks": 4}
        (folder / f"starts/{number:04}.json").write_text(json.dumps(start))
    lines = [
        {
            "step": s,
            "loss": None if s == 25 else 1 / (s + 1),
            "vision_loss_256": 0.5,
            "grad_norm": 0.1,
            "images": 8,
        }
        for s in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "lo')
    events = [
        {"time": 1.7e9, "start": 1, "event": "stopped", "step": 20, "signal": "SIGTERM"},
        {
            "time": 1.7e9,
            "start": 2,
            "event": "skipped",
            "step": 25,
            "reason": HOSTILE,
            "samples": [HOSTILE] * 40,
        },
        {"time": 1.7e9, "start": 2, "event": "rewound", "step": 26, "to_step": 20, "passed_over": [25]},
        {
            "time": 1.7e9,
            "start": 2,
            "event": "save_failed",
            "step": 30,
            "problems": ["No space left on device"],
        },
        {"time": 1.7e9, "start": 2, "event": "copy_failed", "checkpoint": "step-30", "reason": "no bucket"},
        {"time": 1.7e9, "start": 2, "event": "sampling_failed", "step": 20, "problem": "it ended with 1"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    Image.new("RGB", (600, 300), (200, 30, 30)).save(folder / "samples/step-20/a <b>cat.png")
    (folder / "samples/step-20/broken.png").write_bytes(b"no picture")
    return folder


class Seen(HTMLParser):
    """The tags of a page, with their attributes, and whether they are closed in order."""

    VOID = {"meta", "img", "line", "polyline", "polygon", "circle", "!doctype"}

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_nothing_in_a_run_folder_becomes_markup_or_is_loaded(run):
    page = render_page(read_run(run), now=1.7e9)
    seen = Seen()
    seen.feed(page)
    assert not seen.open
    assert {tag for tag, _ in seen.tags} >= {"svg", "table", "img", "details"}
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in seen.tags}
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in seen.tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_tells_what_happened(run):
    page = render_page(read_run(run), now=1.7e9)
    for words in (
        "After step 40 of 60.",
        "stopped at step 20 by SIGTERM",
        "no orderly end on record",
        "back to step 20; passed over: 25",
        "and 28 more",
        "No space left on device",
        "no bucket",
        "it ended with 1",
        "broken.png cannot be read",
        "restart at step 20",
        "skip at step 25",
    ):
        assert words in page, words


def test_a_young_run_has_a_page_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 5")
    page = render_page(read_run(tmp_path), now=1.7e9)
    assert "No step of 5 is done." in page and "No step was skipped." in page


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not a run folder.*recipe.yaml"):
        read_run(tmp_path)


def test_the_command_writes_the_page_into_the_run(run):
    done = CliRunner().invoke(app, [str(run)])
    assert done.exit_code == 0 and (run / "report.html").read_text().startswith("<!doctype html>")


def _polyline(svg):
    points = re.search(r'polyline class="curve c0" points="([^"]*)"', svg)[1]
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_a_long_curve_is_drawn_in_few_points_and_keeps_its_shape():
    curve = Curve("loss", [(step, 1.0 if step < 50_000 else 3.0) for step in range(100_000)])
    places = _polyline(draw_chart([curve], Marks()))
    assert 100 < len(places) <= 281
    assert all(x1 < x2 for (x1, _), (x2, _) in pairwise(places))
    assert places[0][1] > places[-1][1]  # larger values stand higher


def test_one_spike_does_not_flatten_a_chart():
    wave = [1.0 + (step // 500) % 2 for step in range(20_000)]
    wave[7_777] = 20.0
    heights = [y for _, y in _polyline(draw_chart([Curve("norm", list(enumerate(wave)))], Marks()))]
    assert max(heights) - min(heights) > 100


def test_charts_take_one_point_and_no_point():
    assert "circle" in draw_chart([Curve("loss", [(3, 1.0)])], Marks(restarts=[3]))
    assert draw_chart([Curve("loss", [])], Marks()) == ""


@pytest.mark.parametrize(
    "line", [{"step": "x"}, {"loss": 1.0}, {"step": None}, {"step": 41, "eta_seconds": "x"}]
)
def test_a_damaged_line_is_left_out(run, line):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(line) + "\n")
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "skipped", **line}) + "\n")
    assert "of 60" in render_page(read_run(run), 1.7e9)
