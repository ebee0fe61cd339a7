"""docs/data.md names every key of the recipes of data, with its default, and no other."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic_core import PydanticUndefined

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.metadata.rules import Rule
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.sections import sections_in

TEXT = Path("docs/data.md").read_text()
RECIPES = {"filter": FilterRecipe, "download": DownloadRecipe, "tokenize": TokenizeRecipe}


def keys_of(section, before=""):
    """Dotted key -> its default as the docs write it; `[]` stands behind a list of sections."""
    found = {}
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        is_list = "list[" in str(field.annotation)
        if len(inner) == 1:
            found |= keys_of(inner.pop(), f"{before}{name}{'[]' if is_list else ''}.")
        else:
            found[before + name] = default_of(field)
    return found


def default_of(field):
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default in (None, []):
        return "none"
    return default if isinstance(default, str) else json.dumps(default)


@pytest.mark.parametrize("job", RECIPES)
def test_every_key_of_a_recipe_is_in_the_docs_with_its_default(job):
    _, _, section = TEXT.partition(f"### Keys of `{job}`\n")
    table = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", section.partition("\n#")[0], re.MULTILINE)
    assert dict(table) == keys_of(RECIPES[job])


def test_every_key_of_a_rule_is_in_the_docs():
    _, _, section = TEXT.partition("### Keys of the rules\n")
    table = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", section.partition("\n#")[0], re.MULTILINE)
    told = {
        kind: set(re.findall(r"`(\w+)`", keys)) for kinds, keys in table for kind in kinds.split("`")[1::2]
    }
    wanted = {}
    for rule in get_args(get_args(Rule)[0]):
        for kind in get_args(rule.model_fields["rule"].annotation):
            wanted[kind] = {name.split(".")[0].removesuffix("[]") for name in keys_of(rule)} - {"rule"}
    assert told == wanted
