"""The structure of the package: what modules import, what they never do, and how long and documented functions are.

`[tool.importlinter]` in pyproject.toml lists the layers.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import distgpt
from tests.conftest import REPO, environment, read_metrics

PACKAGE = Path(distgpt.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The file of every module by its name without `distgpt.`; a package is named after its folder."""
MODULES = sorted(FILES)

ALLOWED_IN = {
    "torch.distributed": {
        "distributed",
        "resilience.heartbeat",
        "checkpoint.saver",
        "checkpoint.weights",
        "training.state",
        "training.step",
        "train",
    },
    "os.environ": {
        "__init__",
        "errors",
        "distributed",
        "resilience.heartbeat",
        "resilience.signals",
        "resilience.watchdog",
        "training.metrics",  # TERM
        "training.trackers",  # WANDB_API_KEY
    },
}
"""The modules and packages that may use something."""

TORCH_FREE = {
    *("errors", "atomic_io", "check", "cli", "config", "config.__main__", "config.fields", "config.schema"),
    *(
        "config.loader",
        "config.yaml_reader",
        "config.help",
        "models.architectures",
        "models.kernels",
        "optim.optimizers",
    ),
    *("optim.schedules", "data.tokenizer", "data.token_files", "data.token_array", "data.numpy_files"),
    *("data.nanogpt_files", "data.sample_corpus", "data.dataset", "data.sampler", "data.__main__"),
    *("distributed.layout", "distributed.estimate", "checkpoint.store", "checkpoint.weights"),
    *("resilience.signals", "resilience.run_lock", "resilience.watchdog", "resilience.preflight"),
}
"""Modules that run before torch is imported, which takes seconds."""


def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(FILES[module].read_text())


def imported(module: str) -> set[str]:
    """The full names of everything that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of a copy of the project."""
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("errors.py", "", "1 kept, 0 broken"),
        ("errors.py", "import distgpt.atomic_io", "1 kept, 0 broken"),
        ("errors.py", "import distgpt.config.fields", "distgpt.errors is not allowed to import distgpt.config.fields"),
        ("models/gpt2.py", "import distgpt.config.schema", "distgpt.models is not allowed to import distgpt.config.s"),
        ("data/sampler.py", "import distgpt.distributed.layout", "distgpt.data is not allowed to import distgpt.dist"),
        ("utils.py", "", "utils"),
    ],
)
def test_modules_import_only_from_lower_layers_and_every_module_has_a_layer(
    tmp_path: Path, file: str, line: str, message: str
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "distgpt", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    with (tmp_path / "distgpt" / file).open("a") as module:
        module.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert message in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == ("0 broken" in message)


@pytest.mark.parametrize("module", MODULES)
def test_communication_and_environment_variables_are_used_in_few_modules(module: str) -> None:
    attributes = {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    for name, allowed in ALLOWED_IN.items():
        if any(use == name or use.startswith(f"{name}.") for use in imported(module) | attributes):
            assert module in allowed or module.partition(".")[0] in allowed, f"{module} uses {name}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_evaluated_or_passed_to_a_shell(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "torch.load", "yaml.load", "os.system", "pickle.load", "pickle.loads"}
            assert not any(keyword.arg in {"shell", "allow_pickle"} for keyword in node.keywords)
    assert not any(name.split(".")[0] in {"pickle", "shelve", "marshal", "dill"} for name in imported(module))


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_and_documented(module: str) -> None:
    parsed = tree(module)
    assert ast.get_docstring(parsed)
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_modules_that_run_before_torch_is_imported_do_not_import_it() -> None:
    code = f"""
import importlib, sys
for module in {sorted(TORCH_FREE)}:
    importlib.import_module("distgpt." + module)
    heavy = {{"torch", "torchdata", "wandb", "safetensors", "tensorboard"}} & sys.modules.keys()
    if heavy:
        sys.exit(f"distgpt.{{module}} imports {{heavy}}")
"""
    assert set(MODULES) >= TORCH_FREE
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_train_py_runs_as_a_script(config_file: Path, tmp_path: Path) -> None:
    """A script's folder comes first on sys.path, where distgpt's modules must not shadow what torch imports."""
    top_level = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert not top_level & sys.stdlib_module_names
    done = subprocess.run(
        [sys.executable, str(PACKAGE / "train.py"), str(config_file), "compile=off"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12


def test_the_version_is_that_of_pyproject() -> None:
    assert tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"] == distgpt.__version__
