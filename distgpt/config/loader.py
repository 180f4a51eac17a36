"""Loads a config from YAML and overrides, reporting all its problems at once, and writes it back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from distgpt.config.fields import default_member, fields_of, member_tag, section_members
from distgpt.config.help import KeyInfo, keys_in_use, walk_keys
from distgpt.config.schema import RENAMED_KEYS, Config, cross_field_errors
from distgpt.config.yaml_reader import (
    CONSTANTS,
    MAX_PROBLEMS,
    NUMBER,
    YAML_1_1_BOOLEANS,
    Key,
    Source,
    join_key,
    read_source,
)
from distgpt.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), config_type: type[Config] = Config) -> Config:
    """Read a YAML config, apply `key=value` overrides and check everything that needs neither data nor a device.

    `config_type` is the schema. Raises ConfigError with one line per problem.
    """
    source = read_source(path, overrides, RENAMED_KEYS)
    config = _validate(source, str(path), config_type)
    if source.problems:
        lines = [line for _, line in source.problems]
        if source.suppressed:
            lines.append(f"{path}: and {source.suppressed:,} more problems, not shown; fix these first")
        raise ConfigError("\n".join(lines), on_all_ranks=True)
    assert config is not None
    return config


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """A config that was saved as a dict. Keys added since have their defaults; renamed keys are read.

    Raises pydantic's ValidationError.
    """
    return TypeAdapter(Config).validate_python(_select_members(_rename(values, ""), Config))


def config_to_yaml(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal config."""
    text: str = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _rename(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same nested values under the current names of their keys."""
    return {
        RENAMED_KEYS.get(prefix + key, key).rpartition(".")[2]: (
            _rename(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        )
        for key, value in values.items()
    }


def _select_members(values: Mapping[str, Any], section: type) -> dict[str, Any]:
    """The same nested values, with the discriminator of the default member where a union's section has none."""
    selected = dict(values)
    for name, field in fields_of(section).items():
        value, members = selected.get(name), section_members(field)
        if not isinstance(value, dict) or not members:
            continue
        if isinstance(field.discriminator, str):
            selected[name] = {field.discriminator: member_tag(default_member(field), field.discriminator)} | value
        elif len(members) == 1:
            selected[name] = _select_members(value, members[0])
    return selected


def _validate(source: Source, path: str, config_type: type[Config]) -> Config | None:
    """Check types, ranges and how keys fit together. Reports problems to `source`; then the result may be None."""
    values = _select_members(source.values, config_type)
    known = keys_in_use(values, config_type)
    for key in sorted(source.ambiguous):
        if key in known and known[key].kind == "text":
            text = "got an unquoted yes, no, on or off, which YAML versions read differently; quote it"
            source.report(key, source.locations[key], text)
    try:
        config = TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        details = error.errors()
        source.suppressed += len(details[MAX_PROBLEMS:])
        for detail in details[:MAX_PROBLEMS]:
            key, text = _explain(dict(detail), known, config_type)
            source.report(key, source.locations.get(key, path), text)
        return None
    for name, text in cross_field_errors(config):
        key = tuple(name.split("."))
        source.report(key, source.locations.get(key, path), text)
    return config


def _explain(detail: dict[str, Any], known: Mapping[Key, KeyInfo], config_type: type[Config]) -> tuple[Key, str]:
    """The key and a description, in the words of the config's user, of one of pydantic's errors."""
    key = _key_of(detail, known)
    if detail["type"] == "unexpected_keyword_argument":
        return key, f"unknown key{_suggest_key(key, known, config_type)}"
    value = detail["input"]
    if detail["type"] == "union_tag_invalid":
        discriminator = known[key].discriminator
        key, value = (*key, discriminator), value[discriminator]
    info = known[key]
    if detail["type"] == "missing" and key[-1] == detail["loc"][-1]:
        return key, f"missing; add it ({info.meaning})"
    expected = info.allowed or detail["msg"].removeprefix("Input should be ").removeprefix("String should ")
    similar = difflib.get_close_matches(value, info.choices, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return key, f"got {_format_value(value)}, expected {expected}{hint} ({info.meaning})"


def _key_of(detail: Mapping[str, Any], known: Mapping[Key, KeyInfo]) -> Key:
    """The key that an error is about.

    Pydantic's location also names the members of unions and the indices of sequences, which are not keys.
    """
    key: Key = ()
    *parents, last = map(str, detail["loc"])
    for part in parents:
        key = (*key, part) if (*key, part) in known else key
    return (*key, last) if (*key, last) in known or detail["type"] == "unexpected_keyword_argument" else key


def _suggest_key(key: Key, known: Mapping[Key, KeyInfo], config_type: type[Config]) -> str:
    """What the user may have meant by an unknown key, or where the list of keys is."""
    by_name = {join_key(other): join_key(other) for other in known} | RENAMED_KEYS
    written = join_key(key)
    if written in by_name:
        section, _, name = by_name[written].rpartition(".")
        return f"; dots lead into sections on the command line only: indent {name} below {section}"
    for other, info in walk_keys(config_type):
        if other == key and info.only_with is not None:
            return f"; it belongs to {join_key(info.only_with[0])} = {info.only_with[1]}"
    similar = difflib.get_close_matches(written, by_name, n=1, cutoff=0.75)
    if not similar:
        by_last_name = {name.rpartition(".")[2]: name for name in by_name}
        matches = difflib.get_close_matches(key[-1], by_last_name, n=1, cutoff=0.75)
        similar = [by_last_name[match] for match in matches]
    return f"; did you mean {by_name[similar[0]]}?" if similar else "; `python -m distgpt.train --help` lists all keys"


def _format_value(value: Any) -> str:
    """A value as its user would recognize it, shortened if long."""
    if isinstance(value, str):
        text = f"{value!r} (text)"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = "nothing (null)" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Dumper(yaml.SafeDumper):
    """Quotes texts that would otherwise be read back as numbers or constants; PyYAML leaves 1e5 unquoted."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A text, quoted if it is ambiguous."""
        ambiguous = text in CONSTANTS or text.lower() in YAML_1_1_BOOLEANS or NUMBER.fullmatch(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if ambiguous else None)


_Dumper.add_representer(str, _Dumper.represent_text)
