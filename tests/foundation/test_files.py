"""Files and folders that appear whole or not at all."""

import errno
import fcntl
import hashlib
import os

import pytest

from foundation.errors import DataError, RecipeError
from foundation.files import atomic_write, commit_folder, open_locked, sha256_file
from foundation.json_files import read_json


def test_atomic_write_replaces_only_on_success(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as file:
        file.write("first")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("half")
        _ = 1 / 0
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_commit_folder_refuses_what_is_there(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text(name)
    commit_folder(tmp_path / "one", tmp_path / "final")
    with pytest.raises(FileExistsError):
        commit_folder(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final" / "data").read_text() == "one"
    assert (tmp_path / "two" / "data").exists() and not (tmp_path / "one").exists()


def test_commit_folder_takes_an_empty_folder_for_none_and_a_file_for_something(tmp_path):
    for name in ("one", "two", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "data").write_text("one")
    (tmp_path / "file").write_text("mine")
    commit_folder(tmp_path / "one", tmp_path / "empty")
    assert (tmp_path / "empty" / "data").read_text() == "one"
    with pytest.raises(FileExistsError):
        commit_folder(tmp_path / "two", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_sha256(tmp_path):
    (tmp_path / "data").write_bytes(b"bits")
    assert sha256_file(tmp_path / "data") == hashlib.sha256(b"bits").hexdigest()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no JSON: Expecting value, line 1, column 1"),
        (b'{"a": 1,\n "b": ', "no JSON: Expecting value, line 2, column 7"),
        (b'{"a": "\xff\xfe"}', "no text: byte 7 is not UTF-8"),
        (b"[1, 2]", "no JSON object"),
        (b"null", "no JSON object"),
        (b'{"b": 1}', "without a, c"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_json_file_is_named_with_where_and_how_to_mend_it(tmp_path, content, found):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_json(path, "delete it and start again", "a", "c")
    assert str(path) in str(error.value) and found in str(error.value)
    assert str(error.value).endswith("): delete it and start again")
    assert error.value.exit_code == 65


def test_a_whole_json_file_is_read_and_a_missing_one_is_the_callers(tmp_path):
    (tmp_path / "state.json").write_text('{"a": 1, "b": [2]}')
    assert read_json(tmp_path / "state.json", "", "a") == {"a": 1, "b": [2]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json", "")


def test_a_lock_is_held_while_its_file_is_open(tmp_path):
    path, at_once = tmp_path / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB
    with open_locked(path, "w", at_once), pytest.raises(BlockingIOError):
        open_locked(path, "r", at_once)
    open_locked(path, "r", at_once).close()
    with pytest.raises(FileNotFoundError):
        open_locked(tmp_path / "none", "r", at_once)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RecipeError) as refused:
        open_locked(tmp_path / "lock", "w", fcntl.LOCK_EX)
    assert str(refused.value).startswith(f"{tmp_path}/lock cannot be locked ({os.strerror(number)}): ")


def test_a_lock_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    def read_only(path, mode):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(RecipeError, match=r"/lock cannot be locked \(Read-only file system\)"):
        open_locked(tmp_path / "lock", "w", fcntl.LOCK_EX)
