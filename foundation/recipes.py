"""Strict, typed recipes: YAML in, a frozen pydantic model out, all mistakes in one message.

A recipe is a complete file for one job. An unknown key is an error that names the nearest valid one; a wrong
type, an impossible value and fields that contradict each other are reported together with it, each with its
line, so that a recipe is mended in one go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from foundation.errors import Problems, RecipeError
from foundation.recipe_document import RecipeDocument
from foundation.sections import (
    CHECK_FAILED,
    Location,
    Section,
    failed_checks,
    nearest_name,
    sections_in,
    usable_part,
)

R = TypeVar("R", bound=Section)
Mistake = tuple[Location, tuple[str, str]]  # where; the problem and how to mend it
VALUE_SHOWN = 100  # characters


def load_recipe(model: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read the recipe at ``path`` as a ``model``.

    Args:
        model: the recipe's type.
        path: a YAML file.
        overrides: ``a.b=c`` assignments from the command line; c is YAML ("1e-4", "[1, 2]", "null").

    Raises:
        RecipeError: the file is missing or is no YAML, or anything in it is wrong; all of it in one message.
    """
    document = RecipeDocument(Path(path), overrides)
    found = document.problems
    mistakes = _mistakes(model, document.values)
    makers = _makers(model, Path(path), overrides, mistakes) if mistakes else {}
    found += [(*document.where(place, makers[place, words]), *words) for place, words in mistakes]
    problems = Problems()
    for _, *problem in sorted(dict.fromkeys(found), key=lambda line: line[0]):  # as they stand in the file
        problems.add(*problem)
    problems.raise_if_any(RecipeError, f"The recipe {path} cannot be used")
    return model.model_validate(document.values)


def _mistakes(model: type[Section], values: dict[str, Any]) -> list[Mistake]:
    """What pydantic finds wrong, and the failed checks that it does not come to."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
    else:
        return []
    wrong = [detail["loc"] for detail in details if detail["type"] != CHECK_FAILED]
    return [(detail["loc"], _explain(model, detail)) for detail in details] + [
        (location, (problem, "")) for location, problem in failed_checks(usable_part(model, values, wrong))
    ]


def _makers(
    model: type[Section], path: Path, overrides: Sequence[str], mistakes: Sequence[Mistake]
) -> dict[Mistake, list[str]]:
    """Of each mistake the overrides without which it would not be there, wherever it shows."""
    makers: dict[Mistake, list[str]] = {mistake: [] for mistake in mistakes}
    for place, override in enumerate(overrides):
        others = RecipeDocument(path, [*overrides[:place], *overrides[place + 1 :]])
        for mistake in makers.keys() - set(_mistakes(model, others.values)):
            makers[mistake].append(override)
    return makers


def resolved_yaml(recipe: Section) -> str:
    """The recipe with all defaults filled in, as YAML that loads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Section, exclude: set[str] | frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) of the recipe's canonical JSON without the top-level keys ``exclude``."""
    values = recipe.model_dump(mode="json", exclude=set(exclude))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two recipes (as plain dicts) differ, as ``key: value -> other value`` lines."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(one) + [key for key in other if key not in one]
        return [
            line
            for key in keys
            for line in differing_keys(
                one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        ]
    return [] if one == other else [f"{prefix}: {_brief(one)} -> {_brief(other)}"]


def _brief(value: Any) -> str:
    """A value in one short piece, in YAML's words; of a section its keys."""
    section = isinstance(value, dict)
    text = f"{{{', '.join(map(str, value))}}}" if section else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE_SHOWN else text[:VALUE_SHOWN] + " ..."


def _explain(model: type[Section], detail: ErrorDetails) -> tuple[str, str]:
    """(problem, fix) of one pydantic error, in words for a person."""
    found = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            *parents, key = detail["loc"]
            return f"unknown key {key!r}", _nearest(str(key), _fields_at(model, parents), "keys")
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            name, tag = str(context["discriminator"]).strip("'"), str(context["tag"])
            tags = re.findall("'([^']+)'", context["expected_tags"])
            return f"unknown {name} {tag!r}", _nearest(tag, tags, name + "s")
        case "missing":
            return "is missing", "add it"
        case "value_error" | "assertion_error":
            return str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, "), ""
        case kind if kind == CHECK_FAILED:
            return str(detail["msg"]), ""
        case "tuple_type":
            values = _values_at(model, detail["loc"])
            return f"must be a list of {values} values, found {found!r}", ""
        case _:
            message = str(detail["msg"]).replace("Tuple", "List")
            return f"{message[0].lower()}{message[1:]}, found {found!r}", ""


def _nearest(found: str, valid: list[str], what: str) -> str:
    near = nearest_name(found, valid)
    return f"did you mean {near!r}?" if near else f"valid {what}: {', '.join(sorted(valid))}"


def _fields_at(model: type[Section], location: Sequence[str | int]) -> list[str]:
    """Names of the valid keys of the section at ``location`` below ``model``."""
    sections = _sections_at(model, location)
    return sorted({alias.alias or name for s in sections for name, alias in s.model_fields.items()})


def _values_at(model: type[Section], location: Location) -> int:
    """How many values the list of a fixed length has that stands at ``location``."""
    last = max(place for place, part in enumerate(location) if isinstance(part, str))
    annotations = [
        section.model_fields[str(location[last])].annotation
        for section in _sections_at(model, location[:last])
        if location[last] in section.model_fields
    ]
    while annotations:
        annotation = annotations.pop()
        if get_origin(annotation) is tuple:
            return len(get_args(annotation))
        annotations += get_args(annotation)
    raise AssertionError(f"no tuple at {location}")


def _sections_at(model: type[Section], location: Sequence[str | int]) -> set[type[Section]]:
    """The sections that may stand at ``location`` below ``model``."""
    sections = {model}
    for part in location:
        inner: set[type[Section]] = set()
        for section in sections:
            field = section.model_fields.get(part) if isinstance(part, str) else None
            # A part that is no field is a list's index, a dict's key or a union's branch: same candidates.
            inner |= sections_in(field.annotation) if field else {section}
        sections = inner or sections
    return sections
