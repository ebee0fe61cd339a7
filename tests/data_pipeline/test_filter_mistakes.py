"""What users and their files can get wrong in a filter ends in a message, or in what they meant."""

import hashlib
import math
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.download.run import run_download
from data_pipeline.finalize import finalize_dataset
from data_pipeline.ingest.kept import KeptRows, identity, index_folder
from data_pipeline.ingest.recipe import KeepSection
from data_pipeline.ingest.samples import RawSample
from data_pipeline.metadata.engine import group_files, open_engine
from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import EngineSection, FilterRecipe
from data_pipeline.metadata.schema import COLUMNS
from data_pipeline.store import PlaceUnusable
from foundation.errors import DataError, RecipeError
from foundation.ownership import FolderTaken

ALL = {"rule": "deny", "by": "url", "values": ["none"]}


def filtered(tmp_path, table, *rules, **more):
    """Urls that are kept."""
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    values = {
        "sources": [str(tmp_path / "in.parquet")],
        "output": str(tmp_path / "out"),
        "rules": list(rules),
    }
    run_filter(FilterRecipe.model_validate(values | more))
    return pq.read_table(tmp_path / "out" / "kept.parquet")["url"].to_pylist()


HOSTS = {
    "https://bad.example/1": True,
    "https://www.bad.example/2": True,
    "HTTP://User@A.B.Bad.Example.:8080/3": True,
    "https://notbad.example/4": False,
    "https://bad.example.org/5": False,
    "https://example/6": False,
    "https://deep.worse.co.example/7": True,
    "https://co.example/8": False,
    "no address": False,
}


@pytest.mark.parametrize("rule", ["allow", "deny"])
@pytest.mark.parametrize("form", ["values", "text", "parquet"])
def test_a_domain_stands_for_all_hosts_below_it(tmp_path, rule, form):
    domains = ["bad.example", "*.Worse.co.example"]
    entry = {"rule": rule, "by": "domain"}
    if form == "values":
        entry["values"] = domains
    elif form == "text":
        (tmp_path / "list.txt").write_text("\n".join(domains) + "\n")
        entry["file"] = str(tmp_path / "list.txt")
    else:
        pq.write_table(pa.table({"domain": domains}), tmp_path / "list.parquet")
        entry["file"] = str(tmp_path / "list.parquet")
    found = filtered(tmp_path, {"url": list(HOSTS)}, entry)
    assert found == [url for url, listed in HOSTS.items() if listed == (rule == "allow")]


@pytest.mark.parametrize("by", ["uid", "sha256"])
@pytest.mark.parametrize("form", ["values", "text", "parquet"])
def test_digests_are_the_same_in_either_case(tmp_path, by, form):
    """In lists, in joins, among duplicates, and where samples are joined; other texts keep their case."""
    plain = [hashlib.sha256(bytes([i])).hexdigest()[: 32 if by == "uid" else 64] for i in range(4)]
    table = {by: [plain[0].upper(), plain[1], plain[1].upper(), f" {plain[2]} ", plain[3], "Xy", "xY"]}
    table["url"] = list("abcdefg")
    listed = [plain[0], plain[1].upper(), plain[2].upper(), "xY"]
    entry = {"rule": "allow", "by": by}
    if form == "values":
        entry["values"] = [f" {value}" for value in listed]
    elif form == "text":
        (tmp_path / "list.txt").write_text("\n".join(listed) + "\n")
        entry["file"] = str(tmp_path / "list.txt")
    else:
        pq.write_table(pa.table({by: listed}), tmp_path / "list.parquet")
        entry["file"] = str(tmp_path / "list.parquet")
    pq.write_table(pa.table({by: plain[:2] + listed[2:], "score": [9.0] * 4}), tmp_path / "scores.parquet")
    join = {"files": [str(tmp_path / "scores.parquet")], "by": by, "columns": {"aesthetic": "score"}}
    rules = [entry, {"rule": "score", "column": "aesthetic", "min": 9.0}, {"rule": "deduplicate", "by": by}]
    assert filtered(tmp_path, table, *rules, joins=[join]) == list("abdg")
    keep = KeepSection(rows=str(tmp_path / "out" / "kept.parquet"), by=by)
    samples = [RawSample("", b"", None, {by: value}) for value in (*listed, plain[3], "Xy")]
    names = [identity(sample, by) for sample in samples]
    rows = KeptRows(by, index_folder(keep)).rows(names)
    assert [name in rows for name in names] == [True] * 4 + [False] * 2


def test_an_empty_output_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    assert filtered(tmp_path, {"url": ["a"]}, ALL) == ["a"]


@pytest.mark.parametrize("output", ["file", "file/out", "full"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys, output):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "folder").mkdir(parents=True)
    said = "full is not empty" if output == "full" else f"{tmp_path / 'file'} is no folder"
    place = str(tmp_path / output)
    with pytest.raises(FolderTaken, match=said) as error:
        filtered(tmp_path, {"url": ["a"]}, ALL, output=place)
    assert error.value.exit_code == 78
    pq.write_table(pa.table({"url": ["http://a.example"], "caption": ["c"]}), tmp_path / "kept.parquet")
    values = {"rows": str(tmp_path / "kept.parquet"), "polite": {"contact": "mailto:a@b.example"}}
    with pytest.raises(FolderTaken, match=said):
        run_download(DownloadRecipe.model_validate(values | {"output": place}))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text() == "mine"


def test_a_filter_of_other_files_than_before_is_not_done_already(tmp_path, capsys):
    for name in ("in", "scores"):
        (tmp_path / name).mkdir()
    table = {"url": ["a", "b"], "score": [1.0, 2.0]}
    for path in ("in/0", "in/1", "scores/0"):
        pq.write_table(pa.table(table), tmp_path / f"{path}.parquet")
    (tmp_path / "deny.txt").write_text("none\n")
    join = {"files": [str(tmp_path / "scores")], "by": "url", "columns": {"aesthetic": "score"}}
    values = {
        "sources": [str(tmp_path / "in" / "*.parquet")],
        "output": str(tmp_path / "out"),
        "rules": [{"rule": "deny", "by": "url", "file": str(tmp_path / "deny.txt")}],
        "joins": [join],
    }
    recipe = FilterRecipe.model_validate(values)
    run_filter(recipe)
    os.utime(tmp_path / "deny.txt", (0, 0))
    run_filter(recipe)
    assert "done already" in capsys.readouterr().out
    pq.write_table(pa.table(table | {"url": ["a", "longer"]}), tmp_path / "scores" / "0.parquet")
    (tmp_path / "in" / "0.parquet").rename(tmp_path / "in" / "2.parquet")
    (tmp_path / "deny.txt").write_text("zero\n")
    said = r"out was made of other files: since then 1 new \(such as .*2\.parquet\), 1 gone \(such as .*"
    with pytest.raises(FolderTaken, match=said + r"0\.parquet\), 2 replaced .*remove this one"):
        run_filter(recipe)
    shutil.rmtree(tmp_path / "out")
    assert run_filter(recipe).kept == 4


EVEN = {"rule": "allow", "by": "url", "values": [str(n) for n in range(0, 60_000, 2)]}
ONE_IN_FOUR = {"rule": "deduplicate", "by": "sha256"}
ANY_SCORE = {"rule": "score", "column": "aesthetic", "min": 1.0}
HALF = {"rule": "top_fraction", "column": "aesthetic", "fraction": 0.5}


@pytest.mark.parametrize(
    ("rules", "step"),
    [
        ([{"rule": "caption", "chars_max": 9}], 1),
        ([ANY_SCORE], 1),
        ([EVEN], 2),
        ([ONE_IN_FOUR], 4),
        ([ANY_SCORE, EVEN, ONE_IN_FOUR, HALF], 4),
    ],
    ids=["plain", "join", "list", "duplicates", "all"],
)
def test_rows_stay_in_the_order_of_the_sources(tmp_path, rules, step):
    """On two threads, over several row groups, files and releases, which DuckDB works on side by side."""
    for place, part in enumerate((range(40_000), range(40_000, 50_000), range(50_000, 60_000))):
        table = {"url": [str(n) for n in part], "sha256": [str(n // 4) for n in part]}
        table["text" if place == 2 else "id"] = table["url"]
        pq.write_table(pa.table(table), tmp_path / f"{9 - place}.parquet", row_group_size=5000)
    scores = {"url": [str(n) for n in reversed(range(60_000))], "score": [1.0] * 60_000}
    pq.write_table(pa.table(scores), tmp_path / "scores.parquet")
    join = {"files": [str(tmp_path / "scores.parquet")], "by": "url", "columns": {"aesthetic": "score"}}
    values = {
        "sources": [str(tmp_path / f"{9 - place}.parquet") for place in range(3)],
        "output": str(tmp_path / "out"),
        "rules": rules,
        "joins": [join] if ANY_SCORE in rules else [],
        "engine": {"threads": 2},
    }
    run_filter(FilterRecipe.model_validate(values))
    kept = pq.read_table(tmp_path / "out" / "kept.parquet")
    assert kept.column_names == list(COLUMNS)
    assert kept["url"].to_pylist() == [str(n) for n in range(0, 60_000, step)]


def test_top_fraction_of_nothing_says_that_no_row_is_left(tmp_path):
    table = {"url": ["a", "b"], "aesthetic": [1.0, 2.0]}
    top = {"rule": "top_fraction", "column": "aesthetic", "fraction": 0.5}
    with pytest.raises(DataError, match="No row is left"):
        filtered(tmp_path, table, {"rule": "score", "column": "aesthetic", "min": 9.0}, top)
    with pytest.raises(DataError, match="No row is left"):
        filtered(tmp_path, {"url": ["a"], "aesthetic": [math.nan]}, top)


def test_scores_that_are_no_finite_numbers_count_as_missing(tmp_path):
    table = {"url": list("abcde"), "aesthetic": [math.inf, 1.0, math.nan, -math.inf, 3.0]}
    top = {"rule": "top_fraction", "column": "aesthetic", "fraction": 0.2}
    assert filtered(tmp_path, table, top) == ["e"]


def test_the_top_of_the_widest_range_of_numbers(tmp_path):
    table = {"url": list("abcd"), "aesthetic": [1.7e308, -1.7e308, 0.0, 1.0]}
    top = {"rule": "top_fraction", "column": "aesthetic", "fraction": 0.5}
    assert filtered(tmp_path, table, top) == ["a", "d"]


def test_joined_scores_that_are_no_finite_numbers_count_as_missing(tmp_path):
    scores = {"url": list("ab"), "score": [math.nan, 2.0]}
    pq.write_table(pa.table(scores), tmp_path / "scores.parquet")
    join = {"files": [str(tmp_path / "scores.parquet")], "by": "url", "columns": {"aesthetic": "score"}}
    rule = {"rule": "score", "column": "aesthetic", "min": 1.0}
    assert filtered(tmp_path, {"url": list("ab")}, rule, joins=[join]) == ["b"]


def test_labels_are_texts_and_may_be_the_same(tmp_path, capsys):
    odd = {"rule": "language", "allow": ["[/b]", "$x_{$"], "missing": "keep"}
    assert filtered(tmp_path, {"url": ["a"], "language": ["[/b]"]}, odd, odd) == ["a"]
    assert capsys.readouterr().out.count("language in [/b], $x_{$") == 2
    assert (tmp_path / "out" / "funnel.png").exists()


@pytest.mark.parametrize("side", [4e9, 2.0**63 - 1024])
@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ({"rule": "size", "area_min": 65536}, True),
        ({"rule": "size", "area_max": 4096 * 4096}, False),
        ({"rule": "aspect", "max": 3.0}, True),
        ({"rule": "aspect", "max": 1.7976931348623157e308}, True),
        ({"rule": "aspect", "max": 1.2345678901234567}, True),
    ],
)
def test_sides_that_no_picture_has_are_rows_like_others(tmp_path, side, rule, passes):
    table = {"url": ["a", "b"], "WIDTH": [600.0, side], "HEIGHT": [600.0, side]}
    assert filtered(tmp_path, table, rule) == ["a", "b"][: 1 + passes]


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["above", "min", "below", "max"])
def test_bounds_are_finite(tmp_path, name, bound):
    with pytest.raises(pydantic.ValidationError, match="finite"):
        filtered(tmp_path, {"url": ["a"]}, {"rule": "score", "column": "aesthetic", name: bound})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.txt", b"caf\xe9.example\n", "is not UTF-8"),
        ("l.parquet", b"PAR1xx", "cannot be read as parquet"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"rules\.0: the list .*{name} {said}"):
        filtered(tmp_path, {"url": ["a"]}, {"rule": "deny", "by": "url", "file": str(tmp_path / name)})


def test_too_little_memory_is_said(tmp_path):
    with pytest.raises(DataError, match=r"^DuckDB cannot go on: .*engine\.memory = 1MB"):
        filtered(tmp_path, {"url": ["a"] * 1000}, ALL, engine={"memory": "1MB"})


@pytest.mark.parametrize(
    "memory", ["0GB", "0.5MB", "4", "abc", "4gb", "-1GB", "4GB ", "9999999TB", "0.0001GiB"]
)
def test_what_is_no_amount_of_memory_is_refused(memory):
    with pytest.raises(pydantic.ValidationError, match="is no amount of memory from 1MB on"):
        EngineSection(memory=memory)
    with pytest.raises(RecipeError, match=r"--memory: .* is no amount of memory from 1MB on"):
        finalize_dataset("nowhere", memory)


@pytest.mark.parametrize("threads", [0, 1025, 100_000])
def test_threads_that_no_machine_has_are_refused(threads):
    with pytest.raises(pydantic.ValidationError, match="threads"):
        EngineSection(threads=threads)


def test_a_table_for_which_memory_lacks_is_not_blamed(tmp_path):
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "in.parquet")
    none = EngineSection.model_construct(memory="0GB", threads=1024)
    with (
        pytest.raises(DataError, match=r"^DuckDB cannot go on: .*It has engine\.memory = 0GB"),
        open_engine(none, tmp_path / "spill", False) as connection,
    ):
        group_files(connection, [str(tmp_path / "in.parquet")])


@pytest.mark.parametrize("full", ["output", "spill"])
def test_a_full_disk_is_said_and_the_filter_goes_on_when_there_is_room(tmp_path, full):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    rows = 600_000 if full == "spill" else 30_000
    digits = np.random.default_rng(0).integers(0, 2**63, rows)
    pq.write_table(pa.table({"uid": [f"{d:032x}" for d in digits]}), tmp_path / "in.parquet")
    values = {
        "sources": [str(tmp_path / "in.parquet")],
        "output": str((disk if full == "output" else tmp_path) / "out"),
        "rules": [{"rule": "deduplicate", "by": "uid"}],
        "engine": {"memory": "60MB", "threads": 1, "spill": str(disk / "spill")},
    }
    if full == "output":
        values["engine"] = {}
        (disk / "ballast").write_bytes(bytes(900_000))
    recipe = FilterRecipe.model_validate(values)
    try:
        with pytest.raises(PlaceUnusable, match=r"^The disk is full: [^\n]*$") as error:
            run_filter(recipe)
        assert error.value.exit_code == 78
        assert not Path(values["output"]).exists() and not list(Path(values["output"]).parent.glob(".out*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert run_filter(recipe).kept == len(set(digits))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_two_filters_at_the_same_time_make_one_output(tmp_path):
    pq.write_table(pa.table({"url": [str(i) for i in range(1000)]}), tmp_path / "in.parquet")
    values = {"sources": [str(tmp_path / "in.parquet")], "output": str(tmp_path / "out"), "rules": [ALL]}
    recipe = FilterRecipe.model_validate(values)
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=run_filter, args=(recipe,)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out"]
    assert pq.read_table(tmp_path / "out" / "kept.parquet")["url"].to_pylist() == [
        str(i) for i in range(1000)
    ]


def test_what_is_damaged_behind_its_footer_is_said(tmp_path):
    table = {"url": [f"https://a.example/{i}" for i in range(1000)], "caption": ["c"] * 1000}
    pq.write_table(pa.table(table), tmp_path / "bad.parquet", compression="zstd")
    data = bytearray((tmp_path / "bad.parquet").read_bytes())
    data[40:400] = bytes(360)
    (tmp_path / "bad.parquet").write_bytes(data)
    values = {"sources": [str(tmp_path / "bad.parquet")], "output": str(tmp_path / "o"), "rules": [ALL]}
    with pytest.raises(DataError, match=r"cannot go on: .*bad\.parquet(?!.*memory).* Fetch the damaged file"):
        run_filter(FilterRecipe.model_validate(values))
    assert not (tmp_path / "o").exists()


def test_a_join_by_what_no_source_has_is_refused(tmp_path):
    pq.write_table(pa.table({"hash": [1], "score": [2.0]}), tmp_path / "scores.parquet")
    join = {"files": [str(tmp_path / "scores.parquet")], "by": "hash", "columns": {"aesthetic": "score"}}
    with pytest.raises(RecipeError, match=r"joins\.0: no source has the column 'hash'.*joined by url"):
        filtered(tmp_path, {"url": ["a"]}, ALL, joins=[join])  # without a caption there is no hash
    pq.write_table(pa.table({"url": ["a"], "score": [2.0]}), tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=r"joins\.0: .*scores\.parquet has no column hash; it has score, url"):
        filtered(tmp_path, {"url": ["a"], "text": ["t"]}, ALL, joins=[join])


def test_places_that_must_be_local_are(tmp_path):
    with pytest.raises(pydantic.ValidationError, match=r"s3://bucket/kept is no local path"):
        FilterRecipe.model_validate({"sources": ["a"], "output": "s3://bucket/kept", "rules": [ALL]})
    with pytest.raises(pydantic.ValidationError, match=r"s3://b/x\.parquet is no local path"):
        rule = {"rule": "deny", "by": "url", "file": "s3://b/x.parquet"}
        FilterRecipe.model_validate({"sources": ["a"], "output": "out", "rules": [rule]})
    values = {"rows": "kept.parquet", "output": "out", "polite": {"contact": "mailto:a@b.example"}}
    for name in ("rows", "output"):
        with pytest.raises(pydantic.ValidationError, match=rf"{name}\n.*s3://bucket/x is no local path"):
            DownloadRecipe.model_validate(values | {name: "s3://bucket/x"})
