"""Downloading from a real server on loopback, by the real tool; and the bounds around it one by one."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from email.message import Message

import pyarrow as pa
import pytest
from small_web import PICTURES, download_recipe, need_tool, serving, write_rows

from data_pipeline.download import guard
from data_pipeline.download.run import run_download, sum_up
from data_pipeline.download.tool import DownloadStopped
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample
from data_pipeline.ingest.shards import list_shards, read_shard
from foundation.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def tool():
    need_tool()


def test_what_a_web_does_ends_in_tars_and_sums(server, tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    others = ["/none.jpg", "/page.html", "/broken.jpg", "/optout.jpg", "/reserved.jpg"]
    others += ["/large.jpg", "/drip.jpg", "/hang.jpg", "/to?/good2.jpg", "/to?file:///etc/hostname"]
    urls = [server.address + path for path in [*PICTURES, *others]] + ["file:///etc/hostname"]
    served = {f"/good{i}.jpg": PICTURES[f"/good{i}.jpg"] for i in range(5)}
    # Of the sixth picture the table knows another content.
    served |= {
        "/good5.jpg": b"earlier",
        "/broken.jpg": b"no picture at all",
        "/to?/good2.jpg": PICTURES["/good2.jpg"],
    }
    sha256 = [hashlib.sha256(served.get(url.removeprefix(server.address), b"")).hexdigest() for url in urls]
    hashes = list(range(100, 100 + len(urls)))
    columns = {"hash": hashes, "sha256": sha256, "aesthetic": [5.5] * len(urls)}
    write_rows(tmp_path, urls, **columns, punsafe=pa.nulls(len(urls), pa.float64()))
    recipe = download_recipe(tmp_path, verify_sha256=True)
    sums = run_download(recipe)
    assert (sums["rows"], sums["success"], sums["without_web_address"]) == (16, 6, 1)
    assert (sums["failed_to_download"], sums["failed_to_resize"]) == (9, 1)
    reasons = " | ".join(sums["reasons"])
    for reason in ("404", "content type", "opts out", "too large", "too slow", "timed out", "file", "hash"):
        assert reason in reasons, reasons
    assert sum(count for reason, count in sums["reasons"].items() if "opts out" in reason) == 2

    section = InputSection(path=[str(tmp_path / "images" / "shards")])
    found = [s for shard in list_shards(section) for s in read_shard(shard, section)]
    good = {s.fields["url"]: s for s in found if isinstance(s, RawSample)}
    assert len(good) == 6
    for number in range(5):
        sample = good[f"{server.address}/good{number}.jpg"]
        assert sample.image == PICTURES[f"/good{number}.jpg"]
        assert (sample.caption, sample.fields["hash"]) == (f"caption {number}", 100 + number)
        assert sample.fields["aesthetic"] == 5.5 and "punsafe" not in sample.fields
    agents = {agent for _, agent in server.seen}
    assert all(
        re.fullmatch(r"Mozilla/5.0 \(compatible; bitdance/\S+; \+mailto:crawl@example.org\)", a)
        for a in agents
    )
    written = b"".join(p.read_bytes() for p in (tmp_path / "images").rglob("*") if p.is_file())
    assert b"not-a-real-secret" not in written + "".join(capfd.readouterr()).encode()

    # Shards that are lost or cut short come back; what is there is not asked for again.
    server.seen.clear()
    for path in (tmp_path / "images" / "shards").glob("00001*"):
        path.unlink()
    os.truncate(tmp_path / "images" / "shards" / "00000.tar", 2048)
    assert {k: v for k, v in run_download(recipe).items() if k != "process_seconds"} == {
        k: v for k, v in sums.items() if k != "process_seconds"
    }
    assert "00000.tar is cut short, damaged or gone" in capfd.readouterr().out
    found = [s for shard in list_shards(section) for s in read_shard(shard, section)]
    assert {s.fields["url"] for s in found if isinstance(s, RawSample)} == set(good)
    asked = {url.removeprefix(server.address) for url in urls[:12]}
    assert {path for path, _ in server.seen} == asked
    server.seen.clear()
    run_download(recipe)
    assert not server.seen and "done already" in capfd.readouterr().out


ASK = """
import sys, urllib.request
from data_pipeline.download import guard
settings = {"user_agent": "x", "agent_token": "x", "respect_opt_out": True, "max_bytes": 9}
guard.set_bounds(settings | {"total_seconds": 9, "private_addresses": False})
for url in sys.argv[1:]:
    try:
        urllib.request.urlopen(url, timeout=5)
        print("came through")
    except OSError as error:
        print(error)
"""


def test_private_addresses_are_not_asked_unless_the_recipe_says_so(server, monkeypatch):
    """By number, by a name that leads there, by a proxy; and no other kind of address is opened."""
    monkeypatch.setenv("http_proxy", server.address)
    server.seen.clear()
    port = server.server_port
    urls = [
        f"http://127.0.0.1:{port}/good0.jpg",
        f"http://localhost:{port}/good0.jpg",
        "file:///etc/hostname",
    ]
    command = [sys.executable, "-c", ASK, *urls, "ftp://localhost/x"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4 and not server.seen
    assert all("not public" in line for line in lines[:2])
    assert all("unknown url type" in line for line in lines[2:])


def test_a_tool_that_dies_leaves_a_job_to_go_on_with(tmp_path, monkeypatch):
    write_rows(tmp_path, ["https://a.example/1.jpg"])
    monkeypatch.setattr("data_pipeline.download.run.tool_command", lambda uv: ["false"])
    monkeypatch.setattr("data_pipeline.download.run.find_uv", lambda: "uv")
    (tmp_path / "images").mkdir()  # as good as none
    for _ in range(2):
        with pytest.raises(DownloadStopped, match="0 of 1 shards"):
            run_download(download_recipe(tmp_path))
    assert DownloadStopped.exit_code == 75
    with pytest.raises(RecipeError, match="another recipe"):
        run_download(download_recipe(tmp_path, samples_per_shard=7))
    write_rows(tmp_path, ["https://a.example/other.jpg"])
    with pytest.raises(RecipeError, match=r"other files: since then 1 replaced \(such as .*kept\.parquet\)"):
        run_download(download_recipe(tmp_path))
    (tmp_path / "kept.parquet").unlink()  # its rows are in the folder
    with pytest.raises(DownloadStopped):
        run_download(download_recipe(tmp_path))


def test_rows_that_cannot_be_used_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.download.run.find_uv", lambda: "uv")
    with pytest.raises(DataError, match=r"kept\.parquet does not exist"):
        run_download(download_recipe(tmp_path))
    (tmp_path / "kept.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as kept rows"):
        run_download(download_recipe(tmp_path))
    write_rows(tmp_path, ["ftp://a.example/1.jpg"])
    with pytest.raises(DataError, match="no row with an http"):
        run_download(download_recipe(tmp_path))
    with pytest.raises(DataError, match="lacks the columns sha256"):
        run_download(download_recipe(tmp_path, verify_sha256=True))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.parquet"]


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert guard.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not guard.is_public(address)


def test_names_and_redirects_lead_to_the_address_that_is_checked():
    """The hook sees numbers, whatever the URL said; sockets between processes are not its business."""
    refuse = guard.refuse_private_addresses
    with socket.socket() as inet, socket.socket(socket.AF_UNIX) as unix:
        with pytest.raises(guard.Refused):
            refuse("socket.connect", (inet, ("169.254.169.254", 80)))
        with pytest.raises(guard.Refused):
            refuse("socket.sendto", (inet, ("10.0.0.1", 53)))
        refuse("socket.connect", (inet, ("93.184.216.34", 443)))
        refuse("socket.connect", (unix, "/run/some.sock"))
        refuse("socket.bind", (inet, ("127.0.0.1", 80)))


@pytest.mark.parametrize(
    ("headers", "out"),
    [
        ([], False),
        ([("X-Robots-Tag", "noai")], True),
        ([("X-Robots-Tag", "nofollow, NoImageAI")], True),
        ([("X-Robots-Tag", "all"), ("X-Robots-Tag", "noindex")], True),
        ([("X-Robots-Tag", "googlebot: noindex")], False),
        ([("X-Robots-Tag", "BitDance: noai")], True),
        ([("X-Robots-Tag", "nofollow")], False),
        ([("TDM-Reservation", "1")], True),
        ([("TDM-Reservation", "0")], False),
    ],
)
def test_opt_outs(headers, out):
    message = Message()
    for name, value in headers:
        message[name] = value
    assert guard.opts_out(message, "bitdance") is out


def test_sums_over_shards():
    one = {"count": 4, "successes": 2, "failed_to_download": 2, "failed_to_resize": 0, "duration": 1.5}
    stats = [
        one | {"status_dict": {"success": 2, "404": 2}},
        one | {"status_dict": {"success": 2, "404": 1, "x": 1}},
    ]
    sums = sum_up(stats, 3)
    assert (sums["rows"], sums["success"], sums["reasons"]) == (8, 4, {"404": 3, "x": 1})
    assert (sums["process_seconds"], sums["without_web_address"]) == (3.0, 3)
