"""Hugging Face parquet: what cells may hold, which columns are read, and that memory stays bounded."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.ingest import tables
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import CAPTION_BYTES, JSON_BYTES, RawSample, Refused
from data_pipeline.ingest.tables import read_table
from foundation.errors import DataError

CAP = 1 << 20
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(path, **more):
    section = InputSection.model_validate(
        {"kind": "parquet", "path": [str(path)], "max_member_bytes": CAP} | more
    )
    return list(read_table(str(path), section))


@pytest.fixture
def write(tmp_path):
    """Writes columns to a file; its path."""

    def write(columns, **options):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet", **options)
        return tmp_path / "t.parquet"

    return write


def pictures(cells, kind=STRUCT):
    return pa.array([{"bytes": c, "path": "a.jpg"} for c in cells] if kind == STRUCT else cells, kind)


@pytest.mark.parametrize(
    "kind",
    [STRUCT, pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), pa.binary(3)],
    ids=["struct", "binary", "large", "dictionary", "fixed"],
)
def test_pictures_may_be_bytes_alone(write, kind):
    columns = {"image": pictures([b"one", b"two", None], kind), "text": ["1", None, " "], "uid": list("abc")}
    one, two, three = read(write(columns))
    assert one == RawSample("t.parquet:0", b"one", "1", {"uid": "a"})
    assert two == RawSample("t.parquet:1", b"two", None, {"uid": "b"})
    assert three == Refused("t.parquet:2", "its image has no bytes")


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (["a.jpg"], ["x"], "its image is string; expected binary, or a struct with binary `bytes`"),
        ([{"path": "a.jpg"}], ["x"], "its image is struct<path: string>; expected binary"),
        ([{"bytes": "text"}], ["x"], "its image is struct<bytes: string>; expected binary"),
        ([[b"x"]], ["x"], "its image is list<.*>; expected binary"),
        ([b"x"], [["one", "another"]], r"its 'text' is list<.*>; expected text \(input\.caption_column\)"),
        ([b"x"], [7], "its 'text' is int64; expected text"),
    ],
)
def test_columns_of_other_things_are_said_once_for_the_file(write, image, text, said):
    with pytest.raises(DataError, match=said):
        read(write({"image": image, "text": text}))


def test_cells_over_their_caps_refuse_their_rows_alone(write):
    image = [bytes(CAP + 1), *[b"x"] * 4]
    text = ["a", "b" * (CAPTION_BYTES + 1), "b" * CAPTION_BYTES, "d", "e"]
    uid = ["a", "b", "c", "d" * (JSON_BYTES + 1), "e" * JSON_BYTES]
    found = read(write({"image": pictures(image), "text": text, "uid": uid}))
    assert [getattr(s, "reason", None) for s in found] == [
        f"its image has {CAP + 1} bytes, over the cap of {CAP}",
        f"its text has {CAPTION_BYTES + 1} bytes, over the cap of {CAPTION_BYTES}",
        None,
        f"its uid has {JSON_BYTES + 1} bytes, over the cap of {JSON_BYTES}",
        None,
    ]


def test_text_that_is_none_refuses_its_row_alone(write):
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xe9", b"b"]).buffers())
    bad, good = read(write({"image": [b"x", b"y"], "text": text}))
    assert bad == Refused("t.parquet:0", "its text is not UTF-8")
    assert good == RawSample("t.parquet:1", b"y", "b", {})


def test_lists_objects_and_dates_are_not_read(write):
    columns = {
        "image": [b"x"],
        "text": ["a"],
        "embedding": [[1.0] * 9],
        "more": [{"text": "b"}],
        "day": pa.array([1 << 62], pa.timestamp("ms")),  # no date of Python's
        "width": [640],
        "score": [0.5],
    }
    assert read(write(columns)) == [RawSample("t.parquet:0", b"x", "a", {"width": 640, "score": 0.5})]


def test_a_row_group_over_its_limit_is_said_before_any_of_it_is_read(write, monkeypatch):
    path = write({"image": pictures([bytes(1000)] * 40), "text": ["a"] * 40}, use_dictionary=False)
    assert len(read(path)) == 40
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 30_000)
    said = r"t\.parquet: its row group 0 of 40 rows has \d{5} bytes .*over 30000; write it anew with smaller"
    with pytest.raises(DataError, match=said):
        read(path)
    path = write(
        {"image": pictures([bytes(1000)] * 40), "text": ["a"] * 40, "embedding": [[1.0] * 9999] * 40},
        row_group_size=20,
        use_dictionary=False,
    )
    assert len(read(path)) == 40, "each group is below it; what is not read does not count"


def test_rows_of_large_cells_are_read_one_at_a_time(write):
    """Forty cells of 2 MiB, of which a dictionary holds one: 2 MiB in the file, 80 MiB in a batch."""
    path = write(
        {"image": pictures([bytes(2 << 20)] * 40), "text": ["a"] * 40}, dictionary_pagesize_limit=1 << 30
    )
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size < 4 << 20
    before = pa.total_allocated_bytes()
    most, refused = 0, 0
    section = InputSection(kind="parquet", path=[str(path)], max_member_bytes=CAP)
    for sample in read_table(str(path), section):
        most = max(most, pa.total_allocated_bytes() - before)
        refused += isinstance(sample, Refused)
    assert refused == 40 and most < 24 << 20
