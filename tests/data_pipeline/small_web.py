"""A small web on loopback with what happens in the large one, and the job that downloads from it."""

import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import picture

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.download.tool import find_uv, tool_command
from foundation.errors import UserError

PICTURES = {f"/good{i}.jpg": picture(i, 60 + i, 80) for i in range(6)}


class Answers(BaseHTTPRequestHandler):
    """Some answers of the web."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["User-Agent"]))
        body = PICTURES["/good0.jpg"]
        headers = {"Content-Type": "image/jpeg"}
        if self.path in PICTURES:
            body = PICTURES[self.path]
        elif self.path.startswith("/slow"):
            time.sleep(0.1)
        elif self.path == "/page.html":
            headers, body = {"Content-Type": "text/html"}, b"<html>no picture</html>"
        elif self.path == "/broken.jpg":
            body = b"no picture at all"
        elif self.path == "/optout.jpg":
            headers["X-Robots-Tag"] = "noai"
        elif self.path == "/reserved.jpg":
            headers["TDM-Reservation"] = "1"
        elif self.path == "/large.jpg":
            body = bytes(300_000)
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
            return
        elif self.path not in ("/drip.jpg", "/hang.jpg"):
            self.send_error(404)
            return
        if self.path == "/hang.jpg":
            time.sleep(3)
        with suppress(OSError):  # who asked may be gone
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.path == "/drip.jpg":
                self._drip(body)
            else:
                self.wfile.write(body)

    def _drip(self, body):
        """A byte now and then, each in time."""
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.2)

    def log_message(self, *arguments):
        """Say nothing."""


@contextmanager
def serving():
    """The server; `seen` lists what it was asked for, `address` is where it is."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.seen = []
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def need_tool():
    """Skip where the tool's environment cannot be made."""
    try:
        command = [*tool_command(find_uv()), "-c", "import img2dataset"]
    except UserError as error:
        pytest.skip(str(error))
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if made.returncode:
        pytest.skip(f"img2dataset cannot be used here: {made.stderr.strip().splitlines()[-1:]}")


def write_rows(folder, urls, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    table = {"url": urls, "caption": [f"caption {i}" for i in range(len(urls))], **columns}
    pq.write_table(pa.table(table), folder / "kept.parquet")


def download_recipe(tmp_path, **changes):
    values = {
        "rows": str(tmp_path / "kept.parquet"),
        "output": str(tmp_path / "images"),
        "polite": {"contact": "mailto:crawl@example.org", "private_addresses": True},
        "limits": {"max_megabytes": 0.2, "stall_seconds": 1, "total_seconds": 1.0},
        "samples_per_shard": 6,
        "compute": {"processes": 1, "threads": 8},
    }
    return DownloadRecipe.model_validate(values | changes)
