"""What `bitdance submit` refuses, or leaves out, without a cluster: its commands are stand-ins."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_stage import recipe_values
from stand_in import (
    export,
    filter_values,
    site_file,
    stage,
    submit,
    tokenize_values,
    write_commands,
)
from typer.testing import CliRunner

from data_pipeline.global_batch import BatchPlan
from data_pipeline.latents import LatentDataset
from data_pipeline.packing import SampleCost
from foundation.errors import Problems, RecipeError
from foundation.recipes import load_recipe
from models.layout import add_sequence_tokens, sequence_tokens
from models.text_tokens import load_text_tokenizer
from slurm import checks
from slurm.checks import gpu_kind
from slurm.cli import app
from slurm.controller import ControllerAway
from slurm.fitting import check_memory
from slurm.history import JobFolder
from slurm.site import Site, SiteFile
from slurm.work import Asked, Work, open_recipe, work_of
from trainer.recipe import StageRecipe

ROOT = Path(__file__).parents[2]


def test_a_folder_that_is_there_is_not_taken_for_the_published_model(
    inputs: Path, tmp_path: Path, told: Path
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    message = submit(tmp_path, str(stage(inputs, tmp_path)), "--publish", str(published))
    assert f"export {published}: {published} is there already, and is not made of {tmp_path}/run" in message
    assert told.read_text() == ""


@pytest.mark.parametrize("done", [False, True])
def test_what_is_done_reads_nothing_any_more(tmp_path: Path, done: bool) -> None:
    """Photographs may be deleted once they are latents."""
    made = tmp_path / "manifest.json"
    if done:
        made.touch()
    folder, reads = JobFolder.of_run(tmp_path / "run"), {"input.path": tmp_path / "gone"}
    problems = Problems()
    work = Work("tokenize", "tokenize.sbatch", (), {}, folder, Site(), reads=reads, makes=made)
    checks.check_work(problems, work, set(), SiteFile(Site(shared_folders=str(tmp_path))), [])
    assert len(problems.lines) == (0 if done else 1)


def test_what_is_published_already_is_left_out(inputs: Path, tmp_path: Path, told: Path) -> None:
    """As the script of the job notes it, beside the folder."""
    recipe, published = stage(inputs, tmp_path), tmp_path / "published"
    submit(tmp_path, str(recipe))
    export(tmp_path)
    published.mkdir()
    note = tmp_path / "published.slurm" / "made-of.json"
    note.parent.mkdir()
    note.write_text('{"step": 6}')
    told.write_text("")
    assert f"export {published}: done already" in submit(tmp_path, str(recipe), "--publish", str(published))
    assert told.read_text() == ""
    submit(tmp_path, str(recipe), "--publish", str(published), "--prompt", "a cat", "--size", "128x128")
    assert "export.sbatch" in told.read_text()
    note.write_text('{"step": 5}')
    assert "is there already" in submit(tmp_path, str(recipe), "--publish", str(published))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "1024"], "--size 1024: expected HEIGHTxWIDTH in pixels"),
        (["--size", "0x64"], "--size 0x64: "),
        (["--size", "128x96"], "--size 128x96: sides of this model's pictures are multiples of 64 pixels"),
        (["--prompt", " "], "--prompt number 2: is empty"),
    ],
)
def test_pictures_that_cannot_be_made(
    inputs: Path, tmp_path: Path, told: Path, options: list[str], words: str
) -> None:
    recipe, published = stage(inputs, tmp_path), tmp_path / "published"
    message = submit(tmp_path, str(recipe), "--publish", str(published), "--prompt", "a cat", *options)
    assert words in message and told.read_text() == ""


def test_a_size_without_a_picture(inputs: Path, tmp_path: Path, told: Path) -> None:
    message = submit(tmp_path, str(stage(inputs, tmp_path)), "--publish", f"{tmp_path}/x", "--size", "64x64")
    assert message.startswith("--size needs --prompt")


# The longest sample of the 256 class takes some 300 tokens: two of them share a pack of 800, but not of 500.
@pytest.mark.parametrize(
    ("nodes", "limit", "words"),
    [
        ("1-4", 800, ""),  # 3 ranks get 2 or 3 samples each
        ("1-4", 500, "--nodes 1-4: on 3 nodes 8 samples cannot be cut into packs of at most 500 tokens, "),
        ("1-4", 500, "for each of 3 processes (these numbers of nodes do: 1-2, 4; or change data."),
        ("5-9", 500, "--nodes 5-9: on 5 nodes 8 samples cannot be cut"),
        ("5-9", 500, "for each of 5 processes; nor on 6-7, 9 (these numbers of nodes do: 1-2, 4, 8; or"),
        ("9-10", 800, "on 9 nodes 8 samples cannot be shared out among 9 processes; nor on 10 ("),
    ],
)
def test_each_number_of_nodes_of_a_range_must_do(
    inputs: Path, tmp_path: Path, told: Path, nodes: str, limit: int, words: str
) -> None:
    recipe = stage(inputs, tmp_path, data__max_tokens=limit, data__ratio={256: 1})
    message = submit(tmp_path, str(recipe), "--nodes", nodes)
    assert words in message and bool(told.read_text()) is (words == "")


@pytest.mark.parametrize("nodes", range(1, 9))
def test_numbers_of_nodes_are_refused_where_the_trainer_refuses_them(
    inputs: Path, tmp_path: Path, told: Path, nodes: int
) -> None:
    recipe = stage(inputs, tmp_path, data__max_tokens=500, data__ratio={256: 1})
    loaded = load_recipe(StageRecipe, recipe)
    text_tokenizer = load_text_tokenizer(str(inputs / "text"))
    add_sequence_tokens(text_tokenizer, loaded.model.p)
    template = sequence_tokens(text_tokenizer, loaded.model.p).template
    dataset = LatentDataset(str(inputs / "latents"))
    try:
        BatchPlan(loaded.data, dataset, loaded.model.p, template, nodes, SampleCost(1.0))
    except RecipeError:
        assert f"on {nodes} nodes" in submit(tmp_path, str(recipe), "--nodes", str(nodes))
    else:
        assert submit(tmp_path, str(recipe), "--nodes", str(nodes)).startswith("job 101")


def test_a_second_copy_of_the_weights_divides_the_ranks(inputs: Path, tmp_path: Path, told: Path) -> None:
    recipe = stage(inputs, tmp_path, zero__zero_hpz_partition_size=2, precision="bfloat16")
    message = submit(tmp_path, str(recipe), "--nodes", "2-4")
    assert "on 3 nodes zero.zero_hpz_partition_size: 2 does not divide 3 processes" in message


def test_a_dataset_without_a_class_of_the_recipe(inputs: Path, tmp_path: Path, told: Path) -> None:
    recipe = stage(inputs, tmp_path, data__ratio={512: 1})
    message = submit(tmp_path, str(recipe), "--nodes", "3")
    assert "data.ratio.512: the dataset has no samples of this class" in message


@pytest.mark.parametrize(
    ("gres", "kind"),
    [
        (["gpu:8"], "b200-180g"),
        (["gpu:a100:8(S:0-1)"], "a100-80g"),
        (["gpu:nvidia_h100_80gb_hbm3:8,shard:16"], "h100-80g"),
        (["gpu:gh200:8"], "b200-180g"),
        (["gpu:a100:8", "gpu:h200:8", "(null)"], "h200-141g"),
        (["gpu:a100:8", "gpu:mystery:8"], "b200-180g"),
        ([], "b200-180g"),
    ],
)
def test_the_kind_of_gpu_is_the_largest_that_the_nodes_may_have(gres: list[str], kind: str) -> None:
    nodes = [{"Gres": of_node} for of_node in gres]
    assert gpu_kind(Site(), nodes) == kind
    assert gpu_kind(Site(gpu_kind="l40s-48g"), nodes) == "l40s-48g"


def test_memory_is_looked_at_without_a_word_about_the_kind(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How, the tests of `check_memory` and of the plan show; it takes seconds."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(checks, "check_memory", lambda problems, work, recipe, *about: asked.append(about))
    write_commands(tmp_path / "bin", "gpu:a100:8")
    submit(tmp_path, str(stage(inputs, tmp_path)), "--nodes", "2-4", GPUS_PER_NODE="2")
    assert asked == [(4, "a100-80g")]


def test_a_kind_of_gpu_that_is_not_known(inputs: Path, tmp_path: Path, told: Path) -> None:
    message = submit(tmp_path, str(stage(inputs, tmp_path)), GPUS_PER_NODE="1", GPU_KIND="h100")
    assert "site.env:3: GPU_KIND=h100: expected one of a100-40g, " in message


def test_a_model_whose_size_nobody_knows_is_let_pass(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes from a stage of the chain whose recipe stands elsewhere."""
    model = {"p": 4, "init_from": str(tmp_path / "first" / "export")}
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(recipe_values(inputs, run=str(tmp_path / "second")) | {"model": model}))
    recipe = load_recipe(StageRecipe, path)
    work = Work(
        "train second", "train.sbatch", (), {}, JobFolder.of_run(recipe.run), Site(), source=(str(path),)
    )
    check_memory(problems := Problems(), work, recipe, 8, "h100-80g")
    said = " ".join(capsys.readouterr().out.split())
    assert not problems.lines
    assert said.startswith("train second: whether it fits into its GPUs is not looked at. model.init_from: ")


TOKENIZE_INPUTS = [
    "input.path.0",
    "input.path.1",
    "input.captions",
    "keep.rows",
    "tokenizer",
    "text_tokenizer.name",
]
FILTER_INPUTS = ["sources.0", "sources.1", "joins.0.files.0"]


@pytest.mark.parametrize(
    ("values", "keys"), [(tokenize_values, TOKENIZE_INPUTS), (filter_values, FILTER_INPUTS)]
)
def test_each_input_of_a_data_job_must_be_there_and_be_seen(
    tmp_path: Path, told: Path, values: Callable[[Path], dict[str, object]], keys: list[str]
) -> None:
    recipe, place = tmp_path / "recipe.yaml", tmp_path / "here"
    recipe.write_text(yaml.safe_dump(values(place)))
    message = submit(tmp_path, str(recipe))
    for key in keys:
        assert re.search(rf": {re.escape(key)}: {place}/\S+ does not exist", message), key
    for name in ("shards", "more/1.tar", "captions.json", "tokenizer", "text", "rows.parquet", "scores"):
        (place / name).mkdir(parents=True)
    for name in ("kept.parquet", "parts/a/b.parquet"):
        (place / name).mkdir(parents=True)
    message = submit(tmp_path, str(recipe), SHARED_FOLDERS=f"{ROOT}:{sys.prefix}")
    for key in [*keys, "its folder"]:
        assert re.search(rf": {re.escape(key)}: {place}\S+ is not in a folder that all nodes see", message), (
            key
        )
    assert "does not exist" not in message and told.read_text() == ""
    assert submit(tmp_path, str(recipe)).startswith("job 101")


@pytest.mark.parametrize(("device", "partition"), [("cuda", "gpu"), ("cpu", "cpu")])
def test_data_jobs_do_not_take_what_training_takes(
    inputs: Path, tmp_path: Path, device: str, partition: str
) -> None:
    """Whole nodes of GPUs, that is: an element takes a GPU of one, what computes on none goes elsewhere."""
    kinds = {"tokenize": tokenize_values(tmp_path) | {"compute": {"device": device}}}
    kinds["filter"] = filter_values(tmp_path)
    training = {"partition": "gpu", "sbatch_options": "--exclusive", "memory_per_node": "0"}
    site = Site(**training, data_partition="cpu", data_options="--mem=9G", gpus_per_node=8)
    for kind, values in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(values))
        for work in work_of(open_recipe(tmp_path / f"{kind}.yaml", ()), Asked(), SiteFile(site)):
            array = work.script == "tokenize.sbatch"
            assert work.options["partition"] == (partition if array else "cpu")
            assert work.options["gpus-per-node"] == ("1" if array and device == "cuda" else None)
            assert work.options["mem"] == "9G" and "exclusive" not in work.options
    (work,) = work_of(open_recipe(stage(inputs, tmp_path), ()), Asked(), SiteFile(site))
    assert work.options["output"] == f"{tmp_path.resolve()}/run/slurm/%j.log"
    assert {"exclusive": "", "mem": "0", "partition": "gpu"}.items() <= work.options.items()


def test_inputs_in_a_store_and_on_the_hub_are_not_looked_for(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the jobs' folder of a dataset in a store is made
    values = tokenize_values(Path("s3://bucket")) | {
        "tokenizer": str(tmp_path),
        "text_tokenizer": {"name": "Qwen/Qwen3-0.6B"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values).replace("s3:/", "s3://"))
    assert "job 102: finalize s3://bucket/latents" in submit(tmp_path, str(tmp_path / "recipe.yaml"))


AWAY = "#!/bin/sh\necho 'x: error: Unable to contact slurm controller' >&2\nexit 1\n"


def test_a_controller_that_is_away(inputs: Path, tmp_path: Path, told: Path) -> None:
    """Alone it is worth another try (75), beside a mistake it is not (78)."""
    (tmp_path / "bin" / "scontrol").write_text(AWAY)
    recipe, site = str(stage(inputs, tmp_path)), str(site_file(tmp_path))
    result = CliRunner().invoke(app, ["submit", recipe, "--site", site])
    assert isinstance(result.exception, ControllerAway) and result.exception.exit_code == 75
    message = submit(tmp_path, recipe, "--set", f"tokenizer={tmp_path}/none")
    assert (
        "none does not exist" in message
        and "Slurm: Slurm's controller does not answer (scontrol: " in message
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scancel", "words"),
    [
        ("#!/bin/sh\n", "The jobs before it were cancelled: 101"),
        ("#!/bin/sh\nexit 1\n", "could not be cancelled: when the controller answers, `scancel 101`"),
    ],
)
def test_half_a_chain_is_taken_back(
    inputs: Path, tmp_path: Path, told: Path, scancel: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The controller goes away between two jobs."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + AWAY.replace("#!/bin/sh", f"[ $(wc -l < {told}) = 1 ] && exit"))
    (tmp_path / "bin" / "scancel").write_text(scancel)
    words_ = ["submit", str(stage(inputs, tmp_path)), "--publish", f"{tmp_path}/published"]
    result = CliRunner().invoke(app, [*words_, "--site", str(site_file(tmp_path))])
    assert isinstance(result.exception, ControllerAway) and words in result.stdout


def test_a_job_whose_number_was_never_heard_is_found(inputs: Path, tmp_path: Path, told: Path) -> None:
    """sbatch got no answer, but the controller has taken the job."""
    job = f"JobId=55 JobState=PENDING UserId=me(1) Comment=bitdance {tmp_path.resolve()}/run/slurm"
    write_commands(tmp_path / "bin", jobs=job)
    message = submit(tmp_path, str(stage(inputs, tmp_path)))
    assert f"{tmp_path}/run: job 55 is pending on it" in message and told.read_text() == ""


def test_any_live_job_of_the_run_is_in_the_way(inputs: Path, tmp_path: Path, told: Path) -> None:
    """The latest, given to plain sbatch too, has ended; an earlier one lives."""
    for number in (55, 56):
        JobFolder.of_run(tmp_path / "run").note("start", number)
    jobs = "JobId=55 JobState=RUNNING UserId=me(1)\nJobId=56 JobState=FAILED UserId=me(1)"
    write_commands(tmp_path / "bin", jobs=jobs)
    message = submit(tmp_path, str(stage(inputs, tmp_path)))
    assert f"{tmp_path}/run: job 55 is running on it" in message and told.read_text() == ""
    assert "job 56" not in message


def test_keys_are_nobody_elses(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the shell are in no file; those that stand in the site file, in the script alone."""
    monkeypatch.setenv("WANDB_API_KEY", "of-the-shell")
    script = tmp_path / "run" / "slurm" / "train.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text("of an earlier version, for all to read")
    script.chmod(0o644)
    recipe, site = stage(inputs, tmp_path), site_file(tmp_path)
    site.write_text(site.read_text() + "export AWS_SECRET_ACCESS_KEY=of-the-site\n")
    assert CliRunner().invoke(app, ["submit", str(recipe), "--site", str(site)]).exit_code == 0
    written = {path: path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not [path for path, text in written.items() if "of-the-shell" in text]
    assert [path for path, text in written.items() if "of-the-site" in text] == [script]
    assert script.stat().st_mode & 0o777 == 0o600
    shown = CliRunner().invoke(app, ["submit", str(recipe), "--site", str(site), "--dry-run"]).stdout
    assert "of-the-site" not in shown and "\nexport AWS_SECRET_ACCESS_KEY=...\n" in shown
    assert "export MASTER_ADDR=${" in shown  # what the script itself says
