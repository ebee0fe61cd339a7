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
        (["data", "sample", "/dev/null/a/b"], 78, "error: /dev/null/a/b: Not a directory; name a place"),
    ],
)
def test_a_mistake_ends_in_one_message_and_its_code(tmp_path, arguments, code, words):
    done = bitdance(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_help_text_breaks_a_line_that_has_room(monkeypatch):
    program = (
        "import os, typer, bitdance\n"
        "def texts(command):\n"
        "    yield command.help or ''\n"
        "    for inner in getattr(command, 'commands', {}).values(): yield from texts(inner)\n"
        "found = list(texts(typer.main.get_command(bitdance.app)))\n"
        "assert len(found) > 20 and all(found), found\n"
        "assert not [text for text in found if '\\n' in text.replace('\\n\\n', '')]\n"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("COLUMNS", "80")
    shown = bitdance("train", "--help").stdout
    assert " SIGTERM, SIGUSR1 and Ctrl-C save at the end of the step. " in shown


def python(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_ctrl_c_while_the_command_is_being_imported():
    done = python(
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'slurm.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "import bitdance\n"
    )
    assert done.returncode == 130 and not done.stderr


def test_ctrl_c_that_was_held_back_while_the_command_started():
    done = python(
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'bitdance', '--help'])\n"
    )
    assert done.returncode == 130 and not done.stdout and not done.stderr


def test_ctrl_c_in_a_command_is_told_without_a_traceback():
    done = python(
        "import sys, bitdance, evaluation.quickstart\n"
        "def interrupted(): raise KeyboardInterrupt\n"
        "evaluation.quickstart.run_quickstart = interrupted\n"
        "sys.argv = ['bitdance', 'quickstart']\n"
        "bitdance.main()\n"
    )
    assert done.returncode == 130
    assert done.stderr == "\nquickstart: interrupted; the same command goes on from here\n"
