"""Strict, typed recipes: YAML in, a frozen pydantic model out, all mistakes in one message.

A recipe is a complete file for one job. An unknown key is an error that names the nearest valid one; a wrong
type and an impossible value are reported together with it, so that a recipe is mended in one go.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from foundation.errors import Problems, RecipeError

Location = tuple[str | int, ...]


class Section(BaseModel):
    """Base of every part of a recipe: no unknown keys, no change after it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True)


R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read the recipe at ``path`` as a ``model``.

    Args:
        model: the recipe's type.
        path: a YAML file.
        overrides: ``a.b=c`` assignments from the command line; c is YAML ("1e-4", "[1, 2]", "null").

    Raises:
        RecipeError: the file is missing or is no YAML, or anything in it is wrong; all of it in one message.
    """
    document = _RecipeDocument(Path(path))
    for override in overrides:
        document.override(override)
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        problems = Problems()
        for detail in error.errors():
            problems.add(document.where(detail["loc"]), *_explain(model, detail))
        problems.raise_if_any(RecipeError, f"The recipe {path} cannot be used")
        raise AssertionError("a validation error without details") from error


def resolved_yaml(recipe: Section) -> str:
    """The recipe with all defaults filled in, as YAML that loads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Section, exclude: set[str] | frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) of the recipe's canonical JSON without the top-level keys ``exclude``."""
    values = recipe.model_dump(mode="json", exclude=set(exclude))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two recipes (as plain dicts) differ, as ``key: value -> other value`` lines."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(one) + [key for key in other if key not in one]
        return [
            line
            for key in keys
            for line in differing_keys(
                one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        ]
    return [] if one == other else [f"{prefix}: {one!r} -> {other!r}"]


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, as everybody who writes a learning rate means it, and no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class _RecipeDocument:
    """A YAML file's values, and the line that each of them stands on."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[Location, int] = {}
        self.overridden: dict[Location, str] = {}
        problems = Problems()
        node = _compose(path)
        if node is not None and not isinstance(node, yaml.MappingNode):
            problems.add(f"{path}:1", "the file is not a mapping", "write `key: value` lines")
        self.values: dict[str, Any] = {}
        try:
            if not problems.lines and node is not None:
                self._note_lines(node, (), problems)
                self.values = _Loader("").construct_document(node)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            # Tags, keys and references that YAML allows and a recipe has no use for.
            problems.add(str(path), f"not a recipe's YAML: {error}", "write plain keys, numbers and text")
        problems.raise_if_any(RecipeError, f"The recipe {path} cannot be used")

    def _note_lines(self, node: yaml.Node | None, location: Location, problems: Problems) -> None:
        if isinstance(node, yaml.MappingNode):
            _Loader("").flatten_mapping(node)  # `<<: *base` stands for the keys of base
            for key, value in node.value:
                name = _Loader("").construct_object(key)
                inner = (*location, name)
                line = key.start_mark.line + 1
                if inner in self.lines:
                    problems.add(
                        f"{self.path}:{line}",
                        f"{_dotted(inner)} is given twice",
                        f"first on line {self.lines[inner]}",
                    )
                self.lines[inner] = line
                self._note_lines(value, inner, problems)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.lines[(*location, index)] = value.start_mark.line + 1
                self._note_lines(value, (*location, index), problems)

    def override(self, assignment: str) -> None:
        """Apply one ``a.b=c`` from the command line."""
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"--set {assignment}: expected key=value, for example --set optimizer.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"--set {assignment}: the value is not YAML ({error})") from error
        *parents, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
        target: Any = self.values
        for part in parents:
            if isinstance(target, dict):
                target = target.setdefault(part, {})
            elif isinstance(target, list) and isinstance(part, int) and part < len(target):
                target = target[part]
            else:
                raise RecipeError(f"--set {assignment}: {part!r} leads nowhere in {self.path}")
        try:
            target[last] = value
        except (TypeError, IndexError) as error:
            raise RecipeError(f"--set {assignment}: {dotted} leads nowhere in {self.path}") from error
        self.overridden[(*parents, last)] = assignment

    def where(self, location: Location) -> str:
        """File and line of the innermost part of ``location`` that the file names, with the dotted key."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.overridden:
                return f"--set {self.overridden[location[:end]]}"
            if location[:end] in self.lines:
                return f"{self.path}:{self.lines[location[:end]]}: {_dotted(location)}"
        return f"{self.path}: {_dotted(location)}" if location else str(self.path)


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; recipes there: {', '.join(near)}" if near else ""
        raise RecipeError(f"The recipe {path} does not exist{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}") from error
    try:
        return yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not YAML: {error}") from error


def _explain(model: type[BaseModel], detail: ErrorDetails) -> tuple[str, str]:
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
        case _:
            message = str(detail["msg"])
            return f"{message[0].lower()}{message[1:]}, found {found!r}", ""


def _nearest(found: str, valid: list[str], what: str) -> str:
    near = difflib.get_close_matches(found, valid, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"valid {what}: {', '.join(sorted(valid))}"


def _fields_at(model: Any, location: Sequence[str | int]) -> list[str]:
    """Names of the valid keys of the section at ``location`` below ``model``."""
    sections = {model}
    for part in location:
        inner: set[Any] = set()
        for section in sections:
            field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
            # A part that is no field is a list's index, a dict's key or a union's branch: same candidates.
            inner |= _sections_in(field.annotation) if field else {section}
        sections = inner or sections
    return sorted({alias.alias or name for s in sections for name, alias in s.model_fields.items()})


def _sections_in(annotation: Any) -> set[Any]:
    """All section types that appear in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {section for argument in getattr(annotation, "__args__", ()) for section in _sections_in(argument)}


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)
