"""Reads a YAML config and its overrides into plain values, each with its location: `file:line` or the command line.

Only values that YAML 1.1 and 1.2 read identically get a type (numbers, true, false, null). All others stay text or are
refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distgpt.errors import ConfigError, one_line

MAX_CONFIG_BYTES, MAX_DEPTH = 2**16, 8
MAX_PROBLEMS = 20
"""Problems of one config that are reported; further ones are counted."""
COMMAND_LINE = "command line"
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None}
YAML_1_1_BOOLEANS = {"yes", "no", "on", "off", "y", "n"}

Key = tuple[str, ...]


@dataclasses.dataclass
class Source:
    """The nested values as given, the location of each, and the problems so far."""

    renamed: Mapping[Key, str] = dataclasses.field(default_factory=dict)
    """Old keys that are still accepted, with their new last name."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    locations: dict[Key, str] = dataclasses.field(default_factory=dict)
    problems: list[tuple[Key, str]] = dataclasses.field(default_factory=list)
    ambiguous: set[Key] = dataclasses.field(default_factory=set)
    """Keys given as an unquoted yes, no, on or off: text here, but booleans to other YAML readers."""
    suppressed: int = 0
    """Number of problems beyond MAX_PROBLEMS."""

    def report(self, key: Key, location: str, text: str) -> None:
        """Add a problem, unless this key already has one."""
        if key and any(key == reported for reported, _ in self.problems):
            return
        if len(self.problems) == MAX_PROBLEMS:
            self.suppressed += 1
            return
        name = join_key(key) if len(join_key(key)) <= 100 else join_key(key)[:97] + "..."
        self.problems.append((key, one_line(f"{location}: {name}: {text}" if key else f"{location}: {text}")))

    def forget(self, key: Key) -> None:
        """Drop the locations of a key and all keys below it, before another value replaces it."""
        self.locations = {other: location for other, location in self.locations.items() if other[: len(key)] != key}
        self.ambiguous = {other for other in self.ambiguous if other[: len(key)] != key}

    def current_key(self, section: Key, name: str) -> Key:
        """The key of a name in a section, under its new name if it was renamed."""
        return (*section, self.renamed.get((*section, name), name))


def read_source(path: str | Path, overrides: Sequence[str], renamed: Mapping[str, str]) -> Source:
    """The values of a YAML file, with `key=value` overrides applied. `renamed` maps old dotted keys to new ones.

    Raises ConfigError for invalid YAML.
    """
    source = Source({tuple(old.split(".")): new.rpartition(".")[2] for old, new in renamed.items()})
    root = _compose(_read_text(path), str(path))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: got no `key: value` lines, expected a config such as configs/GPT-tiny.yaml")
    source.values = _convert(root, (), str(path), source)
    for override in overrides:
        _apply_override(override, source)
    return source


def join_key(key: Sequence[str | int]) -> str:
    """A key as users write it, such as `model_config.n_embd`."""
    return ".".join(map(str, key)) or "config"


def _read_text(path: str | Path) -> str:
    """The file's text. Refuses files that cannot be a config: missing, a folder, too large, not UTF-8."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot read the config: {reason}; give the path of a YAML file") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, too large for a config; give a YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the config as UTF-8") from None


def _compose(text: str, source_name: str) -> yaml.Node | None:
    """Parse YAML text into nodes.

    Aliases are refused, because expanding a few nested ones fills any memory. Tags are refused, because a value's type
    follows from how it is written.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            location = _location(source_name, event.start_mark.line if event.start_mark else 0)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{location}: got an alias (*), which configs do not allow; repeat the value")
            if tag := getattr(event, "tag", None):
                short = tag.replace("tag:yaml.org,2002:", "!!")
                raise ConfigError(
                    f"{location}: got the tag {short!r}, expected a plain or quoted value; remove the tag"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{location}: nested too deeply; expected `key: value` lines")
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return node
    except yaml.MarkedYAMLError as error:
        location = _location(source_name, error.problem_mark.line) if error.problem_mark else source_name
        reason = one_line(str(error.problem))
        raise ConfigError(f"{location}: not valid YAML: {reason}; fix it, or quote the text") from None
    except yaml.reader.ReaderError as error:
        location = _location(source_name, text.count("\n", 0, error.position))
        character = text[error.position]
        raise ConfigError(f"{location}: not valid YAML: got the character {character!r}; remove it") from None
    except (ValueError, OverflowError) as error:  # from an escape such as "\UFFFFFFFF", or a number in a directive
        raise ConfigError(f"{source_name}: not valid YAML: {error}; expected `key: value` lines") from None


def _location(source_name: str, line: int) -> str:
    """`file:line` of a line counted from 0. The command line has no lines."""
    return source_name if source_name.startswith(COMMAND_LINE) else f"{source_name}:{line + 1}"


def _convert(node: yaml.Node, key: Key, source_name: str, source: Source) -> Any:
    """A node's plain value; its location is added to `source`."""
    if key:
        source.locations[key] = _location(source_name, node.start_mark.line)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, key, source_name, source) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, key, source_name, source)
    text = str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.style is not None:  # quoted or a block
        return text
    if text.lower() in YAML_1_1_BOOLEANS:
        source.ambiguous.add(key)
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text) if len(text) < 40 else text
    return float(text) if NUMBER.fullmatch(text) else text


def _convert_mapping(node: yaml.MappingNode, key: Key, source_name: str, source: Source) -> dict[str, Any]:
    """A section's plain values under their current names."""
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for name_node, child in node.value:
        written = one_line(str(name_node.value)) if isinstance(name_node, yaml.ScalarNode) else "?"
        child_key = source.current_key(key, written)
        name = child_key[-1]
        if name in values:
            here, first = _location(source_name, name_node.start_mark.line), source.locations[child_key]
            old_names = sorted({written, spellings[name]} - {name})
            hint = "".join(f"; {old_name} is its old name" for old_name in old_names)
            source.report(child_key, here, f"given twice (first at {first}){hint}; remove one")
        else:
            spellings[name] = written
            values[name] = _convert(child, child_key, source_name, source)
    return values


def _apply_override(override: str, source: Source) -> None:
    """Set one `key=value` over the file's values. Dots in the key lead into sections."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        hint = f"; options start with --, as in --{name}" if name in ("fresh", "help", "debug") else ""
        source.report((), COMMAND_LINE, f"got {override!r}, expected key=value, as in max_lr=1e-3{hint}")
        return
    name = one_line(name)
    key: Key = ()
    for part in name.split("."):
        key = source.current_key(key, part)
    if len(key) > MAX_DEPTH:
        source.report((), COMMAND_LINE, f"got {name[:40]!r}..., expected at most {MAX_DEPTH} names; shorten it")
        return
    try:
        node = _compose(text, f"{COMMAND_LINE}: {name}")
    except ConfigError as error:
        source.problems.append((key, str(error)))
        return
    values = source.values
    for depth, part in enumerate(key[:-1], 1):
        source.locations.setdefault(key[:depth], COMMAND_LINE)
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            source.report(key, COMMAND_LINE, f"{part} is a single value and has no keys; leave out the dot")
            return
    source.forget(key)
    value = None if node is None else _convert(node, key, COMMAND_LINE, source)
    source.locations[key] = COMMAND_LINE
    values[key[-1]] = value
