"""A recipe's YAML file: its values, and the line that each of them stands on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import Problems, RecipeError
from foundation.sections import Location, parse_key


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


class RecipeDocument:
    """A YAML file's values with the command line's changes.

    Args:
        path: the file.
        overrides: ``a.b=c`` assignments; c is YAML.

    Attributes:
        values: what the file and the overrides say.
        problems: (line, where, problem, fix) of keys given twice and (line 0) of overrides without a place.

    Raises:
        RecipeError: there is no file, or no YAML, or no mapping in it.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()):
        self.path = path
        self.values: dict[str, Any] = {}
        self.problems: list[tuple[int, str, str, str]] = []
        self._lines: dict[Location, int] = {}
        self._overridden: dict[Location, str] = {}
        self._read()
        for override in overrides:
            self._override(override)

    def _read(self) -> None:
        problems = Problems()
        node = _compose(self.path)
        if node is not None and not isinstance(node, yaml.MappingNode):
            problems.add(f"{self.path}:1", "the file is not a mapping", "write `key: value` lines")
        elif node is not None:
            try:
                self._note_lines(node, ())
                self.values = _Loader("").construct_document(node)
            except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
                # Tags, keys and references that YAML allows and a recipe has no use for.
                where, words = _explain(self.path, error)
                problems.add(where, f"not a recipe's YAML: {words}", "write plain keys, numbers and text")
        problems.raise_if_any(RecipeError, f"The recipe {self.path} cannot be used")

    def _note_lines(self, node: yaml.Node | None, location: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            _Loader("").flatten_mapping(node)  # `<<: *base` stands for the keys of base
            for key, value in node.value:
                name = _Loader("").construct_object(key)
                inner = (*location, name)
                line = key.start_mark.line + 1
                if inner in self._lines:
                    problem, fix = f"{_dotted(inner)} is given twice", f"first on line {self._lines[inner]}"
                    self.problems.append((line, f"{self.path}:{line}", problem, fix))
                self._lines[inner] = line
                self._note_lines(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._lines[(*location, index)] = value.start_mark.line + 1
                self._note_lines(value, (*location, index))

    def _override(self, assignment: str) -> None:
        """Apply one ``a.b=c`` from the command line."""
        where = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            problem = "expected key=value"
            self.problems.append((0, where, problem, "for example --set optimizer.lr=1e-4"))
            return
        try:
            value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
        except (yaml.YAMLError, ValueError) as error:
            words = getattr(error, "problem", None) or str(error)
            self.problems.append((0, where, f"the value is not YAML: {words}", "put it in quotes"))
            return
        location = parse_key(dotted)
        *parents, last = location
        target: Any = self.values
        try:
            for part in parents:
                target = target.setdefault(part, {}) if isinstance(target, dict) else target[part]
            target[last] = value
        except (TypeError, IndexError):
            self.problems.append((0, where, f"{dotted} leads nowhere in {self.path}", "see its keys"))
            return
        self._lines = {place: n for place, n in self._lines.items() if place[: len(location)] != location}
        self._overridden[location] = assignment

    def where(self, location: Location, makers: Sequence[str] = ()) -> tuple[int, str]:
        """Line and name of the innermost part of ``location`` that the file has, with the dotted key.

        Parts that the file does not have on the way, such as the tag of a union's branch, are passed over.
        Where a mistake is in the file only because of overrides, its ``makers``, those are named instead.
        The line is 0 where there is none.
        """
        place: Location = ()
        rest = location
        for index, part in enumerate(location):
            if (*place, part) in self._lines or self._sets((*place, part)):
                place, rest = (*place, part), location[index + 1 :]
        name = _dotted((*place, *rest))
        if not place:
            return 0, f"{self.path}: {name}" if name else str(self.path)
        if place in self._overridden:
            return 0, f"--set {self._overridden[place]}" + (f": {name}" if rest else "")
        if makers:
            return 0, " ".join(f"--set {override}" for override in makers) + f": {name}"
        if place in self._lines:
            return self._lines[place], f"{self.path}:{self._lines[place]}: {name}"
        below = next(text for at, text in self._overridden.items() if at[: len(place)] == place)
        return 0, f"--set {below}: {name}"

    def _sets(self, location: Location) -> bool:
        return any(place[: len(location)] == location for place in self._overridden)


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
        where, words = _explain(path, error)
        raise RecipeError(f"{where}: not YAML: {words}") from error


def _explain(path: Path, error: Exception) -> tuple[str, str]:
    """Where a file is not as it should be, and why, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(path), str(error).partition("\n")[0]
    words = str(error.problem)
    if error.context:
        begun = f" of line {error.context_mark.line + 1}" if error.context_mark else ""
        words += f" {error.context}{begun}"
    mark = error.problem_mark or error.context_mark
    return (f"{path}:{mark.line + 1}" if mark else str(path)), words


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)
