"""Building blocks of config sections: value types with their ranges, and the options of every section. No torch.

A section is a frozen dataclass whose fields have a type, perhaps a default, and a docstring below them, which `--help`
and error messages show:

    @dataclass(frozen=True, kw_only=True, config=SECTION)
    class EvalConfig:
        every: Annotated[Steps, Field(json_schema_extra=MUTABLE)] = 500
        \"\"\"Steps between evaluations.\"\"\"
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, JsonValue, Strict
from pydantic.fields import FieldInfo

Text = Annotated[str, Strict(), Field(min_length=1, max_length=4096)]
Size = Annotated[int, Strict(), Field(ge=1, le=2**20)]
"""A number of sequences, tokens or ranks."""
Steps = Annotated[int, Strict(), Field(ge=1, le=10**9)]
"""A number of optimizer updates."""
Rate = Annotated[float, Strict(), Field(ge=0, le=10)]
"""A learning rate or a weight decay."""
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1)]

SECTION: Final = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Options of every section: unknown keys are errors, and the docstring below a field describes it."""

MUTABLE: Final[dict[str, JsonValue]] = {"mutable_on_resume": True}
"""Marks a field, as `Field(json_schema_extra=MUTABLE)`, whose value may change when a run is resumed.

A field without it is immutable. Marking a section marks all keys in it.
"""


def fields_of(section: type) -> dict[str, FieldInfo]:
    """A section's fields, in order of definition."""
    fields: dict[str, FieldInfo] = section.__pydantic_fields__  # type: ignore[attr-defined]
    return fields


def union_of(members: Mapping[str, type], discriminator: str) -> Any:
    """The type of a section that is one of `members`, told apart by the value of its key `discriminator`."""
    first, *others = members.values()
    union = functools.reduce(operator.or_, others, first)
    return Annotated[union, Field(discriminator=discriminator)] if others else first


def section_members(field: FieldInfo) -> tuple[type, ...]:
    """The sections that a field may hold: none for a plain value, several for a union told apart by a discriminator."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = tuple(map(_without_annotated, typing.get_args(annotation)))
    else:
        members = (annotation,)
    return tuple(member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member))


def default_member(field: FieldInfo) -> type:
    """The section that a field holds where no discriminator is given: its default's type, else the first member."""
    members = section_members(field)
    return next((member for member in members if member is field.default_factory), members[0])


def member_tag(member: type, discriminator: str) -> str:
    """The value of the discriminator that selects a member of a union."""
    (tag,) = typing.get_args(fields_of(member)[discriminator].annotation)
    return str(tag)


def _without_annotated(hint: Any) -> Any:
    """The type inside `Annotated`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
