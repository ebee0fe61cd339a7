"""Which nodes the preflight's measurements blame."""

import pytest

from slurm.interconnect import blame_clocks, blame_slow
from slurm.node_checks import Report


def reports(nodes: int, ranks_of_each: int = 1) -> list[Report]:
    return [Report(f"n{rank // ranks_of_each}", rank) for rank in range(nodes * ranks_of_each)]


def blamed(found: list[Report]) -> list[str]:
    return [report.node for report in found if report.problems]


@pytest.mark.parametrize(
    ("times", "nodes"),
    [
        ([100.0, 108.0], ["n1"]),  # less than twice the limit: their mean would blame neither
        ([100.0, 120.0], ["n1"]),  # more: it would blame both
        ([100.0, 104.0], []),
        ([100.0, 100.1, 80.0], ["n2"]),
        ([100.0, 101.0, 120.0, 100.5], ["n2"]),
    ],
)
def test_a_clock_that_is_off(times: list[float], nodes: list[str]) -> None:
    found = reports(len(times))
    blame_clocks(found, times, 5.0)
    assert blamed(found) == nodes


@pytest.mark.parametrize(
    ("speeds", "nodes"),
    [
        ([20.0, 21.0, 4.0, 19.0], ["n3"]),
        ([20.0, 21.0, 12.0, 19.0], []),  # slower, but that is not it
        ([0.5, 0.6, 0.5, 0.5], []),  # all are, through the first one or by the network
        ([3.0], []),  # two nodes cannot tell which
        ([], []),  # one node
    ],
)
def test_a_slow_node(speeds: list[float], nodes: list[str]) -> None:
    found = reports(len(speeds) + 1, 2)
    measured = {f"n{number}": speed for number, speed in enumerate(speeds, start=1)}
    assert blame_slow(found, measured) is bool(nodes)
    assert blamed(found) == nodes


def test_a_slow_node_is_told_with_what_is_usual() -> None:
    found = reports(4)
    blame_slow(found, {"n1": 20.0, "n2": 3.0, "n3": 22.0})
    assert found[2].problems == ["it exchanges 3.00 GB/s with n0, the others 20.00"]
