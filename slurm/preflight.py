"""Before training: each rank looks at its node, and all agree on which nodes are bad.

Reports go through a TCP store and not through a collective, so that a rank that never answers is named too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from foundation.progress import say
from slurm.node_checks import Limits, Report, check_node
from trainer.recipe import StageRecipe

LEAVE_SECONDS = 10.0  # in which the other ranks take the verdict


@dataclass(frozen=True)
class Verdict:
    """What comes out of a preflight: the bad nodes with what is wrong with each, and a line of figures."""

    bad: dict[str, list[str]]
    nodes: list[str]
    figures: str = ""


def preflight(
    recipe: StageRecipe, limits: Limits, nodes: Sequence[str], environment: Mapping[str, str]
) -> Verdict:
    """Look at this rank's node and agree with all others (collective).

    Args:
        nodes: of the job, in Slurm's order: ranks fill one after the other.
        environment: what srun has set, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    """
    from slurm.interconnect import check_gpu, node_name, start_group, store_of

    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    job, start = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    token = Path(recipe.run) / "slurm" / f".preflight-{job}-{start}"  # an earlier start may live on
    if rank == 0:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(str(time.time()))
    store = store_of(environment, rank, ranks, limits.patience)
    report = Report(node_name(environment), rank)
    if environment.get("LOCAL_RANK", "0") == "0":
        check_node(report, recipe, limits, token)
    check_gpu(report, limits, environment)
    store.set(f"report/{rank}", json.dumps(report.to_json()))
    if rank == 0:
        found = _collect(store, ranks, nodes, limits)
        token.unlink(missing_ok=True)  # all that have answered have looked for it
        store.set("reports", json.dumps([r.to_json() for r in found]))
    store.wait(["reports"], timedelta(seconds=limits.patience + 60))
    reports = [Report(**values) for values in json.loads(store.get("reports"))]
    compare_facts(reports)
    figures = ""
    if not any(r.problems for r in reports):
        start_group(store, rank, ranks)
        figures = _together(reports, limits)
    verdict = judge(reports, list(nodes), figures)
    _leave_together(store, rank, ranks)
    return verdict


def _collect(store: object, ranks: int, nodes: Sequence[str], limits: Limits) -> list[Report]:
    """All ranks' reports; of a rank that stays silent, one that says so."""
    from torch.distributed import Store

    assert isinstance(store, Store)
    deadline, reports = time.monotonic() + limits.patience, []
    for rank in range(ranks):
        node = nodes[rank * len(nodes) // ranks]
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=left))
        except RuntimeError:  # torch's DistStoreError is one
            silent = f"rank {rank} has not answered within {limits.patience:.0f} s"
            reports.append(Report(node, rank, [silent]))
            continue
        reports.append(Report(**json.loads(store.get(f"report/{rank}"))))
    return reports


def _together(reports: list[Report], limits: Limits) -> str:
    """What can only be measured together; the figures in words."""
    import torch.distributed as dist

    from slurm.interconnect import check_bandwidth, check_clocks

    try:
        check_clocks(reports, limits)
        bandwidth = check_bandwidth(reports, limits)
    finally:
        dist.destroy_process_group()
    memory = min(r.measured["memory_gb"] for r in reports if "memory_gb" in r.measured)
    disk = min(r.measured["disk_gb"] for r in reports if "disk_gb" in r.measured)
    return f"memory >= {memory:.0f} GB, disk >= {disk:.0f} GB, {bandwidth}"


def _leave_together(store: object, rank: int, ranks: int) -> None:
    """Rank 0 holds the store: it leaves last."""
    from torch.distributed import Store

    assert isinstance(store, Store)
    store.add("left", 1)
    deadline = time.monotonic() + LEAVE_SECONDS
    while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)


def compare_facts(reports: Sequence[Report]) -> None:
    """Blame the nodes whose facts are not those of most nodes (of the first one's, where there is a tie)."""
    for key in sorted({key for report in reports for key in report.facts}):
        found = [report for report in reports if key in report.facts]
        usual = Counter(report.facts[key] for report in found).most_common(1)[0][0]
        for report in found:
            if report.facts[key] != usual:
                report.problems.append(_difference(key, report.facts[key], usual))


def _difference(key: str, here: str, usual: str) -> str:
    if key == "packages":
        differing = sorted(set(here.split(", ")) - set(usual.split(", ")))
        return f"it has other versions than the others: {', '.join(differing)}"
    return f"{key} is {here} there, {usual} on the others"


def judge(reports: Sequence[Report], nodes: list[str], figures: str) -> Verdict:
    """The nodes with problems; each problem once."""
    bad: dict[str, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            known = bad.setdefault(report.node, [])
            if problem not in known:
                known.append(problem)
    return Verdict(bad, nodes, figures)


def announce(verdict: Verdict) -> None:
    """Say it in the job's log: `slurm.after` reads there which nodes to leave out, if any."""
    if not verdict.bad:
        say(f"bitdance: preflight of {len(verdict.nodes)} nodes passed: {verdict.figures}")
    for node, problems in verdict.bad.items():
        for problem in problems:
            say(f"bitdance: bad node {node}: {problem}")
