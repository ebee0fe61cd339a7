"""Fills a batch script in: its `#SBATCH` values, and between marks what it would read at its start."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

SCRIPTS = Path(__file__).parent
_OPTION = re.compile(r"#SBATCH --([a-z-]+)(=\S+)?")
_WORD = re.compile(r"--([a-z][a-z0-9-]*)(?:=(.+))?", re.DOTALL)
_BLOCK = re.compile(r"(# --- [^\n]*begin (\w+)\n).*?(# -+ end \2\n)", re.DOTALL)


def fill_in(name: str, options: Mapping[str, str | None], site_lines: str) -> str:
    """A script of this folder with other values, and with all that it reads at its start inside.

    Args:
        name: of the script.
        options: of sbatch, without dashes: a value in place of the script's own; "" for an option without a
            value; None takes the line out. What the script does not name is added.
        site_lines: bash, in place of the reading of the site file.
    """
    lines, left = [], dict(options)
    text = (SCRIPTS / name).read_text()
    last = max(i for i, line in enumerate(text.splitlines()) if _OPTION.match(line))
    for number, line in enumerate(text.splitlines()):
        match = _OPTION.match(line)
        key = match[1] if match else None
        if key in left:
            value = left.pop(key)
            if value is not None:
                lines.append(_directive(key, value))
        elif not line.startswith("# SITE"):
            lines.append(line.replace("# SITE", "#") if match else line)
        if number == last:
            lines += [_directive(key, value) for key, value in left.items() if value is not None]
    blocks = {"common": (SCRIPTS / "job.bash").read_text(), "site": site_lines}
    return _BLOCK.sub(lambda m: f"{m[1]}{blocks[m[2]].rstrip()}\n{m[3]}", "\n".join(lines) + "\n")


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"


def options_of(text: str) -> dict[str, str | None]:
    """Options as a person writes them (`--exclusive --constraint=h100`), by name.

    Raises:
        ValueError: a word is none, or quotes are open.

    >>> options_of("--exclusive --constraint=h100")
    {'exclusive': '', 'constraint': 'h100'}
    """
    found: dict[str, str | None] = {}
    for word in shlex.split(text):
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"{word} is no --name or --name=value, in which form each option is to be given")
        found[match[1]] = match[2] or ""
    return found
