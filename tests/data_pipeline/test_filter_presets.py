"""The published filter recipes: each keeps what its release states, at the bounds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import FilterRecipe
from foundation.recipes import load_recipe

RECIPES = [*sorted(Path("configs/data/filters").glob("*.yaml")), Path("configs/quickstart/filter.yaml")]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_published_recipes_load(path):
    assert load_recipe(FilterRecipe, path).rules


LAION = {"URL": "https://a.example/1", "TEXT": "t", "WIDTH": 512.0, "HEIGHT": 512.0, "punsafe": 0.05,
         "pwatermark": 0.1, "AESTHETIC_SCORE": 8.0}  # fmt: skip
DATACOMP = {"url": "https://a.example/1", "text": "one of three", "original_width": 600,
            "original_height": 200, "clip_l14_similarity_score": 0.3}  # fmt: skip
SAME_URL = {"URL": "http://www.A.example:80/1/#top", "AESTHETIC_SCORE": 7.9}
SAME_UID = {"uid": f"{0:032x}"}
# Published choice -> a row that it keeps, and changes to it within and beyond its bounds.
CHOICES = {
    "sd2": (
        LAION,
        [{"AESTHETIC_SCORE": 4.5}, {"punsafe": 0.099}, {"WIDTH": 256.0, "HEIGHT": 1024.0}],
        [{"AESTHETIC_SCORE": 4.49}, {"punsafe": 0.1}, {"WIDTH": 511.0}, SAME_URL],
    ),
    "laion_aesthetic": (
        LAION,
        [{"AESTHETIC_SCORE": 7.01}, {"pwatermark": 0.79}, {"punsafe": 0.49}, {"WIDTH": 1.0}],
        [{"AESTHETIC_SCORE": 7.0}, {"pwatermark": 0.8}, {"punsafe": 0.5}, SAME_URL],
    ),
    "datacomp_basic": (
        DATACOMP,
        [{"text": "a b cd"}, {"original_width": 200}],
        [{"text": "two words"}, {"text": "a b c"}, {"original_width": 601}, {"original_height": 199},
         {"language": "de"}, {"language": None}, SAME_UID],
    ),
    "datacomp_1b": (
        DATACOMP,
        [{"text": "ab cde"}, {"original_height": 1}],
        [{"text": "single"}, {"text": "ab c"}, {"language": "de"}, {"listed": False}, SAME_UID,
         {"clip_l14_similarity_score": 0.2}, *[{"clip_l14_similarity_score": 0.1}] * 18],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_published_choices_keep_what_they_state(tmp_path, name):
    base, within, beyond = CHOICES[name]
    address = next(key for key in base if key.lower() == "url")
    rows = [
        base | {address: f"https://a.example/{i + 1}", "uid": f"{i:032x}", "sha256": f"{i:02x}"} | change
        for i, change in enumerate([{}, *within, *beyond])
    ]
    columns = [*base, "uid", "sha256"]
    pq.write_table(pa.table({c: [row[c] for row in rows] for c in columns}), tmp_path / "in.parquet")
    languages = {"uid": [row["uid"] for row in rows], "language": [row.get("language", "en") for row in rows]}
    pq.write_table(pa.table(languages), tmp_path / "languages.parquet")
    recaptions = [[0.2, 0.4], ["a worse caption", "a better caption"]]
    better = {"sha256": ["00", "00"], "re_clip_score": recaptions[0], "re_caption": recaptions[1]}
    pq.write_table(pa.table(better), tmp_path / "better.parquet")
    listed = sorted((0, int(row["uid"], 16)) for row in rows if row.get("listed", True))
    np.save(tmp_path / "list.npy", np.array(listed, "u8,u8"))
    changes = [f"sources=[{tmp_path}/in.parquet]", f"output={tmp_path}/out"]
    if base is DATACOMP:
        changes.append(f"joins.0.files=[{tmp_path}/languages.parquet]")
    if name == "datacomp_1b":
        changes += [f"joins.1.files=[{tmp_path}/better.parquet]", f"rules.3.file={tmp_path}/list.npy"]
    run_filter(load_recipe(FilterRecipe, f"configs/data/filters/{name}.yaml", changes))
    found = pq.read_table(tmp_path / "out" / "kept.parquet")
    assert found["url"].to_pylist() == [f"https://a.example/{i + 1}" for i in range(1 + len(within))]
    if name == "datacomp_1b":
        assert found["caption"].to_pylist() == ["a better caption", "ab cde", "one of three"]
