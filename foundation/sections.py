"""Sections: the typed parts of a recipe, and the checks that read several of their fields.

pydantic looks at what several fields say together only once each of them is right, so that such a mistake
would be told after the others have been mended. A `check` also runs where fields are wrong: on what is right
of the recipe, for as long as it reads nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
Problem = tuple[str, str]
CHECK_FAILED = "check_failed"  # pydantic's name for the kind of error


class FieldIsWrong(Exception):
    """A check has read a field that could not be used; it can say nothing."""


class check:
    """Marks a method of a `Section` as a check across its fields.

    The method yields (key, problem) for all that is wrong. The key is dotted and relative to the section (""
    is the section itself, "phases.0.steps" a field inside a list); the problem is reported at its line.
    """

    def __init__(self, run: Callable[[Any], Iterator[Problem]]):
        self.run = run


class Section(BaseModel):
    """Base of every part of a recipe: no unknown keys, no number that is infinite or NaN (no bound keeps
    those out), no change after it is built, all checks hold.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, ignored_types=(check,))

    @model_validator(mode="after")
    def _checks_hold(self) -> Self:
        failed = [
            InitErrorDetails(
                type=PydanticCustomError(CHECK_FAILED, "{problem}", {"problem": problem}),
                loc=location,
                input=None,
            )
            for location, problem in _own_failures(self)
        ]
        if failed:
            raise ValidationError.from_exception_data(type(self).__name__, failed)
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Asked only for what is not there: a field that `usable_part` has left out.
            if name in type(self).model_fields:
                raise FieldIsWrong(name)
            return super().__getattr__(name)


S = TypeVar("S", bound=Section)


def usable_part(section: type[S], values: Mapping[str, Any], wrong: Collection[Location]) -> S:
    """What is right of a section; to read another field of it raises `FieldIsWrong`.

    Args:
        section: its type.
        values: as the recipe has them.
        wrong: where pydantic has found fields wrong or missing, relative to the section.
    """
    fields = section.model_fields
    absent = [name for name in fields if name not in values]
    # What was misspelt was meant to be given: its default would say nothing.
    meant = (nearest_name(str(key), absent) for key in values if key not in fields)
    left_out = {name for name in meant if name}
    kept = {}
    for name, field in fields.items():
        below = [location[1:] for location in wrong if location[0] == name]
        try:
            if name in values:
                kept[name] = _usable_value(field.annotation, values[name], below)
            elif below:
                left_out.add(name)
        except (FieldIsWrong, ValidationError):
            left_out.add(name)
    part = section.model_construct(**kept)
    for name in left_out & vars(part).keys():
        del vars(part)[name]
    return part


def _usable_value(annotation: Any, value: Any, wrong: Collection[Location]) -> Any:
    """The value of a field, an item or a branch of a union, with what is wrong in its sections left out."""
    if () in wrong:
        raise FieldIsWrong
    sections = sections_in(annotation)
    if isinstance(value, dict) and len(sections) == 1:
        return usable_part(sections.pop(), value, wrong)
    if isinstance(value, dict) and (branch := _branch(annotation, value)):
        # pydantic puts the tag of the branch between the union's place and the field's.
        return usable_part(branch, value, [location[1:] for location in wrong])
    if isinstance(value, list) and get_origin(annotation) is list and sections:
        (item,) = get_args(annotation)
        below = [[place[1:] for place in wrong if place[0] == index] for index in range(len(value))]
        return [_usable_value(item, one, places) for one, places in zip(value, below, strict=True)]
    if wrong:
        raise FieldIsWrong
    return TypeAdapter(annotation).validate_python(value)


def _branch(annotation: Any, value: Mapping[str, Any]) -> type[Section] | None:
    """The section that a tagged union, `Annotated[A | B, Field(discriminator=...)]`, means by this value."""
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, FieldInfo) and isinstance(mark.discriminator, str):
            for section in sections_in(annotation):
                tags = get_args(section.model_fields[mark.discriminator].annotation)
                if value.get(mark.discriminator) in tags:
                    return section
    return None


def failed_checks(value: Any, at: Location = ()) -> Iterator[tuple[Location, str]]:
    """(location, problem) of every check that fails in a section and all that is in it."""
    if isinstance(value, Section):
        for location, problem in _own_failures(value):
            yield (*at, *location), problem
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from failed_checks(inner, (*at, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from failed_checks(inner, (*at, index))


def _own_failures(section: Section) -> Iterator[tuple[Location, str]]:
    checks = (each for base in reversed(type(section).__mro__) for each in vars(base).values())
    for each in checks:
        if isinstance(each, check):
            try:
                for key, problem in each.run(section):
                    yield parse_key(key), problem
            except FieldIsWrong:
                continue  # what is wrong with the field is told already


def parse_key(dotted: str) -> Location:
    """Where a dotted key leads: "phases.0.steps" is ("phases", 0, "steps"), and "" is ()."""
    parts = dotted.split(".") if dotted else []
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def nearest_name(found: str, valid: Sequence[str]) -> str | None:
    """The valid name that somebody who wrote `found` has probably meant, if there is one."""
    near = difflib.get_close_matches(found, valid, n=1)
    return near[0] if near else None


def sections_in(annotation: Any) -> set[type[Section]]:
    """All section types that appear in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {section for argument in getattr(annotation, "__args__", ()) for section in sections_in(argument)}
