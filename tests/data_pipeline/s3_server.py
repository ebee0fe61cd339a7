"""An S3 server of moto's on loopback, in its own process, and a bad line in front of it."""

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SECRET = "not-a-real-secret-9f2c"


@contextmanager
def s3_server():
    """The server's port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(sys.executable).with_name("moto_server")
    command = [str(script), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait()


@contextmanager
def s3_environment(port):
    """The environment leads S3 clients to the server."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def overloaded_server(status=503, code="SlowDown"):
    """The port of a server that answers all requests with one error."""
    body = f"<Error><Code>{code}</Code><Message>Signature=quoted</Message></Error>".encode()

    class Refuse(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, *arguments):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class BadLine:
    """A proxy that answers 503 to a tenth of the requests, and is dead for a while when told so.

    Dead: nothing listens, connections are refused.
    """

    def __init__(self, port, seed=0):
        self.behind = port
        self.random = random.Random(seed)
        self.refused = self.served = self.deaths = 0
        self.die_at = None
        self.server = None
        self.port = 0
        self._listen()

    def _listen(self):
        line = self

        class Pass(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                line.pass_on(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *arguments):
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Pass)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def pass_on(self, request):
        length = int(request.headers.get("Content-Length", 0))
        body = request.rfile.read(length)
        request.close_connection = True
        if self.die_at is not None and self.served >= self.die_at:
            self.die_at = None
            threading.Thread(target=self.die, daemon=True).start()
            return
        if self.random.random() < 0.1:
            self.refused += 1
            request.send_response(503)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        self.served += 1
        behind = http.client.HTTPConnection("127.0.0.1", self.behind)
        behind.request(request.command, request.path, body, dict(request.headers))
        answer = behind.getresponse()
        data = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                request.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)
        behind.close()

    def die(self):
        """Five seconds without a server."""
        self.server.shutdown()
        self.server.server_close()
        self.deaths += 1
        time.sleep(5)
        self._listen()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
