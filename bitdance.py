"""The front door: one command, `bitdance`, made of the sub-commands of each room.

Nothing heavy is imported here: each command imports what it needs when it runs, so that help answers at once.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback
from typing import Any

INTERRUPTED = 128 + signal.SIGINT

try:
    import typer
    from typer.core import TyperGroup

    from data_pipeline.cli import app as data_app
    from evaluation.cli import app as evaluation_app
    from evaluation.weights_cli import app as weights_app
    from foundation.errors import ExitCode, UserError
    from foundation.partials import final_of
    from slurm.cli import app as slurm_app
    from trainer.cli import app as trainer_app
    from trainer.plan.cli import app as plan_app
    from trainer.report.cli import app as report_app
    from trainer.tokenizer_training.cli import app as tokenizer_app
except KeyboardInterrupt:  # Ctrl-C before anything was begun: nothing to tell, and no traceback of an import
    sys.exit(INTERRUPTED)

HELP = """Train BitDance: autoregressive text-to-image models that predict binary visual tokens.

From photos to a picture, in the order of the work: [bold]data[/] turns image shards into binary
latents with a [bold]tokenizer[/]; [bold]train[/] runs one stage (pt, ct, sft, distill), each starting
from the export of the one before; [bold]generate[/] samples pictures from any export, or from published
weights after [bold]import[/]. [bold]plan[/] says what a stage will cost before it runs, [bold]submit[/]
runs recipes on a Slurm cluster. New here? [bold]bitdance quickstart[/] does it all with a tiny model in
minutes, and prints each command as it runs it.

Every job is a YAML recipe in configs/; --set changes one of its values. Every command may be run again:
it goes on where it stopped, and says so when nothing is left to do.

Exit codes: 0 done, 75 saved and wants to go on, 65 bad data, 78 bad recipe, 2 an unknown option or
argument, 70 a bug, 130 interrupted.
"""


def one_line_a_paragraph(text: str) -> str:
    """A help text as typer wants it: it would keep the line breaks of the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def reflow(room: typer.Typer) -> None:
    """Do so for the texts of all commands of a room."""
    for command in room.registered_commands:
        command.help = one_line_a_paragraph(command.help or inspect.getdoc(command.callback) or "")


class InOrder(TyperGroup):
    """Lists the commands in the order of the work, from photos to pictures, not by the alphabet."""

    order = (
        *("data", "tokenizer", "plan", "train", "report", "lineage"),
        *("generate", "compare", "import", "export", "quickstart"),
        *("submit", "jobs", "logs", "cancel"),
    )

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        known = [name for name in self.order if name in self.commands]
        return known + [name for name in self.commands if name not in known]

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Runs a command; typer itself would end at Ctrl-C without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand
            print(f"\n{name}: interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=one_line_a_paragraph(HELP),
)
app.add_typer(data_app, name="data", help="From metadata and image shards to binary latents.")
app.add_typer(tokenizer_app, name="tokenizer", help="Train the binary tokenizer.")
ROOMS = (plan_app, trainer_app, report_app, evaluation_app, weights_app, slurm_app)
for room in ROOMS:
    app.add_typer(room)
for room in (data_app, tokenizer_app, *ROOMS):
    reflow(room)


def main() -> None:
    """Run the command line: a user's mistake ends in one message and its exit code, a bug in a traceback."""
    try:
        # `quickstart` starts its commands with Ctrl-C held back: until here nobody could answer it well.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        app(prog_name="bitdance")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        place = final_of(os.fsdecode(error.filename))
        print(f"error: {place}: {error.strerror}; name a place that can be used", file=sys.stderr)
        sys.exit(ExitCode.RECIPE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception:  # noqa: BLE001  (the last line of defence: everything else has been caught before)
        traceback.print_exc()
        print("This is a bug in bitdance: please report it with the lines above.", file=sys.stderr)
        sys.exit(ExitCode.BUG)


if __name__ == "__main__":
    main()
