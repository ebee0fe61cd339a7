"""The metadata filter: one schema for all releases, rules against plain definitions, joins, duplicates."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plain_laion_hash import plain_laion_hash

from data_pipeline.metadata import filtering
from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.laion_hash import laion_hash
from data_pipeline.metadata.recipe import FilterRecipe
from foundation.errors import DataError, RecipeError
from foundation.recipes import load_recipe

ANY = {"rule": "size", "area_min": 1, "missing": "keep"}


def recipe(sources, output, rules, **more):
    return FilterRecipe.model_validate(
        {"sources": [str(s) for s in sources], "output": str(output), "rules": rules} | more
    )


def kept(tmp_path, table, rules, **more):
    """Urls that are kept, in order, and the funnel."""
    number = len(list(tmp_path.glob("out*")))
    source = tmp_path / f"in{number}.parquet"
    pq.write_table(pa.table(table), source)
    funnel = run_filter(recipe([source], tmp_path / f"out{number}", rules, **more))
    rows = pq.read_table(tmp_path / f"out{number}" / "kept.parquet")
    return rows["url"].to_pylist(), funnel


def test_all_releases_become_one_schema(tmp_path):
    tables = {
        "laion": {"URL": ["u1"], "TEXT": ["one"], "WIDTH": [640.0], "HEIGHT": [480.0], "similarity": [0.3],
                  "punsafe": [0.1], "pwatermark": [0.2], "AESTHETIC_SCORE": [6.0], "hash": [-5]},
        "coyo": {"id": [7], "url": ["u2"], "text": ["two"], "width": [100], "height": [200],
                 "clip_similarity_vitl14": [0.25], "watermark_score": [0.5],
                 "aesthetic_score_laion_v2": [5.0]},
        "datacomp": {"uid": ["ab" * 16], "url": ["u3"], "text": ["three"], "original_width": [10],
                     "original_height": [20], "clip_l14_similarity_score": pa.array([0.5], pa.float32())},
        "recap": {"url": ["u4"], "re_caption": ["better four"], "org_caption": ["four"], "sha256": ["cd"],
                  "re_clip_score": [0.4], "org_clip_score": [0.3]},
    }  # fmt: skip
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    run_filter(recipe([tmp_path / "*.parquet"], tmp_path / "out", [ANY], caption="recaption"))
    rows = {row["url"]: row for row in pq.read_table(tmp_path / "out" / "kept.parquet").to_pylist()}
    assert rows["u1"]["width"] == 640 and rows["u1"]["hash"] == -5 and rows["u1"]["watermark"] == 0.2
    assert rows["u2"]["uid"] == "7" and rows["u2"]["clip_l14"] == 0.25 and rows["u2"]["aesthetic"] == 5.0
    assert rows["u3"]["height"] == 20 and rows["u3"]["clip_l14"] == 0.5 and rows["u3"]["caption"] == "three"
    assert rows["u4"]["caption"] == "better four" and rows["u4"]["recaption_clip"] == 0.4


def test_bounds_are_strict_or_not_as_they_say(tmp_path):
    table = {"url": list("abcd"), "aesthetic": [4.0, 5.0, 6.0, None]}
    for rule, expected in [
        ({"above": 5.0}, ["c"]),
        ({"min": 5.0}, ["b", "c"]),
        ({"below": 5.0}, ["a"]),
        ({"max": 5.0}, ["a", "b"]),
        ({"min": 5.0, "missing": "keep"}, ["b", "c", "d"]),
    ]:
        urls, _ = kept(tmp_path, table, [{"rule": "score", "column": "aesthetic"} | rule])
        assert urls == expected


def test_a_score_that_is_no_number_passes_no_bound(tmp_path):
    table = {"url": list("abc"), "aesthetic": [float("nan"), 6.0, float("nan")]}
    assert kept(tmp_path, table, [{"rule": "score", "column": "aesthetic", "min": 1.0}])[0] == ["b"]


def test_texts_that_are_no_numbers_are_counted(tmp_path):
    table = {"url": list("abc"), "WIDTH": ["640", "wide", None], "HEIGHT": ["480", "3", "4"]}
    urls, funnel = kept(tmp_path, table, [{"rule": "size", "shorter_min": 1}])
    assert urls == ["a"]
    assert funnel.uncastable == {"width": 1}


def test_random_rows_against_the_plain_definition(tmp_path):
    rng = random.Random(0)
    rows = [
        {
            "url": f"https://{rng.choice(['a.com', 'WWW.B.org', 'c.net:80'])}/{i}",
            "text": " ".join(rng.choice(["cat", "dog", "x", "Free", "ein"]) for _ in range(rng.randint(0, 6)))
            or None,
            "width": rng.choice([None, 100, 300, 400, 900, 1000, 2000]),
            "height": rng.choice([None, 100, 300, 400, 900, 1000, 2000]),
            "language": rng.choice(["en", "EN", "de", None]),
            "punsafe": rng.choice([None, 0.05, 0.5]),
        }
        for i in range(3000)
    ]
    rules = [
        {"rule": "size", "shorter_min": 200, "longer_max": 1999},
        {"rule": "aspect", "max": 2.0},
        {"rule": "caption", "words_min": 2, "words_max": 5, "chars_min": 6, "without": ["free"]},
        {"rule": "language", "allow": ["en"], "missing": "keep"},
        {"rule": "score", "column": "punsafe", "below": 0.1, "missing": "keep"},
        {"rule": "deny", "by": "domain", "values": ["www.b.org"]},
    ]

    def passes(row):
        w, h, words = row["width"], row["height"], (row["text"] or "").split()
        yield w is not None and h is not None and min(w, h) >= 200 and max(w, h) <= 1999
        yield max(w, h) / min(w, h) <= 2.0
        text = (row["text"] or "").strip()
        yield 2 <= len(words) <= 5 and len(text) >= 6 and "free" not in [word.lower() for word in words]
        yield row["language"] is None or row["language"].lower() == "en"
        yield row["punsafe"] is None or row["punsafe"] < 0.1
        yield "b.org" not in row["url"].lower()

    steps = [0] * len(rules)
    expected = []
    for row in rows:
        for place, ok in enumerate(passes(row)):
            if not ok:
                steps[place] += 1
                break
        else:
            expected.append(row["url"])
    table = {name: [row[name] for row in rows] for name in rows[0]}
    urls, funnel = kept(tmp_path, table, rules)
    assert urls == expected
    assert [step.dropped for step in funnel.steps] == steps
    assert all(steps), "a rule that drops nothing here is not tested"


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_top_fraction_is_exact(tmp_path, fraction):
    scores = np.random.default_rng(1).permutation(np.r_[np.linspace(-1, 1, 900), np.full(100, 0.25)])
    table = {"url": [str(i) for i in range(1000)], "similarity": scores}
    urls, _ = kept(tmp_path, table, [{"rule": "top_fraction", "column": "similarity", "fraction": fraction}])
    threshold = np.sort(scores)[::-1][max(1, round(1000 * fraction)) - 1]
    assert urls == [str(i) for i in range(1000) if scores[i] >= threshold]


def test_top_fraction_counts_rows_that_earlier_rules_kept(tmp_path):
    table = {
        "url": [str(i) for i in range(100)],
        "similarity": np.arange(100.0),
        "aesthetic": np.arange(100.0) % 2,
    }
    rules = [
        {"rule": "score", "column": "aesthetic", "below": 1},
        {"rule": "top_fraction", "column": "similarity", "fraction": 0.1},
    ]
    assert kept(tmp_path, table, rules)[0] == ["90", "92", "94", "96", "98"]


def test_duplicates_keep_the_best_then_the_earliest(tmp_path):
    table = {
        "url": [
            "http://www.Site.com/A/",
            "https://site.com:443/A#top",
            "https://site.com/a",
            "http://site.com:8080/A",
            "https://user@site.com/A",
            "https://site.com/A?x=1",
        ],
        "aesthetic": [5.0, 6.0, 9.0, 1.0, 6.0, None],
    }
    rule = {"rule": "deduplicate", "by": "url", "prefer": [{"column": "aesthetic"}]}
    urls, funnel = kept(tmp_path, table, [rule])
    assert urls == [table["url"][i] for i in (1, 2, 3, 5)]
    assert funnel.steps[0].dropped == 2
    rule["prefer"][0]["order"] = "lowest"
    assert kept(tmp_path, table, [rule])[0] == [table["url"][i] for i in (0, 2, 3, 5)]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("http://user:pw@h.example/a", "h2://H.example:443/a/", True),
        ("http://h.example:80", "https://www.h.example/", True),
        ("http://h.example:8080/a", "http://h.example/a", False),
        ("http://h.example/a?q=1#x", "http://h.example/a?q=1", True),
        ("http://h.example/a?q=1", "http://h.example/a?q=2", False),
        ("http://h.example:0443/a", "http://h.example/a", False),
        ("no address", "no address", False),
        ("", "", False),
    ],
)
def test_urls_that_count_as_the_same(tmp_path, one, other, equal):
    found, _ = kept(tmp_path, {"url": [one, other]}, [{"rule": "deduplicate", "by": "url"}])
    assert found == ([one] if equal else [one, other])


@pytest.mark.parametrize("form", ["values", "text", "parquet"])
@pytest.mark.parametrize("rule", ["allow", "deny"])
def test_lists_of_urls_compare_them_as_duplicates_do(tmp_path, rule, form):
    listed = ["http://Example.org/x", "https://b.example:443/y?q=1#z", "no url"]
    if form == "text":
        (tmp_path / "list.txt").write_text("\n".join(listed))
    if form == "parquet":
        pq.write_table(pa.table({"url": listed}), tmp_path / "list.parquet")
    file = str(tmp_path / {"text": "list.txt"}.get(form, "list.parquet"))
    where = {"values": listed} if form == "values" else {"file": file}
    on = ["https://www.example.org/x/", "http://B.example/y?q=1", "no url"]
    off = ["https://example.org/X", "https://b.example:8080/y?q=1", "NO URL", ""]
    urls, _ = kept(tmp_path, {"url": on + off}, [{"rule": rule, "by": "url"} | where])
    assert urls == (on if rule == "allow" else off)


def test_rows_without_a_value_are_no_duplicates(tmp_path):
    table = {"url": list("abcd"), "sha256": [None, None, "X", "x"]}
    assert kept(tmp_path, table, [{"rule": "deduplicate", "by": "sha256"}])[0] == ["a", "b", "c"]


def test_joins_by_hash_and_their_duplicates(tmp_path):
    extra = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"h": [1, 1, 2], "score": [4.0, 7.0, 3.0]}), extra)
    table = {"url": list("abc"), "hash": [1, 2, 3], "aesthetic": [None, None, 8.0]}
    join = {"files": [str(extra)], "by": "hash", "key": "h", "columns": {"aesthetic": "score"}}
    join["prefer"] = [{"column": "aesthetic"}]
    urls, funnel = kept(tmp_path, table, [{"rule": "score", "column": "aesthetic", "min": 5}], joins=[join])
    assert urls == ["a", "c"]
    assert funnel.rows == 3  # a duplicate in the joined table makes no row twice


def best_of_tables(tables, prefer):
    """Key -> (caption, score) by the plain definition: the best by score, then the earliest."""
    best = {}
    for table in tables:
        for key, caption, score in zip(table["sha"], table["c"], table["s"], strict=True):
            sign = {"highest": -1, "lowest": 1, None: 0}[prefer]
            rank = (score is None, sign * (score or 0)) if sign else ()
            if key and (key not in best or rank < best[key][0]):
                best[key] = (rank, caption, score)
    return {key: values for key, (_, *values) in best.items()}


@pytest.mark.parametrize("prefer", [None, "highest", "lowest"])
def test_of_several_joined_rows_of_a_key_one_counts_as_a_whole(tmp_path, prefer):
    rng = random.Random(5)
    tables = []
    for number in range(3):
        count = 80
        tables.append(
            {
                "sha": [rng.choice([None, "", *(f"{n:02x}" for n in range(40))]) for _ in range(count)],
                "c": [f"caption {number} {row}" for row in range(count)],
                "s": [rng.choice([None, 1.0, 2.0, 3.0]) for _ in range(count)],
            }
        )
        pq.write_table(pa.table(tables[-1]), tmp_path / f"better{number}.parquet")
    join = {
        "files": [str(tmp_path / "better*.parquet")],
        "by": "sha256",
        "key": "sha",
        "columns": {"recaption": "c", "recaption_clip": "s"},
        "prefer": [{"column": "recaption_clip", "order": prefer}] if prefer else [],
    }
    everything = {"rule": "caption", "chars_max": 99}
    table = {
        "url": [f"u{n}" for n in range(50)],
        "caption": [""] * 50,
        "sha256": ["", *(f"{n:02X}" for n in range(49))],
    }
    urls, _ = kept(tmp_path, table, [everything], joins=[join])
    rows = pq.read_table(tmp_path / "out0" / "kept.parquet")
    assert urls == table["url"]
    expected = best_of_tables(tables, prefer)
    found = zip(
        table["sha256"], rows["recaption"].to_pylist(), rows["recaption_clip"].to_pylist(), strict=True
    )
    assert {key.lower(): [caption, score] for key, caption, score in found} == {
        key.lower(): expected.get(key.lower(), [None, None]) for key in table["sha256"]
    }


def test_a_join_prefers_by_a_column_that_it_joins():
    join = {"files": ["a"], "by": "uid", "columns": {"recaption": "c"}, "prefer": [{"column": "aesthetic"}]}
    with pytest.raises(ValueError, match="aesthetic is not among the joined columns"):
        recipe(["a.parquet"], "out", [ANY], joins=[join])


def test_datacomp_subsets_in_and_out(tmp_path):
    uids = [f"{i:016x}{i * i:016x}" for i in (0, 1, 2**63, 2**64 - 1)]
    uids[3] = "f" * 32
    subset = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in (uids[1], uids[3])], dtype="u8,u8")
    np.save(tmp_path / "subset.npy", subset)
    table = {"uid": [*uids, "short"], "url": list("abcde")}
    urls, _ = kept(tmp_path, table, [{"rule": "allow", "by": "uid", "file": str(tmp_path / "subset.npy")}])
    assert urls == ["b", "d"]
    written = np.load(tmp_path / "out0" / "subset.npy", allow_pickle=False)
    assert written.dtype == np.dtype("u8,u8")
    assert written.tolist() == subset.tolist()
    urls, _ = kept(tmp_path, table, [{"rule": "deny", "by": "uid", "file": str(tmp_path / "subset.npy")}])
    assert urls == ["a", "c", "e"]


def test_a_written_subset_is_sorted_whatever_its_size_and_absent_without_uids(tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "SUBSET_BATCH", 2048)
    uids = [random.Random(i).randbytes(16).hex() for i in range(10_000)]
    table = {"uid": uids, "url": [str(i) for i in range(10_000)]}
    kept(tmp_path, table, [{"rule": "deny", "by": "url", "values": ["0"]}])
    written = np.load(tmp_path / "out0" / "subset.npy", allow_pickle=False)
    assert written.dtype == np.dtype("u8,u8")
    assert written.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u in uids[1:])
    kept(tmp_path, {"url": ["a"]}, [{"rule": "deny", "by": "url", "values": ["0"]}])
    assert not (tmp_path / "out1" / "subset.npy").exists()


@pytest.mark.parametrize(
    ("word", "caption", "found"),
    [
        ("caf", "a café in Paris", False),
        ("caf", "a cafe\u0301", False),
        ("cafe", "a cafe\u0301", False),  # the accent is a character of its own
        ("caf", "a (caf)", True),
        ("café", "Le CAFÉ.", True),
        ("logo", "логотипlogo", False),
        ("рис", "рисунок кота", False),
        ("рис", "кот, Рис", True),
        ("ein", "Reineke ein\u00a0Fuchs", True),
        ("ein", "Reineke, das Schwein", False),
        ("σ", "σκύλος", False),
        ("free", "free_stock 4free", False),
        ("घर", "घरों में", False),
        ("घर", "एक घर।", True),
        ("猫", "黒猫がいる", True),
        ("แมว", "รูปแมวดำ", True),
        ("stock photo", "Stock photo", True),
        ("c++", "learn C++ now", True),
    ],
)
def test_captions_without_a_word_have_it_nowhere_as_a_whole(tmp_path, word, caption, found):
    rule = {"rule": "caption", "without": [word]}
    urls, _ = kept(tmp_path, {"url": ["a", "b"], "text": [caption, "other"]}, [rule])
    assert urls == (["b"] if found else ["a", "b"])


def test_lists_from_text_files(tmp_path):
    (tmp_path / "urls.txt").write_text("b\n\n c \n")
    rule = {"rule": "deny", "by": "url", "file": str(tmp_path / "urls.txt")}
    assert kept(tmp_path, {"url": list("abcd")}, [rule])[0] == ["a", "d"]


def test_again_is_done_already_and_another_recipe_is_refused(tmp_path, capsys):
    pq.write_table(pa.table({"url": ["a"], "width": [5], "height": [5]}), tmp_path / "in.parquet")
    first = recipe([tmp_path / "in.parquet"], tmp_path / "out", [ANY])
    run_filter(first)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    run_filter(first)
    assert "done already" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(RecipeError, match=r"rules\.0\.area_min: 1 -> 2"):
        run_filter(recipe([tmp_path / "in.parquet"], tmp_path / "out", [ANY | {"area_min": 2}]))


def test_bad_input_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        run_filter(recipe([tmp_path / "none*.parquet"], tmp_path / "out", [ANY]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"\(1 problem\):\n .*empty: a folder without parquet files .*$"):
        run_filter(recipe([tmp_path / "empty"], tmp_path / "out", [ANY]))
    (tmp_path / "empty").rmdir()
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    pq.write_table(pa.table({"something": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError) as error:
        run_filter(recipe([tmp_path / "bad.parquet", tmp_path / "other.parquet"], tmp_path / "out", [ANY]))
    assert "bad.parquet" in str(error.value) and "other.parquet" in str(error.value)
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "good.parquet")
    with pytest.raises(RecipeError, match="no source has the column 'aesthetic'"):
        rules = [{"rule": "score", "column": "aesthetic", "min": 1}]
        run_filter(recipe([tmp_path / "good.parquet"], tmp_path / "out", rules))
    with pytest.raises(DataError, match="No row is left"):
        rules = [{"rule": "deny", "by": "url", "values": ["a"]}]
        run_filter(recipe([tmp_path / "good.parquet"], tmp_path / "out", rules))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.parquet", "good.parquet", "other.parquet"]


def test_sql_in_values_stays_a_value(tmp_path):
    nasty = "x'); DROP TABLE list_0; --"
    rule = {"rule": "deny", "by": "url", "values": [nasty]}
    assert kept(tmp_path, {"url": ["a", nasty], "text": ["it's", "b"]}, [rule])[0] == ["a"]
    rule = {"rule": "caption", "without": ["it's", "a+b"]}
    assert kept(tmp_path, {"url": ["a", "b"], "text": ["so it's it", "aab"]}, [rule])[0] == ["b"]


def test_the_funnel_is_written(tmp_path):
    _, funnel = kept(
        tmp_path,
        {"url": list("abc"), "width": [1, 2, 3], "height": [1, 2, 3]},
        [{"rule": "size", "area_min": 4}],
    )
    written = json.loads((tmp_path / "out0" / "funnel.json").read_text())
    assert written["rows"] == 3 and written["kept"] == 2 == funnel.kept
    assert (tmp_path / "out0" / "funnel.png").read_bytes().startswith(b"\x89PNG")


FIXTURES = Path(os.environ.get("GOLDEN_DIR", "../shared/golden")).parent / "fixtures"
FIXTURE = FIXTURES / "derived_laion_style" / "laion2B-en-aesthetic-style.snappy.parquet"


def hashes(urls, texts):
    return laion_hash(pa.array(urls, pa.string()), pa.array(texts, pa.string())).to_pylist()


def test_hash_of_murmur3_known_values():
    # First halves of MurmurHash3_x64_128, seed 0, as its reference implementation gives them.
    hello = int.from_bytes(bytes.fromhex("cbd8a7b341bd9b02"), "big", signed=True)
    assert hashes(["", "hello", "he", None], ["", None, "llo", None]) == [0, hello, hello, 0]
    assert hashes([], []) == []


def test_hash_is_that_of_the_plain_definition():
    """For all lengths around a block's, a long one, nulls, and letters of up to four bytes."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("aä€😀 ", k=length)) for length in [*range(70), *range(70), 5000]]
    texts = [*texts, None, *("x" * length for length in range(70)), None]
    urls = rng.sample(texts, len(texts))
    plain = [plain_laion_hash(url, text) for url, text in zip(urls, texts, strict=True)]
    assert hashes(urls, texts) == plain
    piece = slice(40, 90)
    assert laion_hash(pa.array(urls)[piece], pa.array(texts)[piece]).to_pylist() == plain[piece]


@pytest.mark.skipif(not FIXTURE.exists(), reason="no LAION-Aesthetics table at hand")
def test_hash_agrees_with_a_real_table():
    table = pq.read_table(FIXTURE)
    assert hashes(table["URL"].to_pylist(), table["TEXT"].to_pylist()) == table["hash"].to_pylist()


@pytest.mark.parametrize("lacking", ["source", "scores", "both"])
def test_a_hash_that_is_absent_is_computed_for_joins(tmp_path, lacking):
    urls, texts = [f"https://a.example/{i}" for i in range(5000)], [f"text {i}" for i in range(4999)] + [None]
    hashed = {"hash": [plain_laion_hash(url, text) for url, text in zip(urls, texts, strict=True)]}
    source = {"URL": urls, "TEXT": texts} | ({} if lacking in ("source", "both") else hashed)
    scores = {"URL": urls, "TEXT": texts} if lacking in ("scores", "both") else hashed
    pq.write_table(pa.table(scores | {"score": np.arange(5000.0)}), tmp_path / "scores.parquet")
    join = {"files": [str(tmp_path / "scores.parquet")], "by": "hash", "columns": {"aesthetic": "score"}}
    found, _ = kept(tmp_path, source, [{"rule": "score", "column": "aesthetic", "min": 4000}], joins=[join])
    assert found == urls[4000:]
    assert pq.read_table(tmp_path / "out0" / "kept.parquet")["hash"].to_pylist() == hashed["hash"][4000:]


def test_rows_are_deduplicated_by_a_hash_that_is_computed(tmp_path):
    table = {"url": ["ab", "a", "ab", "b"], "text": ["c", "bc", "d", None]}  # the first two: one text
    assert kept(tmp_path, table, [{"rule": "deduplicate", "by": "hash"}])[0] == ["ab", "ab", "b"]


def test_a_misspelled_rule_and_a_bad_join_are_reported_together(tmp_path):
    """With the nearest valid name, and although other keys are wrong, too."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources: [a.parquet]\noutput: out\ncaption: best\n"
        "rules:\n  - {rule: scores, column: aesthetic, min: 5}\n  - {rule: xyz}\n"
        "joins:\n  - {files: [b.parquet], by: uidd, columns: {urls: u}}\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(FilterRecipe, path)
    message = str(error.value)
    assert "unknown rule 'scores' (did you mean 'score'?)" in message
    assert "unknown rule 'xyz' (valid rules: " in message
    assert "urls cannot be joined" in message and "4 problems" not in message and "5 problems" in message


def test_a_language_rule_reads_the_column_and_says_when_there_is_none(tmp_path):
    rows = {"url": list("abcd"), "LANGUAGE": ["en", "EN", "de", None]}
    pq.write_table(pa.table(rows), tmp_path / "with.parquet")
    pq.write_table(pa.table({"url": list("efgh")}), tmp_path / "without.parquet")
    values = {"rules": [{"rule": "language", "allow": ["en"]}], "output": str(tmp_path / "out")}
    both = values | {"sources": [str(tmp_path / "*.parquet")]}
    run_filter(FilterRecipe.model_validate(both))
    assert pq.read_table(tmp_path / "out" / "kept.parquet")["url"].to_pylist() == ["a", "b"]
    with pytest.raises(RecipeError, match=r"language in en.*no source has the column 'language'") as error:
        run_filter(
            FilterRecipe.model_validate(
                values | {"sources": [str(tmp_path / "without.parquet")], "output": str(tmp_path / "none")}
            )
        )
    assert "joins" in str(error.value)


def test_a_subset_that_is_a_pickle_is_not_read(tmp_path):
    """An array of objects would run what it contains."""
    np.save(tmp_path / "subset.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    pq.write_table(pa.table({"uid": ["0" * 32]}), tmp_path / "rows.parquet")
    values = {
        "sources": [str(tmp_path / "rows.parquet")],
        "output": str(tmp_path / "out"),
        "rules": [{"rule": "allow", "by": "uid", "file": str(tmp_path / "subset.npy")}],
    }
    with pytest.raises(DataError, match=r"subset\.npy cannot be read"):
        run_filter(FilterRecipe.model_validate(values))
