"""A real Slurm of several nodes on one machine: Debian's slurmctld, slurmd and munged as child processes.

As root each node is a network namespace on a bridge, with its own hostname and process ids: killing the
namespace's first process is a node crash, taking its link down is a partition. As another user the nodes
differ by their port alone (flat), and can be neither crashed nor cut off.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_configuration import CONFIGURATION
from node_network import (
    PATH,
    PREFIX,
    ip,
    may_make_namespaces,
    remove_leftovers,
    remove_network,
)
from processes import descendants, die_with_parent, free_port, kill, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CPUS, MEMORY_MB = 16, 64000  # of a node, as Slurm is told
PATIENCE = 120.0  # seconds; on busy cores a daemon's answer may take twenty


def why_not() -> str | None:
    """Why no cluster can be started here; None where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"Slurm is not installed here: {', '.join(missing)} not found (apt: slurm-wlm munge)"
    return None


@dataclass
class Node:
    """A node: its name, address, port and slurmd."""

    name: str
    address: str
    port: int
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Cluster:
    """The cluster under ``base``; `environment` points Slurm's commands at it.

    Attributes:
        base: folder of all state; short, since it holds a socket.
        gpus: fake ones of each node.
        grace: seconds between the warning and the end of a preempted job.
    """

    base: Path
    count: int = 4
    gpus: int = 8
    grace: int = 20
    namespaces: bool = field(default_factory=may_make_namespaces)

    def __post_init__(self) -> None:
        self._tag = f"{PREFIX}{os.getpid()}"
        self._network = f"10.{180 + os.getpid() // 250 % 60}.{os.getpid() % 250}"
        self._hidden: set[str] = set()  # nodes that see less than the others
        self._controller: subprocess.Popen[bytes] | None = None
        self._munged: subprocess.Popen[bytes] | None = None
        names = [f"n{number}" for number in range(1, self.count + 1)]
        if self.namespaces:
            self.controller_address = f"{self._network}.1"
            self.nodes = {n: Node(n, f"{self._network}.{10 + i}", 6818) for i, n in enumerate(names)}
        else:
            self.controller_address = "127.0.0.1"
            self.nodes = {n: Node(n, "127.0.0.1", free_port()) for n in names}
        self.environment = os.environ | {"SLURM_CONF": str(self.base / "slurm.conf"), "PATH": PATH}
        # Ranks start as fast as a user's do: no module of ours is compiled again each time.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    # --- the whole ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything; returns when all nodes are idle."""
        try:
            self._write_files()
            if self.namespaces:
                remove_leftovers()
                self._make_bridge()
            self._start_munged()
            self.start_controller()
            for name in self.nodes:
                self.start_node(name)
            wait_until(lambda: self.states() == dict.fromkeys(self.nodes, "IDLE"), PATIENCE, "idle nodes")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process and remove every interface of this cluster."""
        for node in self.nodes.values():
            self._end_node(node)
        for process in (self._controller, self._munged):
            if process is not None:
                process.kill()
                process.wait()
        if self.namespaces:
            remove_network(self._tag)

    def run(self, *command: str, **options: Any) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            **options,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of each node."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return {name: state.upper().rstrip("*") for name, state in map(str.split, lines)}

    def job(self, number: int | str) -> dict[str, str]:
        """A job as `scontrol show job` knows it."""
        return self.elements(number)[0]

    def elements(self, number: int | str) -> list[dict[str, str]]:
        """The elements of an array, each as a job; a job itself where it is none."""
        lines = self.run("scontrol", "show", "job", "-o", str(number)).splitlines()
        return [dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word) for line in lines]

    def mend(self) -> None:
        """Whole again: links up, nodes and controller running, no jobs, no node drained."""
        if self._controller is not None and self._controller.poll() is not None:
            self.start_controller()
        self.run("scancel", "--user", str(os.geteuid()))
        for name, node in self.nodes.items():
            if self.namespaces:
                self.set_link(name, up=True)
            if name in self._hidden:
                self._end_node(node)
            if node.process is None:
                self.start_node(name)
        self._hidden.clear()
        drained = [name for name, state in self.states().items() if state.startswith("DRAIN")]
        if drained:
            self.run("scontrol", "update", f"nodename={','.join(drained)}", "state=resume")
        idle = dict.fromkeys(self.nodes, "IDLE")
        wait_until(lambda: self.states() == idle, PATIENCE, "idle nodes")

    # --- nodes ----------------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        """Start a node, or start it again after a crash."""
        node = self.nodes[name]
        command = ["slurmd", "-D", "-N", name, "-f", str(self.base / "slurm.conf")]
        if self.namespaces:
            inside = (
                f"hostname {name} && mount --bind {self.base}/hosts /etc/hosts && "
                f"mount --bind {self.base}/resolv.conf /etc/resolv.conf && exec {' '.join(command)}"
            )
            enter = ["nsenter", f"--net=/run/netns/{self._tag}{name}"]
            unshare = ["unshare", "-u", "-m", "-p", "-f", "--mount-proc", "--kill-child=KILL"]
            command = [*enter, *unshare, "sh", "-c", inside]
            if not Path(f"/run/netns/{self._tag}{name}").exists():
                self._make_namespace(node)
        node.process = self._spawn(command, f"slurmd.{name}.out")

    def crash_node(self, name: str) -> None:
        """All that runs on a node dies at once (namespaces only)."""
        assert self.namespaces
        self._end_node(self.nodes[name])

    def set_link(self, name: str, up: bool) -> None:
        """Connect a node to the others, or cut it off (namespaces only)."""
        assert self.namespaces
        # The bridge's end of the cable: what runs on the node goes on and sees nobody.
        ip("link", "set", f"{self._tag}{name}", "up" if up else "down")

    def hide(self, name: str, folder: Path, size: str = "50%") -> None:
        """On one node, an empty disk in place of a folder of the shared file system (namespaces only)."""
        first = descendants(self._process(name).pid)[0]
        command = ["nsenter", f"--target={first}", "--mount"]
        command += ["mount", "-t", "tmpfs", "-o", f"size={size}", "none"]
        subprocess.run([*command, str(folder)], check=True)
        self._hidden.add(name)

    def _process(self, name: str) -> subprocess.Popen[bytes]:
        process = self.nodes[name].process
        assert process is not None
        return process

    def processes(self, name: str, words: str) -> list[int]:
        """Processes on a node whose command line contains ``words`` (as this machine numbers them).

        Another worker's cluster has nodes of the same names.
        """
        found, job = [], {f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.base}/slurm.conf".encode()}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if words in line and job <= set(variables):
                found.append(int(folder.name))
        return sorted(found)

    def _end_node(self, node: Node) -> None:
        if node.process is None:
            return
        if self.namespaces:
            node.process.kill()  # --kill-child: the namespace's first process goes, and all others with it
        else:
            for pid in descendants(node.process.pid):
                kill(pid)
            node.process.kill()
        node.process.wait()
        node.process = None

    # --- controller -----------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        """Start slurmctld, or start it again."""
        self._controller = self._spawn(
            ["slurmctld", "-D", "-f", str(self.base / "slurm.conf")], "slurmctld.out"
        )
        wait_until(self._controller_answers, PATIENCE, "an answer of slurmctld")

    def kill_controller(self) -> None:
        """slurmctld dies."""
        assert self._controller is not None
        self._controller.kill()
        self._controller.wait()

    def _controller_answers(self) -> bool:
        done = subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, check=False)
        return b"is UP" in done.stdout

    # --- inside ---------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for folder in ("state", "dev"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        key = self.base / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        hostname = socket.gethostname().split(".")[0]
        lines, gres = [], []
        for node in self.nodes.values():
            place = f"NodeAddr={node.address} Port={node.port}"
            place += "" if self.namespaces else f" NodeHostname={hostname}"
            fakes = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            lines.append(
                f"NodeName={node.name} {place} CPUs={CPUS} RealMemory={MEMORY_MB}{fakes} State=UNKNOWN"
            )
        if self.gpus:
            for number in range(self.gpus):
                (self.base / "dev" / f"gpu{number}").symlink_to("/dev/null")
            gres.append(f"NodeName=n[1-{self.count}] Name=gpu File={self.base}/dev/gpu[0-{self.gpus - 1}]\n")
        (self.base / "gres.conf").write_text("".join(gres))
        hosts = [("127.0.0.1", "localhost"), (self.controller_address, hostname)]
        hosts += [(node.address, node.name) for node in self.nodes.values()]
        (self.base / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts))
        (self.base / "resolv.conf").write_text("")
        (self.base / "slurm.conf").write_text(
            CONFIGURATION.format(
                base=self.base,
                controller=hostname,
                controller_address=self.controller_address,
                controller_port=free_port(),
                user=subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip(),
                nodes="\n".join(lines),
                grace=self.grace,
            )
        )

    def _start_munged(self) -> None:
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.base}/munge.{name}" for option, name in files.items()]
        self._munged = self._spawn(["munged", "-F", "--force", *options], "munged.out")
        wait_until((self.base / "munge.socket").exists, PATIENCE, "munge's socket")

    def _make_bridge(self) -> None:
        ip("link", "add", self._tag, "type", "bridge")
        ip("addr", "add", f"{self.controller_address}/24", "dev", self._tag)
        ip("link", "set", self._tag, "up")

    def _make_namespace(self, node: Node) -> None:
        name = f"{self._tag}{node.name}"
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", self._tag, "up")
        ip("-n", name, "addr", "add", f"{node.address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with open(self.base / log, "ab") as output:
            return subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )
