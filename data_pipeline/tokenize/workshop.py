"""What a process does tasks with (tokenizers, kept rows, decode workers), and what is made of their ends."""

from __future__ import annotations

import traceback
from concurrent.futures import BrokenExecutor, Executor
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.ingest.kept import KeptRows
from data_pipeline.ingest.refusals import TooManyRefused
from data_pipeline.ingest.samples import printable
from data_pipeline.ingest.shards import Shard
from data_pipeline.ingest.storage import StoreUnreachable, fails_for_a_while
from data_pipeline.store import NO_PLACE
from data_pipeline.tokenize.captions import (
    CaptionCounter,
    load_text_tokenizer_or_refuse,
    text_tokenizer_hash,
)
from data_pipeline.tokenize.decoding import decode_pool
from data_pipeline.tokenize.encoder import Encoder
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.recipe import TokenizeRecipe
from data_pipeline.tokenize.task import TaskRunner
from foundation.errors import ExitCode, RecipeError, UserError

MESSAGE_SHOWN = 500  # characters of an error that nobody foresaw
GOES_ON = "what is done stays done, and the same command goes on"
LESS_MEMORY = "lower compute.processes, compute.decoders or batch_pixels"


class WorkerDied(UserError):
    """A process that worked on a task is gone, or has no memory left: perhaps for what lies in its shard."""

    exit_code = ExitCode.REQUEUE


class MachineFails(UserError):
    """Workers cannot work here, whatever the shard."""

    exit_code = ExitCode.REQUEUE


class Workshop:
    """One process's tokenizers and decode workers, opened once for all of its tasks.

    Args:
        recipe: the recipe.
        plan: as fixed by the first run.
        index: folder of the kept rows' index; None where the recipe keeps all samples.
        place: number of the process on this machine; it takes GPU `place` modulo their number.
    """

    def __init__(self, recipe: TokenizeRecipe, plan: Plan, index: Path | None, place: int):
        self.recipe = recipe
        self.plan = plan
        self.index = index
        self.place = place
        self.stack = ExitStack()

    def __enter__(self) -> Workshop:
        recipe, text = self.recipe, self.plan.text_tokenizer
        self.folder = DatasetFolder(recipe.output)
        name = str(self.folder.store.local(text.name)) if text.inside else text.name
        tokenizer = load_text_tokenizer_or_refuse(name)
        if text_tokenizer_hash(tokenizer) != text.sha256:
            raise RecipeError(
                f"The text tokenizer {name} is another one than when {recipe.output} was begun; put the "
                "earlier one back, or name another output folder"
            )
        counter = CaptionCounter(tokenizer, recipe.captions.max_tokens)
        encoder = Encoder(recipe.tokenizer, recipe.dtype, _device(recipe.compute.device, self.place))
        kept = KeptRows(recipe.keep.by, self.index) if recipe.keep and self.index else None
        decoders: Executor | None = None
        if recipe.compute.decoders:
            decoders = self.stack.enter_context(decode_pool(recipe.compute.decoders))
        self.runner = TaskRunner(recipe, self.plan, encoder, counter, kept, decoders)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def attempt(self, number: int) -> str | None:
        """Do a task; the reason where its data do not allow it, which is recorded too.

        Raises:
            StoreUnreachable: a store does not answer, or a file system fails, which is not the shard's fault.
            WorkerDied: a decode worker is gone, or no memory is left; this process can do no more.
            MachineFails: the GPU is gone, or too small: all batches are of one size, whatever the shard.
            OSError: nothing can be written.
        """
        import torch

        shard, refused = self.plan.shards[number], list[dict[str, str]]()
        try:
            self.runner.run(number)
        except StoreUnreachable:
            raise
        except TooManyRefused as error:
            reason, refused = str(error), error.refused
        except UserError as error:
            reason = str(error)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise MachineFails(
                f"{shard.label}: {type(error).__name__} (probably out of memory: {LESS_MEMORY}); {GOES_ON}"
            ) from error
        except MemoryError as error:
            raise WorkerDied(f"no memory was left ({LESS_MEMORY})") from error
        except BrokenExecutor as error:
            raise WorkerDied(
                f"a decode worker died (out of memory: {LESS_MEMORY}; or a decoder crashed)"
            ) from error
        except Exception as error:
            # Whatever a shard can do to us ends its own task; the others go on, now and in every rerun.
            if isinstance(error, OSError) and error.errno in NO_PLACE:
                raise
            if fails_for_a_while(error):
                raise StoreUnreachable(
                    f"{shard.label}: {error.strerror}; the same command goes on once it can be read"
                ) from error
            reason = _unforeseen(shard, error)
        else:
            return None
        self.folder.fail(number, shard, reason, refused)
        return reason


def _unforeseen(shard: Shard, error: Exception) -> str:
    """A reason to report: what was raised, and the innermost of our own lines that raised it."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "data_pipeline" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "unknown place"
    said = printable(str(error))[:MESSAGE_SHOWN]
    return f"{shard.label}: {type(error).__name__} at {where}: {said}"


def _device(kind: str, place: int) -> str:
    if kind == "cpu":
        return kind
    import torch

    return f"cuda:{place % max(1, torch.cuda.device_count())}"
