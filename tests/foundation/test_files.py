"""Files and folders that appear whole or not at all."""

import hashlib

import pytest

from foundation.files import atomic_write, commit_folder, sha256_file


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


def test_sha256(tmp_path):
    (tmp_path / "data").write_bytes(b"bits")
    assert sha256_file(tmp_path / "data") == hashlib.sha256(b"bits").hexdigest()
