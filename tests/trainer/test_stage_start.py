"""What is checked before a stage starts: latents, text tokenizer and model belong together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_stage import CAPTIONS, make_inputs, write_recipe
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipeline.latents import LatentDataset
from data_pipeline.tokenize.captions import text_tokenizer_hash
from foundation.errors import DataError, RecipeError, UserError
from foundation.recipes import load_recipe
from models.text_tokens import load_text_tokenizer, train_text_tokenizer
from models.weights import ModelSource, write_source
from trainer import stage_start
from trainer.recipe import StageRecipe
from trainer.run_folder import EXPORT_MANIFEST
from trainer.stage_start import check_dataset, open_start, refuse_kernels


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def check(inputs: Path, **changes: object) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(inputs, **changes))
    check_dataset(recipe, open_start(recipe), LatentDataset(recipe.data.latents))


def test_what_belongs_together_passes(inputs: Path) -> None:
    check(inputs)


def test_another_text_tokenizer_is_refused_before_the_start(inputs: Path) -> None:
    """Of the same size, so that no count or shape tells them apart."""
    other = train_text_tokenizer([caption[::-1] for caption in CAPTIONS], 300)
    other.save_pretrained(inputs / "other-text")
    with pytest.raises(DataError, match="counted with the text tokenizer text "):
        check(inputs, model__random__text_tokenizer=str(inputs / "other-text"))


@pytest.fixture(scope="module")
def export(inputs: Path) -> Path:
    """What a stage would hand on, with as much of its record as the next one's start reads."""
    recipe = load_recipe(StageRecipe, write_recipe(inputs))
    source = replace(open_start(recipe), tokenizer_folder=Path(recipe.tokenizer))
    write_source(source, inputs / "export")
    record = {"vocabulary_sha256": text_tokenizer_hash(source.text_tokenizer), "step": 6, "lineage": {}}
    (inputs / "export" / EXPORT_MANIFEST).write_text(json.dumps(record))
    return inputs / "export"


def start_from(export: Path, **changes: object) -> dict[str, object]:
    return {"model": {"p": 4, "init_from": str(export), **changes}}


def test_the_export_of_the_stage_before_passes_grown_or_not(inputs: Path, export: Path) -> None:
    check(inputs, **start_from(export))
    check(inputs, **start_from(export, p=8, grow_from=4))


@pytest.fixture(scope="module")
def language_model(inputs: Path) -> Path:
    """A tiny Qwen3 as transformers writes it, its embedding padded as Qwen's are."""
    text_tokenizer = load_text_tokenizer(inputs / "text")
    config = Qwen3Config(
        vocab_size=len(text_tokenizer) + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=5e5,
        tie_word_embeddings=False,
    )
    folder = inputs / "qwen"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


def starts_from(inputs: Path, language_model: Path) -> ModelSource:
    head = {"width": 128, "depth": 1, "adaln": 1}
    model = {"p": 4, "pretrained": str(language_model), "head": head}
    return open_start(load_recipe(StageRecipe, write_recipe(inputs, model=model)))


def test_a_language_model_brings_its_own_weights(inputs: Path, language_model: Path) -> None:
    source = starts_from(inputs, language_model)
    found, known = dict(source.tensors()), len(load_text_tokenizer(inputs / "text"))
    assert found.keys() == source.specs.keys()
    assert all(found[name].shape == spec.shape for name, spec in source.specs.items())
    for name, own in load_file(language_model / "model.safetensors").items():
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(found[f"llm.{name}"][: known if grown else None], own[: known if grown else None])
    assert source.config.llm.vocab_size == len(source.text_tokenizer) > known + 5


@pytest.mark.parametrize("form", ["of transformers 4", "of transformers 5"])
def test_a_language_model_keeps_its_rotary_base(
    inputs: Path, language_model: Path, tmp_path: Path, form: str
) -> None:
    shutil.copytree(language_model, tmp_path / "qwen")
    path = tmp_path / "qwen" / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope")}
    rope = {"rope_theta": 5e5}
    values |= rope if form == "of transformers 4" else {"rope_parameters": rope | {"rope_type": "default"}}
    path.write_text(json.dumps(values))
    config = starts_from(inputs, tmp_path / "qwen").config.llm
    backbone = Qwen3ForCausalLM(config).model
    assert torch.allclose(backbone.rotary_emb.inv_freq[1], torch.tensor(5e5 ** (-2 / 16)))


def test_wrong_values_of_a_language_model_are_told(
    inputs: Path, language_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(language_model, tmp_path / "qwen")
    path = tmp_path / "qwen" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": None, "head_dim": 0}))
    with pytest.raises(RecipeError) as caught:
        starts_from(inputs, tmp_path / "qwen")
    assert "num_attention_heads is None" in str(caught.value) and "head_dim is 0" in str(caught.value)


def test_latents_of_another_vocabulary_than_the_export_are_refused(
    inputs: Path, export: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "latents", tmp_path / "latents")
    path = tmp_path / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = train_text_tokenizer([caption[::-1] for caption in CAPTIONS], 300)
    manifest["text_tokenizer"] |= {"name": "other", "sha256": text_tokenizer_hash(other)}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="counted with the text tokenizer other"):
        check(inputs, **start_from(export), data__latents=str(tmp_path / "latents"))


@pytest.mark.parametrize(
    ("record", "words", "error"),
    [
        (
            '{"vocabulary_sha256": "0", "step": 6, "lineage": {}}',
            "not the one that its model was trained with",
            RecipeError,
        ),
        ("{", r"export/export.json is damaged .*line 1, column 2\): remove the folder", DataError),
        ('{"vocabulary_sha256": "0"}', r"export.json is damaged \(without step, lineage\)", DataError),
    ],
)
def test_an_export_whose_record_does_not_fit_is_refused(
    inputs: Path, export: Path, tmp_path: Path, record: str, words: str, error: type[UserError]
) -> None:
    shutil.copytree(export, tmp_path / "export")
    (tmp_path / "export" / EXPORT_MANIFEST).write_text(record)
    with pytest.raises(error, match=words):
        check(inputs, **start_from(tmp_path / "export"))


@pytest.mark.parametrize(
    ("size", "context", "words"),
    [
        ([128, 100], 40960, "expected multiples of 64 pixels"),
        ([8192, 8192], 40960, "a grid of 512x512 tokens is too large: a side has at most 256 tokens"),
        ([512, 512], 1024, "a picture of 1026 exceed the context of 1024 tokens"),
    ],
)
def test_pictures_of_a_size_that_the_model_cannot_have_are_refused(
    inputs: Path, size: list[int], context: int, words: str
) -> None:
    samples = {"every_steps": 1, "prompts": ["a rocket"], "size": size}
    with pytest.raises(RecipeError, match=words) as error:
        check(inputs, samples=samples, model__random__backbone__max_position_embeddings=context)
    assert f"samples.size is {size}" in str(error.value)


@pytest.mark.parametrize(
    ("wanted", "missing", "reason"),
    [
        ("auto", None, None),
        ("auto", "no GPU", "no GPU"),
        ("never", None, "fused_kernels: never"),
        ("required", None, None),
    ],
)
def test_fused_kernels_are_taken_where_they_can_be_had(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, missing: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(stage_start, "why_not_fused", lambda device_type: missing)
    recipe = load_recipe(StageRecipe, write_recipe(inputs, fused_kernels=wanted))
    assert refuse_kernels(recipe, "cuda") == reason


def test_fused_kernels_that_are_required_are_not_replaced_in_silence(inputs: Path) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(inputs, fused_kernels="required"))
    with pytest.raises(RecipeError, match="cannot be had here: no GPU"):
        refuse_kernels(recipe, "cpu")
