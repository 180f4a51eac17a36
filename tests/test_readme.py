"""The README tells the truth about keys, rooms and commands."""

from __future__ import annotations

import re

from distgpt import config as configs
from distgpt.source import dotted
from tests.conftest import REPO
from tests.test_layers import ROOMS

README = (REPO / "README.md").read_text()


def test_every_key_is_in_the_table_with_its_default_and_meaning() -> None:
    for key, info in configs.walk_keys():
        if info.kind != "section":
            default = "required" if info.default == "required" else f"`{info.default}`"
            assert f"| `{dotted(key)}` | {info.kind}, {default} | {info.meaning} |" in README


def test_every_room_is_in_the_table() -> None:
    table = README.partition("## The rooms")[2].partition("## To change")[0]
    assert (
        sorted(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if "|" in row)))
        == ROOMS
    )


def test_every_file_it_names_exists() -> None:
    for name in re.findall(r"\]\(([\w/.-]+)\)|(?<![\w/])((?:launch|configs|bench|tests)/[\w.-]+\.\w+)", README):
        path = name[0] or name[1]
        assert (REPO / path).exists(), path


def test_every_command_it_names_exists() -> None:
    for name in re.findall(r"-m distgpt\.(\w+)", README):
        assert name in ROOMS, name
    assert not re.search(r"@[A-Z]+@", README)  # no blank left to fill in
