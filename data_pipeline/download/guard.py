"""Runs img2dataset inside bounds that it does not have itself; `run.py` starts it in the tool's environment.

    python guard.py SETTINGS.json PARENT LOCK

PARENT is the number of the process that starts it, LOCK that of an open file. Only Python's own library and
img2dataset are there. The bounds are set when this file is imported, so that the worker processes, which
import their parent's main file first, have them too:

- A socket of this process connects to public addresses only. An audit hook sees each address at the moment
  of the connection, after names were resolved and redirects followed, so neither of them leads around it;
  Python has no way to remove a hook. Proxies of the environment are not used: behind a proxy only the
  proxy's address could be seen.
- Only http:// and https:// are opened, also behind a redirect; urllib would open file:// and ftp:// too.
- An answer that does not say that it is a picture, is too long or too slow, or whose owner opts out, is
  broken off.
- No process outlives the one that started it; and each keeps the lock on the output, which the kernel so
  takes back when the last of them is gone.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import multiprocessing.util
import os
import signal
import socket
import sys
import time
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex")
# `binary/octet-stream` and the like is what object stores say about anything.
UNNAMED = ("application/octet-stream", "binary/octet-stream", "")
CHUNK = 1 << 16
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(OSError):
    """A request or an answer that is not wanted; the message goes into the statistics."""


def is_public(address: str) -> bool:
    """Whether an IP address, and the IPv4 address inside it if there is one, is of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner and not is_public(str(inner)):
            return False
        if ip.ipv4_mapped:
            return True
    return ip.is_global and not ip.is_multicast


def refuse_private_addresses(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no connection to an address that is not public; processes may talk to each other."""
    if event not in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        return
    connection, address = arguments[0], arguments[-1]
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or address is None:
        return
    if not is_public(str(address[0])):
        raise Refused("address is not public")


class Bounds(urllib.request.BaseHandler):
    """What goes out with a request, and which answers are taken."""

    handler_order = 900  # behind all others

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        """Say who asks."""
        request.add_header("User-Agent", self.settings["user_agent"])
        request.add_header("Accept", "image/*")
        return request

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        """Refuse by the headers, and bound what is read."""
        response.read = Bounded(response, self.settings).read
        if response.status >= 300:
            return response  # a redirect or an error, for the handlers that know them
        headers = response.headers
        kind = headers.get_content_type() if headers.get("Content-Type") else ""
        length = headers.get("Content-Length", "")
        if not kind.startswith("image/") and kind not in UNNAMED:
            raise Refused("not a picture by its content type")
        if length.isdecimal() and int(length) > self.settings["max_bytes"]:
            raise Refused("too large")
        if self.settings["respect_opt_out"] and opts_out(headers, self.settings["agent_token"]):
            raise Refused("owner opts out")
        return response

    https_request = http_request
    https_response = http_response


def opts_out(headers: Message, token: str) -> bool:
    """Whether headers forbid the use, by `TDM-Reservation`, or `X-Robots-Tag` for all or this agent."""
    if headers.get("TDM-Reservation", "").strip() == "1":
        return True
    for value in headers.get_all("X-Robots-Tag", []):
        agent, colon, rest = value.partition(":")
        if colon and agent.strip().lower() != token:
            continue
        words = (rest if colon else value).split(",")
        if any(word.strip().lower() in OPT_OUT for word in words):
            return True
    return False


class Bounded:
    """Reads an answer up to a number of bytes, and up to a moment."""

    def __init__(self, response: Any, settings: dict[str, Any]):
        self.response = response
        self.most = int(settings["max_bytes"])
        self.until = time.monotonic() + float(settings["total_seconds"])

    def read(self, size: int | None = None) -> bytes:
        """All of it, as img2dataset asks."""
        parts, total = [], 0
        # read1 gives what has come: a server that sends a byte now and then is noticed.
        while data := self.response.read1(CHUNK):
            total += len(data)
            if total > self.most:
                raise Refused("too large")
            if time.monotonic() > self.until:
                raise Refused("too slow")
            parts.append(data)
        return b"".join(parts)


def set_bounds(settings: dict[str, Any]) -> None:
    """Set all bounds for this process."""
    # The pictures' library asks its registry for a newer version of itself otherwise.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        Bounds(settings),
    )
    for handler in handlers:
        opener.add_handler(handler)
    urllib.request.install_opener(opener)
    if not settings["private_addresses"]:
        sys.addaudithook(refuse_private_addresses)


def die_with_parent(arguments: list[str]) -> None:
    """Be killed when the process that started this one is; its number is the second of the arguments."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(arguments[2]):  # it was gone before the line above
        os._exit(1)
    arguments[2] = str(os.getpid())  # of which worker processes get a copy


def hand_on(descriptor: int) -> None:
    """Keep a file open in every process that multiprocessing starts here, which closes all but its own."""
    start = multiprocessing.util.spawnv_passfds

    def start_with_it(path: bytes, args: Any, passfds: Any) -> int:
        return start(path, args, [*passfds, descriptor])

    multiprocessing.util.spawnv_passfds = start_with_it


def main(settings: dict[str, Any]) -> None:
    """Run img2dataset with the settings' arguments."""
    from img2dataset import download

    download(**settings["arguments"])


def read_settings(arguments: list[str]) -> dict[str, Any]:
    """The settings that the first argument names."""
    settings: dict[str, Any] = json.loads(Path(arguments[1]).read_text())
    return settings


# In a worker process the name is `__mp_main__`; a test that imports the file wants neither.
if __name__ in ("__main__", "__mp_main__"):
    die_with_parent(sys.argv)
    set_bounds(read_settings(sys.argv))
if __name__ == "__main__":
    hand_on(int(sys.argv[3]))
    main(read_settings(sys.argv))
