"""README and docs agree with the package: keys, files, links, commands, examples. `python -m tests.test_docs` rewrites
the table of config keys in docs/config.md."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from distgpt.config.help import walk_keys
from distgpt.config.loader import load_config
from distgpt.config.schema import RENAMED_KEYS, mutable_keys
from distgpt.config.yaml_reader import join_key
from distgpt.data.sampler import BatchPlan
from distgpt.models.kernels import resolve_kernels
from tests.conftest import REPO
from tests.test_structure import MODULES, PACKAGE

README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
CONFIG_PAGE = REPO / "docs" / "config.md"
BEGIN, END = "<!-- begin keys -->\n", "<!-- end keys -->\n"

MAX_README_LINES = 180
CREATED_BY_EXAMPLES = {"data/u32_files.py", "models/relu2.py", "optim/sgd.py"}
"""Files that the examples of docs/extending.md add to the package."""

FOLDERS = "bench|configs|distgpt|docs|launch|tests"


def key_table() -> str:
    """Every config key, its type, default and meaning, and whether it may change on resume, as a markdown table."""
    mutable = mutable_keys()
    rows = ["| key | type | default | on resume | meaning |", "|---|---|---|---|---|"]
    for key, info in walk_keys():
        if info.kind == "section":
            continue
        name = join_key(key)
        default = "required" if info.default == "required" else f"`{info.default}`"
        on_resume = "may change" if name in mutable else "fixed"
        only_with = f" (with `{join_key(info.only_with[0])}={info.only_with[1]}`)" if info.only_with else ""
        rows.append(f"| `{name}`{only_with} | {info.kind} | {default} | {on_resume} | {info.meaning} |")
    return "\n".join(rows) + "\n"


def with_key_table(page: str) -> str:
    """The page with the current table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + key_table() + END + after


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_map() -> dict[str, str]:
    """The text of each entry of the code map in the README by its name, such as `train.py` or `config/`."""
    tree = README.partition("## Code map")[2].partition("```\ndistgpt/\n")[2].partition("```")[0]
    entries: dict[str, str] = {}
    for line in tree.splitlines():
        if not line.startswith("   "):
            entries[line.split()[0]] = ""
        name = list(entries)[-1]
        entries[name] += line.strip().removeprefix(name) + " "
    return entries


def test_the_table_of_config_keys_is_current() -> None:
    page = CONFIG_PAGE.read_text()
    assert page == with_key_table(page), "run `python -m tests.test_docs`"


def test_the_code_map_has_every_module() -> None:
    entries = code_map()
    assert entries
    for name, text in entries.items():
        assert (PACKAGE / name).exists(), name
        if name.endswith("/"):
            modules = {path.stem for path in (PACKAGE / name).glob("*.py")} - {"__init__", "__main__"}
            assert modules <= set(re.findall(r"\w+", text)), name
    on_disk = {path.name for path in PACKAGE.glob("*.py")} | {f"{m.parent.name}/" for m in PACKAGE.glob("*/*.py")}
    assert on_disk - entries.keys() == {"__init__.py", "__main__.py"}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_the_output_in_the_readme_is_what_a_run_prints() -> None:
    config = load_config(REPO / "configs" / "GPT-tiny.yaml")
    model = config.model_config
    for text in (
        f"model   {model.model_type}, {model.n_layer} layers, {model.n_head} heads, hidden size {model.n_embd}, "
        f"{model.n_positions} positions, {model.num_parameters(50257):,} parameters\n",
        f"batch   {BatchPlan.from_config(config, 1).equation(config.seq_len)}\n",
        f"kernels {resolve_kernels('cpu', 'bf16', True, True, model.head_size, config.seq_len).describe()}\n",
    ):
        assert text in README


def test_the_batch_arithmetic_in_the_docs_is_what_the_command_prints() -> None:
    config = load_config(REPO / "configs" / "GPT-tiny.yaml")
    text = (REPO / "docs" / "parallelism.md").read_text()
    assert f"# {BatchPlan.from_config(config, 3).equation(config.seq_len)}\n" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Files of the repository, and files that are named relative to the package."""
    text = page.read_text()
    for name in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]*\w", text):
        assert "NAME" in name or (REPO / name).exists(), name
    for name in re.findall(r"(?<![\w/.-])[a-z]+/\w+\.py\b", text):
        is_placeholder = "NAME" in name or name in CREATED_BY_EXAMPLES
        assert is_placeholder or (PACKAGE / name).exists() or (REPO / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_exist(page: Path) -> None:
    for name in re.findall(r"-m distgpt\.([a-z_.]*[a-z])", page.read_text()):
        assert name in MODULES, name
    for folder, name in re.findall(r"-m (bench|tests)\.(\w+)", page.read_text()):
        assert (REPO / folder / f"{name}.py").exists(), name
    for file, name in re.findall(r"(tests/\w+\.py) -k (\w+)", page.read_text()):
        assert re.search(rf"def test_\w*{name}", (REPO / file).read_text()), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_config_keys_exist(page: Path) -> None:
    keys = {join_key(key) for key, _ in walk_keys()} | RENAMED_KEYS.keys()
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(sections)})\.\w+", page.read_text()):
        assert name in keys or name in {"eval.json", "optimizer.Y"}, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_valid_python_and_import_what_exists(page: Path) -> None:
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("distgpt."):
                path = Path(*str(node.module).split(".")[1:]).with_suffix(".py")
                if str(path) in CREATED_BY_EXAMPLES:
                    continue
                defined = (PACKAGE / path).read_text()
                for alias in node.names:
                    is_created = f"class {alias.name}" in page.read_text()
                    assert is_created or re.search(rf"\b{alias.name}\b", defined), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert importlib.util.find_spec(str(module)) is not None, module


if __name__ == "__main__":
    CONFIG_PAGE.write_text(with_key_table(CONFIG_PAGE.read_text()))
