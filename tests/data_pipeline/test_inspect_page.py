"""The page about a dataset: what it shows, that captions cannot break out of it, and what it refuses."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from photo_shards import picture, tokenize_recipe, write_shards, write_tar, write_tokenizer
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.cli import app
from data_pipeline.inspect.bars import histogram, length_histogram
from data_pipeline.inspect.look import look_at, tokenizer_folder
from data_pipeline.latents import LatentDataset
from data_pipeline.metadata.funnel import Funnel, FunnelStep
from data_pipeline.records import unpack_bits
from data_pipeline.tokenize.run import run_tokenize
from foundation.errors import DataError, RecipeError
from models.tokenizer import load_tokenizer, to_uint8

HOSTILE = "</figcaption><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two shards of six pictures, and one whose caption wants to be a script."""
    folder = tmp_path_factory.mktemp("inspected")
    write_shards(folder / "shards", 2)
    write_tar(folder / "shards" / "00002.tar", [("x.jpg", picture(99, 64, 64)), ("x.txt", HOSTILE.encode())])
    (folder / "shards" / "00002_stats.json").write_text("{}")
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


class Seen(HTMLParser):
    """Tags, embedded pictures and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.pictures, self.text, self.attributes = [], [], "", set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def page_of(made, tmp_path, *options):
    path = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(made / "latents"), "-o", str(path), *options])
    assert result.exit_code == 0, result.output
    return path.read_text()


def test_the_page_shows_the_decoded_bits_beside_their_captions(made, tmp_path):
    seen = Seen(page_of(made, tmp_path))
    dataset = LatentDataset(str(made / "latents"))
    assert len(seen.pictures) == sum(c.samples for c in dataset.manifest.classes)
    tokenizer = load_tokenizer(made / "tokenizer")
    record = dataset.record(64, 0)
    bits = torch.from_numpy(unpack_bits(record.bits, record.h, record.w, 16)).float()
    with torch.inference_mode():
        decoded = tokenizer.decode(bits.T.unflatten(1, (record.h, record.w))[None])
    expected = to_uint8(decoded)[0].permute(1, 2, 0).numpy()
    place = dataset.classes[32].samples  # the first picture of the second class
    shown = seen.pictures[place]
    assert shown["alt"] == record.key
    data = base64.b64decode(shown["src"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
    assert record.caption in seen.text


def test_captions_are_text_and_nothing_is_loaded_or_run(made, tmp_path):
    page = page_of(made, tmp_path)
    seen = Seen(page)
    assert HOSTILE in seen.text
    assert "script" not in seen.tags and not any(name.startswith("on") for name in seen.attributes)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "default-src 'none'" in page


def test_counts_are_those_of_the_side_index(made):
    dataset = LatentDataset(str(made / "latents"))
    look = look_at(dataset, 3, None)
    for shown, section in zip(look.classes, dataset.manifest.classes, strict=True):
        index = dataset.classes[section.resolution]
        assert len(shown.shown) == 3
        assert shown.lengths.sum() == sum(shown.buckets.values()) == section.samples
        assert int((shown.lengths * np.arange(len(shown.lengths))).sum()) == int(index.n_text.sum())
        assert (
            list(shown.buckets.values()) == np.bincount(index.bucket, minlength=len(section.buckets)).tolist()
        )
    # The one with the script has no score of its own.
    assert set(look.scores) == {"aesthetic"} and len(look.scores["aesthetic"]) == look.records_read - 2


def test_the_funnel_of_a_given_filter_is_drawn(made, tmp_path):
    funnel = Funnel(900, (FunnelStep("aesthetic >= <5>", 900, 123),), {}, 1.0)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "funnel.json").write_text(funnel.to_json())
    page = page_of(made, tmp_path, "--filter", str(tmp_path / "kept"))
    assert "aesthetic &gt;= &lt;5&gt;" in page and "777" in page
    assert "No filter" in page_of(made, tmp_path)
    with pytest.raises(DataError, match="no output of `bitdance data filter`"):
        look_at(LatentDataset(str(made / "latents")), 1, tmp_path)


def test_another_tokenizer_is_refused_and_a_moved_one_is_found(made, tmp_path):
    dataset = LatentDataset(str(made / "latents"))
    assert tokenizer_folder(dataset, None) == made / "tokenizer"
    write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="fingerprint"):
        tokenizer_folder(dataset, tmp_path / "other")
    with pytest.raises(RecipeError, match="--tokenizer FOLDER"):
        tokenizer_folder(dataset, tmp_path / "nowhere")


def test_histograms_lose_no_value():
    values = np.random.default_rng(0).normal(size=1000)
    edges, counts = histogram(values, 48)
    assert counts.sum() == 1000 and edges[0] == values.min() and edges[-1] == values.max()
    edges, counts = histogram(np.full(7, 5.0), 48)
    assert counts.sum() == 7 and edges[0] < 5.0 < edges[-1]
    for longest in (0, 1, 47, 48, 500):
        lengths = np.random.default_rng(longest).integers(0, 9, longest + 1)
        edges, counts = length_histogram(lengths, 48)
        assert counts.sum() == lengths.sum() and len(counts) <= 48 and edges[-1] > longest


def test_a_dataset_that_is_not_finished_has_no_page(tmp_path):
    (tmp_path / "latents").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "latents")])
    assert isinstance(result.exception, DataError)
    assert not list(tmp_path.rglob("*.html"))
