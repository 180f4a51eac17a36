"""A config file and its overrides as plain values, each with the place it was written: `file:line` or the command line.

Only what YAML 1.1 and 1.2 read alike has a meaning (numbers, true, false, null); the rest is text or is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distgpt.errors import ConfigError, one_line

MAX_CONFIG_BYTES, MAX_DEPTH = 2**16, 8
MOST_PROBLEMS = 20
"""Of one config that are told at once; the rest is counted."""
COMMAND_LINE = "command line"
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None}
YAML_1_1_BOOLEANS = {"yes", "no", "on", "off", "y", "n"}

Key = tuple[str, ...]


@dataclasses.dataclass
class Source:
    """Values as given, nested, with the place each came from; problems found so far."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[Key, str] = dataclasses.field(default_factory=dict)
    problems: list[tuple[Key, str]] = dataclasses.field(default_factory=list)
    ambiguous: set[Key] = dataclasses.field(default_factory=set)
    """Keys given as an unquoted yes, no, on or off: text here, but booleans to other YAML readers."""
    left_out: int = 0
    """Problems past MOST_PROBLEMS."""

    def report(self, key: Key, place: str, text: str) -> None:
        """Add a problem, unless this key has one already: one mistake is one line."""
        if key and any(key == reported for reported, _ in self.problems):
            return
        if len(self.problems) == MOST_PROBLEMS:
            self.left_out += 1
            return
        name = dotted(key) if len(dotted(key)) <= 100 else dotted(key)[:97] + "..."
        self.problems.append((key, one_line(f"{place}: {name}: {text}" if key else f"{place}: {text}")))

    def forget(self, key: Key) -> None:
        """Drop what is known of a key, and of those below it, before another value replaces it."""
        self.places = {other: place for other, place in self.places.items() if other[: len(key)] != key}
        self.ambiguous = {other for other in self.ambiguous if other[: len(key)] != key}


def read_source(path: str | Path, overrides: Sequence[str]) -> Source:
    """The values of a YAML file with `key=value` overrides over them. Raises ConfigError for what is no YAML."""
    source = Source()
    root = compose(read_text(path), str(path))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: got no `key: value` lines, expected a config such as configs/GPT-tiny.yaml")
    source.values = convert(root, (), str(path), source)
    for override in overrides:
        apply_override(override, source)
    return source


def read_text(path: str | Path) -> str:
    """The file's text; refuses what cannot be a config (missing, a folder, too large, not UTF-8)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot read the config: {reason}; give the path of a YAML file") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, which no config is; give a YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the config as UTF-8") from None


def compose(text: str, source_name: str) -> yaml.Node | None:
    """YAML text as nodes.

    Aliases are refused: expanded, a few lines of them fill any memory. So are tags: a value is what it looks like.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = at(source_name, event.start_mark.line if event.start_mark else 0)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{place}: got an alias (*), which configs do not use; repeat the value")
            if tag := getattr(event, "tag", None):
                short = tag.replace("tag:yaml.org,2002:", "!!")
                raise ConfigError(f"{place}: got the tag {short!r}, expected a plain or quoted value; remove the tag")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{place}: nested too deeply; expected `key: value` lines")
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return node
    except yaml.MarkedYAMLError as error:
        place = at(source_name, error.problem_mark.line) if error.problem_mark else source_name
        reason = one_line(str(error.problem))
        raise ConfigError(f"{place}: not valid YAML: {reason}; mend it, or quote what is text") from None
    except yaml.reader.ReaderError as error:
        place = at(source_name, text.count("\n", 0, error.position))
        raise ConfigError(f"{place}: not valid YAML: got the character {text[error.position]!r}; remove it") from None
    except (ValueError, OverflowError) as error:  # of an escape such as "\UFFFFFFFF", or a number in a directive
        raise ConfigError(f"{source_name}: not valid YAML: {error}; expected `key: value` lines") from None


def at(source_name: str, line: int) -> str:
    """The place of a line, counted from 0; the command line has but one."""
    return source_name if source_name.startswith(COMMAND_LINE) else f"{source_name}:{line + 1}"


def convert(node: yaml.Node, key: Key, source_name: str, source: Source) -> Any:
    """A node's plain value. Only what YAML 1.1 and 1.2 read alike has a meaning; the rest stays text or is refused."""
    if key:
        source.places[key] = at(source_name, node.start_mark.line)
    if isinstance(node, yaml.SequenceNode):
        return [convert(child, key, source_name, source) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for name_node, child in node.value:
            name = one_line(str(name_node.value)) if isinstance(name_node, yaml.ScalarNode) else "?"
            if name in values:
                again = at(source_name, name_node.start_mark.line)
                source.report((*key, name), again, f"given twice (first at {source.places[*key, name]}); remove one")
            else:
                values[name] = convert(child, (*key, name), source_name, source)
        return values
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


def apply_override(override: str, source: Source) -> None:
    """Set one `key=value` (dots lead into sections) over the file's values."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        hint = f"; options start with --, as in --{name}" if name in ("fresh", "help", "debug") else ""
        source.report((), COMMAND_LINE, f"got {override!r}, expected key=value, as in max_lr=1e-3{hint}")
        return
    name = one_line(name)
    key = tuple(name.split("."))
    if len(key) > MAX_DEPTH:
        source.report((), COMMAND_LINE, f"got {name[:40]!r}..., expected at most {MAX_DEPTH} names; shorten it")
        return
    try:
        node = compose(text, f"{COMMAND_LINE}: {name}")
    except ConfigError as error:
        source.problems.append((key, str(error)))
        return
    values = source.values
    for depth, part in enumerate(key[:-1], 1):
        source.places.setdefault(key[:depth], COMMAND_LINE)
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            source.report(key, COMMAND_LINE, f"{part} is a single value and has no keys; leave out the dot")
            return
    source.forget(key)
    value = None if node is None else convert(node, key, COMMAND_LINE, source)
    source.places[key] = COMMAND_LINE
    values[key[-1]] = value


def dotted(key: Sequence[str | int]) -> str:
    """`model_config.n_embd`."""
    return ".".join(map(str, key)) or "config"
