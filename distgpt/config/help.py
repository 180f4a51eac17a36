"""Describes every config key, for `--help`, error messages and the documentation, from the dataclasses themselves."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from distgpt.config.fields import default_member, fields_of, member_tag, section_members
from distgpt.config.schema import Config
from distgpt.config.yaml_reader import Key, join_key
from distgpt.errors import ArgumentParser, path_argument

KINDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """The description of one key."""

    kind: str
    """The type, in words."""
    allowed: str
    """The allowed values in words; empty if pydantic's own message describes them well."""
    default: str
    """As written in YAML, or `required`; empty for a section with defaults."""
    meaning: str
    choices: tuple[str, ...] = ()
    """The allowed values, if they are a few names."""
    discriminator: str = ""
    """For a section that is a union: the key in it whose value selects the member."""
    only_with: tuple[Key, str] | None = None
    """For a key of one member of a union: the discriminator's key and the value that selects this member."""


def walk_keys(section: type = Config) -> Iterator[tuple[Key, KeyInfo]]:
    """Every key with its description in order of definition, sections before their keys.

    For a section that is a union, its discriminator comes first, once. The keys of each member follow, with `only_with`
    set; a key that several members have is yielded for each.
    """
    yield from _walk(section, (), None)


def keys_in_use(values: Mapping[str, Any], section: type = Config) -> dict[Key, KeyInfo]:
    """The keys that a config with these nested values can have, given the members of unions that it selects."""

    def selected(info: KeyInfo) -> bool:
        return info.only_with is None or _value_at(values, info.only_with[0]) == info.only_with[1]

    return {key: info for key, info in walk_keys(section) if selected(info)}


def help_text(section: type = Config) -> str:
    """Every key with its type, default and meaning, for --help."""
    lines = ["config keys (in the YAML file, or as key=value on the command line; dots lead into sections):"]
    member: tuple[Key, str] | None = None
    for key, info in walk_keys(section):
        if info.only_with is not None and info.only_with != member:
            lines.append(f"  with {join_key(info.only_with[0])} = {info.only_with[1]}:")
        member = info.only_with
        indent = "  " if member is None else "    "
        default = f", default {info.default}" if info.default not in ("", "required") else ""
        required = ", required" if info.default == "required" else ""
        lines.append(f"{indent}{join_key(key)} ({info.kind}{required}{default})")
        lines.append(f"{indent}    {info.meaning}")
    return "\n".join(lines)


def config_parser(prog: str, description: str) -> ArgumentParser:
    """The command line that all commands with a config share: CONFIG [key=value ...]."""
    parser = ArgumentParser(
        prog=prog, description=description, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=path_argument, metavar="CONFIG", help="YAML file, such as configs/GPT-tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key of the file")
    return parser


def _walk(section: type, prefix: Key, only_with: tuple[Key, str] | None) -> Iterator[tuple[Key, KeyInfo]]:
    """`walk_keys` of a section at `prefix`; `only_with` is set inside a member of a union."""
    for name, field in fields_of(section).items():
        members, key = section_members(field), (*prefix, name)
        info = dataclasses.replace(_describe(field), only_with=only_with)
        if len(members) <= 1:
            yield key, info
            for member in members:
                yield from _walk(member, key, only_with)
            continue
        yield key, info
        yield (*key, info.discriminator), _describe_discriminator(field, info.discriminator)
        for member in members:
            selected = ((*key, info.discriminator), member_tag(member, info.discriminator))
            for member_key, member_info in _walk(member, key, selected):
                if member_key != selected[0]:
                    yield member_key, member_info


def _describe(field: FieldInfo) -> KeyInfo:
    """A field in words."""
    hint = _strip(field.annotation)
    choices = tuple(map(str, typing.get_args(hint))) if typing.get_origin(hint) is Literal else ()
    if section_members(field):
        kind, allowed = "section", "a section of indented keys"
    elif choices:
        kind = allowed = _join_or(choices)
    elif typing.get_origin(hint) is tuple:
        kind, allowed = "two integers", "two integers in brackets, such as [10, 12]"
    else:
        kind, allowed = KINDS[hint], "true or false" if hint is bool else ""
    if isinstance(field.json_schema_extra, dict) and "allowed" in field.json_schema_extra:
        allowed = str(field.json_schema_extra["allowed"])
    default = "" if kind == "section" else _yaml_text(field.default)
    if field.is_required():
        default = "required"
    discriminator = field.discriminator if isinstance(field.discriminator, str) else ""
    return KeyInfo(kind, allowed, default, " ".join((field.description or "").split()), choices, discriminator)


def _describe_discriminator(field: FieldInfo, name: str) -> KeyInfo:
    """The key that selects a member of a union, as one key of the section."""
    choices = tuple(member_tag(member, name) for member in section_members(field))
    default = member_tag(default_member(field), name)
    info = _describe(fields_of(default_member(field))[name])
    return dataclasses.replace(
        info, kind=_join_or(choices), allowed=_join_or(choices), choices=choices, default=default
    )


def _strip(hint: Any) -> Any:
    """A type hint without `Annotated` and without `| None`."""
    if typing.get_origin(hint) is Annotated:
        return _strip(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _strip(next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    return hint


def _join_or(names: tuple[str, ...]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _yaml_text(value: Any) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _value_at(values: Mapping[str, Any], key: Key) -> Any:
    """The value of a nested key; None if there is none."""
    value: Any = values
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value
