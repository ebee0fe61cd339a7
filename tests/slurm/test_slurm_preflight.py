"""What each node reports, and which one is left out for it, with which words."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_nodes import Node, simulate
from small_stage import write_recipe

from foundation.errors import ExitCode
from foundation.recipes import load_recipe
from slurm import interconnect, start
from slurm.after import Decision, Start, decide
from slurm.history import JobFolder
from slurm.node_checks import Limits, available_memory
from slurm.preflight import Verdict, announce
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.signals import StopFlag

LIMITS = Limits(
    min_disk_gb=2, min_memory_gb=8, max_clock_skew=5, min_gpu_tflops=400, min_allreduce_gbps=4, patience=60
)
JUST_ENOUGH = Node(disk_gb=2.0, memory_gb=8.0, tflops=(400.0, 400.0), clock=4.9, link=4.01)
TMP, PYTHON = tempfile.gettempdir(), sys.executable


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """What all nodes see."""
    for name in ("latents", "tokenizer", "export", "run"):
        (tmp_path / "shared" / name).mkdir(parents=True)
    (tmp_path / "shared" / "latents" / "manifest.json").write_text("{}")
    return tmp_path / "shared"


def job(odd: Node) -> dict[str, Node]:
    """Four nodes, the second of which is another one."""
    return {"n0": Node(), "n1": odd, "n2": Node(), "n3": Node()}


def agreed(verdicts: list[Verdict]) -> Verdict:
    """The one that all ranks come to."""
    assert all(verdict == verdicts[0] for verdict in verdicts)
    return verdicts[0]


def decided(verdict: Verdict, folder: Path, said: str) -> Decision:
    """What becomes of the job, by what stands in its log."""
    ended, run = Start(7, 0, "n[0-3]", 75, count=len(verdict.nodes)), RunFolder(folder / "run")
    return decide(ended, said, run, JobFolder.of_run(run.path))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (Node(disk_gb=1.9), [f"1.9 GB are free in {TMP}, 2 are needed"]),
        (Node(memory_gb=7.9), ["7.9 GB of memory are available, 8 needed"]),
        (Node(gpus=1), ["torch sees 1 of the 2 GPUs that the job has on it"]),
        (Node(gpus=0, shown="1"), ["torch sees 0 of the 1 GPUs that the job has on it"]),
        (Node(interfaces=("lo", "ib0")), ["NETWORK_INTERFACE: it has no ib1"]),
        (Node(tflops=(700, 399)), ["GPU 1 reaches 399 TFLOP/s, 400 are needed"]),
        (Node(tflops=(399, 700)), ["GPU 0 reaches 399 TFLOP/s, 400 are needed"]),
        (Node(clock=5.1), ["its clock is +5.1 s off; 5 s are allowed"]),
        (Node(clock=-5.1), ["its clock is -5.1 s off; 5 s are allowed"]),
        (Node(link=3.9), ["it exchanges 3.90 GB/s with n0, the others 10.00"]),
        (Node(python="3.12.1"), [f"python is 3.12.1 ({PYTHON}) there, 3.11.9 ({PYTHON}) on the others"]),
        (Node(silent=(1,)), ["rank 3 has not answered within 2 s"]),
        (Node(silent=(0, 1)), [f"rank {rank} has not answered within 2 s" for rank in (2, 3)]),
        (
            Node(disk_gb=0.5, memory_gb=1),
            [f"0.5 GB are free in {TMP}, 2 are needed", "1.0 GB of memory are available, 8 needed"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_node_that_falls_short_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shared: Path,
    odd: Node,
    words: list[str],
) -> None:
    limits = replace(LIMITS, patience=2) if odd.silent else LIMITS
    verdict = agreed(simulate(monkeypatch, shared, job(odd), limits))
    assert verdict.bad == {"n1": words}
    assert not list((shared / "run" / "slurm").iterdir())  # what the nodes were to see is cleared away
    announce(verdict)
    decision = decided(verdict, shared, capsys.readouterr().out)
    assert decision.again and decision.without == ("n1",)
    assert decision.why == f"n1: {'; '.join(words)}"


def remove_latents(view: Path) -> str:
    shutil.rmtree(view / "latents")
    return f"data.latents: it sees no {view}/latents"


def remove_manifest(view: Path) -> str:
    (view / "latents" / "manifest.json").unlink()
    return f"data.latents: {view}/latents has no manifest.json"


def change_manifest(view: Path) -> str:
    (view / "latents" / "manifest.json").write_text("{ }")
    theirs, ours = (hashlib.sha256(text).hexdigest()[:12] for text in (b"{}", b"{ }"))
    return f"latents is {ours} there, {theirs} on the others"


def remove_tokenizer(view: Path) -> str:
    (view / "tokenizer").rmdir()
    return f"tokenizer: it sees no {view}/tokenizer"


def remove_export(view: Path) -> str:
    (view / "export").rmdir()
    return f"model.init_from: it sees no {view}/export"


def hide_run(view: Path) -> str:
    (view / "run").unlink()
    (view / "run" / "slurm").mkdir(parents=True)
    return f"run: it does not see what the first node has written to {view}/run/slurm"


@pytest.mark.parametrize(
    "hide",
    [remove_latents, remove_manifest, change_manifest, remove_tokenizer, remove_export, hide_run],
    ids=lambda hide: hide.__name__,
)
def test_the_node_that_sees_less_is_left_out(
    monkeypatch: pytest.MonkeyPatch, shared: Path, hide: Callable[[Path], str]
) -> None:
    view = shared.parent / "view"
    shutil.copytree(shared, view)
    (view / "run").rmdir()
    (view / "run").symlink_to(shared / "run")
    words = hide(view)
    verdict = agreed(simulate(monkeypatch, shared, job(Node(view=view)), LIMITS))
    assert verdict.bad == {"n1": [words]}


def test_nodes_that_just_suffice_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    nodes = job(JUST_ENOUGH)
    verdict = agreed(simulate(monkeypatch, shared, nodes, LIMITS))
    assert not verdict.bad
    announce(verdict)
    figures = "memory >= 8 GB, disk >= 2 GB, all-reduce 4.01 GB/s"
    assert capsys.readouterr().out == f"bitdance: preflight of 4 nodes passed: {figures}\n"


def test_ranks_that_see_a_gpu_each_train(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """As srun has it by `--gpus-per-task=1`, where the job has two GPUs on a node."""
    nodes = {f"n{number}": Node(gpus=1, shown="1") for number in range(2)}
    assert not agreed(simulate(monkeypatch, shared, nodes, LIMITS)).bad


def test_what_is_not_asked_for_is_not_checked(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    below_any_limit = (-1.0, -1.0)  # to measure these is to blame the node
    poor = Node(disk_gb=0, memory_gb=0, tflops=below_any_limit, link=0.01, clock=1.0)
    limits = Limits(min_disk_gb=0, min_memory_gb=0, patience=60)
    assert not agreed(simulate(monkeypatch, shared, job(poor), limits)).bad


@pytest.mark.parametrize("links", [[3.9, 6, 6, 6], [6, 3.9, 6, 6], [1, 1, 1, 1]], ids=str)
def test_a_slow_network_without_a_slow_node_is_told_and_trains(
    monkeypatch: pytest.MonkeyPatch, shared: Path, links: list[float]
) -> None:
    nodes = {f"n{number}": Node(link=link) for number, link in enumerate(links)}
    verdict = agreed(simulate(monkeypatch, shared, nodes, LIMITS))
    assert not verdict.bad
    slow = f"all-reduce {min(links):.2f} GB/s, where 4 are wanted, but no node stands out"
    assert verdict.figures.endswith(slow)


def test_what_all_nodes_lack_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    nodes = {f"n{number}": Node(gpus=0) for number in range(4)}
    verdict = agreed(simulate(monkeypatch, shared, nodes, LIMITS))
    announce(verdict)
    said = capsys.readouterr().out
    reason = "torch sees 0 of the 2 GPUs that the job has on it"
    assert f"bitdance: bad node n3: {reason}" in said
    decision = decided(verdict, shared, said)
    assert (decision.again, decision.code) == (False, ExitCode.RECIPE)
    assert decision.why == f"all 4 nodes say: {reason}"


@pytest.mark.parametrize(("rank", "code"), [(0, ExitCode.REQUEUE), (1, ExitCode.DONE)])
def test_a_bad_node_ends_the_ranks_that_stay_silent(
    monkeypatch: pytest.MonkeyPatch, shared: Path, rank: int, code: ExitCode
) -> None:
    """srun ends all ranks at the first bad exit: that of the one that names the node, when it has done so."""
    srun = {"SLURM_PROCID": rank, "SLURM_NTASKS": 3, "SLURM_LOCALID": 0, "SLURM_JOB_ID": 7}
    ours = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_ADDR": "n0", "MASTER_PORT": 15000}
    for name, value in {**srun, **ours, "SLURM_JOB_NODELIST": "n[0-2]"}.items():
        monkeypatch.setenv(name, str(value))
    verdict = Verdict({"n2": ["rank 2 has not answered within 300 s"]}, ["n0", "n1", "n2"])
    monkeypatch.setattr(start, "preflight", lambda *arguments: verdict)
    recipe = write_recipe(shared)
    assert start.start(StopFlag(), [str(recipe), "--nodes", "n0 n1 n2"]) == code
    # One that was cancelled, and that Slurm has started anew before it could end, does not even look.
    monkeypatch.setattr(start, "preflight", None)
    JobFolder.of_run(load_recipe(StageRecipe, recipe).run).note("cancel", 7)
    assert start.start(StopFlag(), [str(recipe), "--nodes", "n0 n1 n2"]) == ExitCode.REQUEUE


def test_the_speed_of_a_gpu_is_that_of_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0, 4, 10, 12, 20, 23, 30, 35, 40, 42, 50, 54, 60, 63])
    monkeypatch.setattr(interconnect, "MATRIX", 8)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(interconnect, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    # 2n^3 floating-point operations, in two seconds
    assert interconnect.gpu_tflops(torch.device("cpu")) == pytest.approx(2 * 8**3 / 2 / 1e12)


def test_memory_is_what_the_kernel_calls_available(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "MemTotal:       9000 kB\nMemFree:        3000 kB\nMemAvailable:   5000 kB\nBuffers:          70 kB\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path: said)
    assert available_memory() == 5000 * 1024
