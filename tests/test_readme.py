"""README and docs agree with the package: config keys, modules, files and commands."""

from __future__ import annotations

import re

from distgpt.config.help import walk_keys
from distgpt.config.yaml_reader import join_key
from tests.conftest import REPO
from tests.test_structure import MODULES

README = (REPO / "README.md").read_text()
TEXT = README + "".join(path.read_text() for path in sorted((REPO / "docs").glob("*.md")))
"""The README and every page of the documentation."""


def test_every_key_is_in_the_table_with_its_default_and_meaning() -> None:
    for key, info in walk_keys():
        if info.kind != "section":
            default = "required" if info.default == "required" else f"`{info.default}`"
            assert f"| `{join_key(key)}` | {info.kind}, {default} | {info.meaning} |" in TEXT, join_key(key)


def test_every_module_is_in_the_code_map() -> None:
    """A package stands for its modules; packages and modules are written as paths below distgpt/."""
    table = README.partition("## Code map")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    paths = re.findall(r"`([\w/.]+)`", "\n".join(cells))
    names = {path.removesuffix(".py").strip("/").replace("/", ".") for path in paths}
    assert names <= set(MODULES), names - set(MODULES)
    missing = {module for module in MODULES if not any(f"{module}.".startswith(f"{name}.") for name in names)}
    assert missing <= {"__init__", "__main__"}, missing


def test_every_file_it_names_exists() -> None:
    for name in re.findall(r"\]\(([\w/.-]+)\)|(?<![\w/])((?:launch|configs|bench|tests)/[\w.-]+\.\w+)", README):
        path = name[0] or name[1]
        assert (REPO / path).exists(), path


def test_every_command_it_names_exists() -> None:
    for name in re.findall(r"-m distgpt\.([a-z_.]+[a-z])", TEXT):
        assert name in MODULES, name
    assert not re.search(r"@[A-Z]+@", TEXT)  # no placeholder is left
