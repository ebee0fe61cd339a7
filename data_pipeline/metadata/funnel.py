"""The funnel: how many rows came in, and how many each rule dropped; as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FunnelStep:
    """One rule: rows before it and rows after it."""

    rule: str
    before: int
    after: int

    @property
    def dropped(self) -> int:
        """Rows that the rule dropped."""
        return self.before - self.after


@dataclass(frozen=True)
class Funnel:
    """Rows through all rules, in order.

    Attributes:
        rows: rows of all sources.
        steps: one for each rule.
        uncastable: column -> texts of the sources that are no numbers, and count as missing.
        seconds: wall time.
    """

    rows: int
    steps: tuple[FunnelStep, ...]
    uncastable: dict[str, int]
    seconds: float

    @property
    def kept(self) -> int:
        """Rows after the last rule."""
        return self.steps[-1].after if self.steps else self.rows

    def to_json(self) -> str:
        """The funnel as JSON text."""
        values: dict[str, Any] = asdict(self) | {"kept": self.kept}
        return json.dumps(values, indent=1) + "\n"


def print_funnel(funnel: Funnel) -> None:
    """Print the funnel as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{funnel.rows:,} rows in, {funnel.kept:,} kept ({funnel.seconds:.1f} s)")
    table.add_column("rule")
    for name in ("before", "dropped", "after", "of all"):
        table.add_column(name, justify="right")
    for step in funnel.steps:
        share = f"{step.after / funnel.rows:.1%}" if funnel.rows else "-"
        table.add_row(escape(step.rule), f"{step.before:,}", f"{step.dropped:,}", f"{step.after:,}", share)
    Console().print(table)


def draw_funnel(funnel: Funnel, path: Path) -> None:
    """Draw the funnel as horizontal bars, a PNG."""
    from matplotlib.figure import Figure

    labels = ["all rows", *(step.rule for step in funnel.steps)]
    values = [funnel.rows, *(step.after for step in funnel.steps)]
    figure = Figure(figsize=(9, 0.45 * len(labels) + 1), layout="constrained")
    axes = figure.subplots()
    # By number: two rules may have the same label. Labels have the recipe's values, whose `$` is no formula.
    bars = axes.barh(range(len(labels)), values, color="#4477aa")
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows left")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)
