"""`bitdance report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder: the `run` of a stage's recipe.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; RUN/report.html if not given.")
    ] = None,
) -> None:
    """One HTML page about a run: curves, samples, restarts, skips; also while the run goes on."""
    import time

    from foundation.files import atomic_write
    from foundation.progress import say
    from trainer.report.page import render_page
    from trainer.report.run_data import read_run

    page = render_page(read_run(run), time.time())
    path = output or run / "report.html"
    with atomic_write(path) as file:
        file.write(page)
    say(f"wrote {path} ({len(page) / 1e6:.2f} MB)")
