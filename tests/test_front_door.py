"""The command line: quick help, and for a user's mistake one message and the right exit code."""

import subprocess
import sys

import pytest


def bitdance(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "bitdance", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def test_help_names_the_rooms_and_imports_nothing_heavy():
    program = (
        "import sys, bitdance\n"
        "try: bitdance.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'streaming', 'duckdb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("data", "tokenizer", "train", "generate", "import", "export", "quickstart"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "nothing.yaml"], 78, "nothing.yaml does not exist"),
        (["data", "filter", "nothing.yaml"], 78, "nothing.yaml does not exist"),
        (["data", "tokenize", "nothing.yaml"], 78, "nothing.yaml does not exist"),
        (["tokenizer", "train", "nothing.yaml"], 78, "nothing.yaml does not exist"),
        (["compare", "nothing.yaml"], 78, "nothing.yaml does not exist"),
        (["generate", "nothing", "--prompt", "a cat", "--size", "large"], 78, "expected HEIGHTxWIDTH"),
        (["quickstart"], 65, "root of the repository"),
    ],
)
def test_a_mistake_ends_in_one_message_and_its_code(tmp_path, arguments, code, words):
    done = bitdance(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
