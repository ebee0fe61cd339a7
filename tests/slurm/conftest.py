"""One cluster for all tests of this folder, and the inputs that their runs share."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / room) for room in ("slurm", "trainer", "data_pipeline")]
from slurm_runs import Lab, Run  # noqa: E402
from small_cluster import Cluster, why_not  # noqa: E402
from small_stage import make_inputs  # noqa: E402
from stand_in import write_commands  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Not pytest's own folder: the path of a socket may have a hundred bytes at most.
    with tempfile.TemporaryDirectory(prefix="bdt") as base:
        cluster = Cluster(Path(base))
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    make_inputs(folder)
    return Lab(cluster, folder)


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Run:
    """A run of two nodes from beginning to end."""
    lab.cluster.mend()  # a fixture of the session comes before `whole`
    run = lab.submit("undisturbed")
    run.wait_for_end()
    return run


@pytest.fixture(autouse=True)
def whole(request: pytest.FixtureRequest) -> None:
    """Each test finds four idle nodes and no job, whatever became of the one before."""
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").mend()


@pytest.fixture
def faulty(cluster: Cluster) -> Cluster:
    """The cluster for a test that breaks it: needs namespaces."""
    if not cluster.namespaces:
        pytest.skip("crashing a node or cutting it off needs network namespaces, which only root may make")
    return cluster


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text tokenizer and latents."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What sbatch was told to do; the folder of the test is where its runs and site file are."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return write_commands(tmp_path / "bin")
