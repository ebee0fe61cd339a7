"""What can be known to go wrong before a job is submitted; all of it is told together."""

from __future__ import annotations

import getpass
import glob
import grp
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from foundation.errors import Problems
from foundation.progress import say
from slurm.controller import ControllerAway, SlurmError, missing_commands, show, slurm
from slurm.fitting import check_batch, check_memory
from slurm.script import options_of
from slurm.site import SITE_FILE, Site, SiteFile
from slurm.work import Work
from trainer.plan.gpus import GPUS
from trainer.recipe import StageRecipe

_GPU = re.compile(r"\bgpu(?::([^:,(]+))?:(\d+)")  # type and count
UNIT_SECONDS = (1, 60, 3600)
DATA_SCRIPTS = ("tokenize.sbatch", "command.sbatch")
DATA_SAVE_SECONDS = 120  # before their limit these are told to stop, by their own line (--signal)
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # never shared, unless the site file says so


def node_range(text: str) -> tuple[int, int] | None:
    """`N` or `N-M` as least and most nodes; None where it is neither."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        return None
    least, most = int(match[1]), int(match[2] or match[1])
    return (least, most) if 1 <= least <= most else None


def check_cluster(
    problems: Problems, file: SiteFile, nodes: str, works: Sequence[Work]
) -> list[dict[str, str]]:
    """Slurm's commands, its controller, the partitions, and whether they have what is asked for.

    Args:
        works: the jobs; what is done already asks for nothing.

    Returns:
        The nodes in which stages are to train, as `show` tells them; [] where that was not to be had.

    Raises:
        ControllerAway: the controller does not answer.
    """
    missing = missing_commands()
    if missing:
        problems.add(
            "Slurm", f"{', '.join(missing)} not found", "submit on a login node, where Slurm's commands are"
        )
        return []
    least_most = node_range(nodes)
    if least_most is None:
        problems.add("--nodes", f"{nodes!r} is no number of nodes", "for example 16, or 12-16")
    try:
        partitions = show("partition")
    except ControllerAway:
        raise
    except SlurmError as error:
        problems.add("Slurm", str(error), "ask the cluster's people")
        return []
    named: list[dict[str, str]] = []
    todo = ((work.script in DATA_SCRIPTS, work.site) for work in works if not work.done)
    looked_at: dict[tuple[str | None, ...], dict[str, str] | None] = {}
    for data, site in sorted(dict.fromkeys(todo), key=lambda one: one[0]):  # a stage's nodes are more
        wanted, setting = tuple(_given(site, key) for key in ("partition", "account", "qos")), "PARTITION"
        if data and site.partition != file.site.partition:
            setting = "DATA_PARTITION"
        if wanted not in looked_at:
            least = 1 if data or least_most is None else least_most[0]
            looked_at[wanted] = _partition(problems, replace(file, site=site), setting, partitions, least)
        partition = looked_at[wanted]
        if partition is None:
            continue
        _check_time(problems, site, partition, data)
        if not data and not named and partition["Nodes"] != "(null)":
            named = show("node", partition["Nodes"])
            _check_gpus(problems, site, f"partition {partition['PartitionName']}", named)
    return named


def _partition(
    problems: Problems,
    file: SiteFile,
    setting: str,
    partitions: Sequence[dict[str, str]],
    least: int,
) -> dict[str, str] | None:
    """The partition that a site file names, looked at; None where there is none."""
    wanted = _given(file.site, "partition")
    for partition in partitions:
        if partition["PartitionName"] == wanted or (wanted is None and partition["Default"] == "YES"):
            _check_permission(problems, file.site, partition)
            _check_size(problems, partition, least)
            return partition
    names = ", ".join(sorted(partition["PartitionName"] for partition in partitions))
    where = str(file.path) if file.path else "slurm/site.env"
    found = f"there is no partition {wanted!r}" if wanted else "the cluster has no default partition"
    problems.add(f"{where}: {setting}", found, f"this cluster's: {names}")
    return None


def _check_permission(problems: Problems, site: Site, partition: dict[str, str]) -> None:
    where = f"partition {partition['PartitionName']}"
    if partition["State"] != "UP":
        problems.add(
            where, f"it is {partition['State'].lower()}", "take another, or ask the cluster's people"
        )
    allowed = partition.get("AllowGroups", "ALL")
    if allowed != "ALL":
        mine = _own_groups()
        if not mine & set(allowed.split(",")):
            problems.add(
                where,
                f"you may not use it: only the groups {allowed} may, you are in {', '.join(sorted(mine))}",
                "take another partition, or ask for access",
            )
    account = _given(site, "account") or _default_account(partition)
    if account is None and partition.get("AllowAccounts", "ALL") != "ALL":
        found = f"it takes the accounts {partition['AllowAccounts']} only, and none is given"
        problems.add(where, found, "set ACCOUNT in the site file")
    _check_listed(problems, partition, ("Accounts", "account", "ACCOUNT"), account)
    _check_listed(problems, partition, ("Qos", "QOS", "QOS"), _given(site, "qos"))


def _given(site: Site, option: str) -> str | None:
    """An option as sbatch will have it: the shell's word goes before the script's."""
    in_script = options_of(site.sbatch_options).get(option) or getattr(site, option)
    return os.environ.get(f"SBATCH_{option.upper()}") or in_script


def _default_account(partition: dict[str, str]) -> str | None:
    """One's own in the accounting database, where the partition asks for one and there is a database."""
    if not {"AllowAccounts", "DenyAccounts"} & {key for key, names in partition.items() if names != "ALL"}:
        return None
    with suppress(SlurmError):
        who = ("show", "user", getpass.getuser(), "format=defaultaccount")
        return slurm("sacctmgr", "--noheader", "--parsable2", *who).strip() or None
    return None


def _check_listed(
    problems: Problems, partition: dict[str, str], names: tuple[str, str, str], given: str | None
) -> None:
    """Whether a partition's lists let an account or QOS in; `names`: Slurm's, ours, that of the site file."""
    key, what, setting = names
    where, value = f"partition {partition['PartitionName']}", (given or "").lower()
    allowed, denied = (partition.get(f"{verb}{key}", "ALL") for verb in ("Allow", "Deny"))
    fix = f"set {setting} in the site file, or take another partition"
    if given and allowed != "ALL" and value not in allowed.lower().split(","):
        plural = f"{what}s" if what.islower() else what
        problems.add(where, f"it takes the {plural} {allowed} only, this one is {given!r}", fix)
    if given and denied != "ALL" and value in denied.lower().split(","):
        problems.add(where, f"it takes no {what} of {denied}, and this one is {given!r}", fix)


def _own_groups() -> set[str]:
    names = set()
    for number in {os.getgid(), *os.getgroups()}:
        with suppress(KeyError):  # a number without a name, as in a container
            names.add(grp.getgrgid(number).gr_name)
    return names


def _check_size(problems: Problems, partition: dict[str, str], least: int) -> None:
    where, total = f"partition {partition['PartitionName']}", int(partition["TotalNodes"])
    if least > total:
        problems.add("--nodes", f"{least} nodes asked for, {where} has {total}", "ask for fewer")


def _check_time(problems: Problems, site: Site, partition: dict[str, str], data: bool) -> None:
    """Whether a partition gives the time that jobs ask for, and whether they have any before they are told to
    stop; a job that asks for none gets what the partition gives.

    Args:
        data: whether the jobs are those of data, and ``site`` what they take.
    """
    of, options = f"partition {partition['PartitionName']}", "DATA_OPTIONS" if data else "SBATCH_OPTIONS"
    in_force = {
        "SBATCH_TIMELIMIT": os.environ.get("SBATCH_TIMELIMIT"),
        f"--time in {options}": options_of(site.sbatch_options).get("time"),
        "TIME_LIMIT": site.time_limit,
        f"DefaultTime of {of}": partition["DefaultTime"].replace("NONE", ""),
        f"MaxTime of {of}": partition["MaxTime"],
    }
    whose, text = next((name, text) for name, text in in_force.items() if text)
    try:
        limit, most = seconds_of(text), seconds_of(partition["MaxTime"])
    except ValueError:
        problems.add(whose, f"{text} is no time", "for example 24:00:00")
        return
    if most is not None and (limit is None or limit > most):
        problems.add(whose, f"{text} is above {partition['MaxTime']}, the most of {of}", "lower it")
    save = DATA_SAVE_SECONDS if data else site.save_seconds
    if limit is not None and save >= limit:
        where, or_ = ("data jobs are told to stop", "") if data else ("SAVE_SECONDS", "lower it, or ")
        found = f"{save} s before the limit of {text} is before the start"
        problems.add(where, found, f"{or_}have more than {whose} gives")


def _check_gpus(problems: Problems, site: Site, where: str, named: Sequence[dict[str, str]]) -> None:
    most = max((gpus_of(node) for node in named), default=0)
    if most < site.gpus_per_node:
        found = f"{site.gpus_per_node} are wanted, the nodes of {where} have {most}"
        problems.add("GPUS_PER_NODE", found, "lower it")
    if most and "gpus_per_node" not in site.model_fields_set:
        found = f"the nodes of {where} have {most} GPUs, and how many a job is to use is not said"
        problems.add("GPUS_PER_NODE", found, f"set it in the site file, {SITE_FILE} or --site; 0 for none")


def seconds_of(text: str | None) -> int | None:
    """A time as Slurm writes it (minutes, m:s, h:m:s, d-h:m:s); None where there is no limit."""
    if text is None or text.upper() in ("UNLIMITED", "INFINITE", "0", "-1"):
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts = [*parts, 0, 0][:3]  # d-h, d-h:m, d-h:m:s
    elif len(parts) == 1:
        parts = [0, parts[0], 0]  # minutes
    seconds = sum(part * unit for part, unit in zip(reversed(parts), UNIT_SECONDS, strict=False))
    return int(days or 0) * 86400 + seconds


def gpus_of(node: dict[str, str]) -> int:
    """GPUs of a node, of any type: `gpu:8` or `gpu:h100:8(S:0-1)`."""
    return sum(int(count) for _, count in _GPU.findall(node.get("Gres", "")))


def check_work(
    problems: Problems, work: Work, made_before: set[Path], file: SiteFile, nodes: Sequence[dict[str, str]]
) -> None:
    """Whether a job finds what it reads, in places that all nodes see, and can be cut for its nodes. One that
    is done reads nothing any more.

    Args:
        made_before: run folders and datasets of the jobs that it waits for.
        nodes: of the partition.
    """
    if work.check is not None:
        work.check(problems)
    if work.done:
        return
    shared = [Path(folder) for folder in file.site.shared_folders.split(":") if folder]
    for key, path in work.reads.items():
        made = any(path == folder or folder in path.parents for folder in made_before)
        if not made and not path.exists() and not any(glob.iglob(str(path), recursive=True)):
            fix = "make it first, or name the recipe that makes it before this one in --chain"
            problems.add(f"{work.title}: {key}", f"{path} does not exist", fix)
    for key, path in {**work.reads, "its folder": work.folder.path}.items():
        _check_shared(problems, f"{work.title}: {key}", path, shared)
    if isinstance(work.recipe, StageRecipe):
        least_most = node_range(work.options["nodes"] or "")
        if least_most is not None and nodes:  # else said already
            unit = "GPUs" if file.site.gpus_per_node else "processes"
            check_batch(problems, work, work.recipe, least_most, len(nodes), unit)


def check_interpreter(problems: Problems, file: SiteFile) -> None:
    """Whether the nodes can see the interpreter (one inside a container cannot be looked for here)."""
    if "--container" in file.site.srun_options:
        return
    python = Path(file.site.python or sys.executable)
    if not os.access(python, os.X_OK):
        problems.add("PYTHON", f"{python} is no program", "name the .venv/bin/python of an installation")
    shared = [Path(folder) for folder in file.site.shared_folders.split(":") if folder]
    _check_shared(problems, "PYTHON", python, shared)
    _check_shared(problems, "the current folder", Path.cwd(), shared)


def _check_shared(problems: Problems, where: str, path: Path, shared: Sequence[Path]) -> None:
    place = Path(os.path.abspath(path))
    if shared and not any(place.is_relative_to(folder) for folder in shared):
        names = ", ".join(map(str, shared))
        problems.add(where, f"{place} is not in a folder that all nodes see", f"SHARED_FOLDERS: {names}")
    if not shared and any(place.is_relative_to(folder) for folder in NODE_LOCAL):
        fix = "put it where all nodes see it; if they do see it, say so in the site file: SHARED_FOLDERS"
        problems.add(where, f"{place} is on this machine alone", fix)


def check_plan(problems: Problems, work: Work, site: Site, nodes: Sequence[dict[str, str]]) -> None:
    """Whether a stage fits into the memory of its GPUs. That takes seconds, so all else is asked before.

    Args:
        nodes: of the partition.
    """
    least_most = node_range(work.options.get("nodes") or "")
    if not isinstance(work.recipe, StageRecipe) or least_most is None or not site.gpus_per_node or work.done:
        return
    ranks, kind = least_most[0] * int(work.options["ntasks-per-node"] or 1), gpu_kind(site, nodes)
    say(f"{work.title}: looking whether it fits into {ranks} GPUs ({kind})")
    check_memory(problems, work, work.recipe, ranks, kind)


def gpu_kind(site: Site, nodes: Sequence[dict[str, str]]) -> str:
    """The kind of GPU that a job gets: what the site file says; else, of the kinds that the nodes' types of
    GPUs may stand for (of all, where a type is missing or unknown), the one with most memory.
    """
    if site.gpu_kind is not None:
        return site.gpu_kind
    kinds: set[str] = set()
    for node in nodes:
        for kind in _GPU.findall(node.get("Gres", "")):
            words = re.split(r"[^a-z0-9]+", kind[0].lower())
            kinds.update([name for name in GPUS if name.partition("-")[0] in words] or GPUS)
    return max(kinds or GPUS, key=lambda name: GPUS[name].memory)
