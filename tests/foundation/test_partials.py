"""What is under way belongs to somebody: only what nobody works on any more is swept."""

import multiprocessing
import os
import time

import pytest

from foundation.partials import ABANDONED_SECONDS, partial_path, sweep_abandoned


def _name_of_a_dead_process(final, answer):
    answer.put(str(partial_path(final)))


@pytest.fixture
def dead(tmp_path):
    """Names that a process gave that has ended since."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_name_of_a_dead_process, args=(tmp_path / "a", answer))
    process.start()
    name = answer.get(timeout=60)
    process.join()
    return tmp_path / name


def test_names_lie_beside_and_are_no_one_elses(tmp_path):
    names = {partial_path(tmp_path / "a.json") for _ in range(100)}
    assert len(names) == 100 and {name.parent for name in names} == {tmp_path}
    assert all(name.name.startswith(".a.json.") and not name.exists() for name in names)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_dead_process_left_is_swept_and_what_a_living_one_makes_is_not(tmp_path, dead, kind):
    alive = partial_path(tmp_path / "a")
    other_host = dead.with_name(dead.name.replace(f".{os.uname().nodename}.", ".elsewhere."))
    assert other_host != dead
    paths = [dead, alive, other_host]
    for path in paths:
        if kind == "folder":
            (path / "inner").mkdir(parents=True)
        else:
            path.write_text("half")
    sweep_abandoned(paths)
    assert [path.exists() for path in paths] == [False, True, True]


def test_another_hosts_folder_is_swept_after_a_day_without_any_change_in_it(tmp_path):
    folder = tmp_path / ".a.elsewhere.1.01234567.partial"
    (folder / "inner").mkdir(parents=True)
    inside = folder / "inner" / "file"
    inside.write_text("half")
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for path in (folder / "inner", folder):
        os.utime(path, (long_ago, long_ago))
    sweep_abandoned([folder])
    assert inside.exists()
    for path in (inside, folder / "inner", folder):
        os.utime(path, (long_ago, long_ago))
    sweep_abandoned([folder])
    assert not folder.exists()


def test_what_has_gone_meanwhile_is_no_error(tmp_path):
    sweep_abandoned([tmp_path / ".a.elsewhere.1.01234567.partial"])


def test_what_goes_from_a_living_owners_folder_meanwhile_does_not_make_it_abandoned(tmp_path):
    partial = partial_path(tmp_path / "made")
    partial.mkdir()
    (partial / "gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked at
    sweep_abandoned([partial])
    assert partial.exists()
