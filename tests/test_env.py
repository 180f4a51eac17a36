"""Whether this environment can run distgpt. `pytest tests/test_env.py` checks it and says how to fix what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tempfile
import tomllib

import pytest
import torch

from tests.conftest import REPO
from tests.ranks import results

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def test_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11), (
        f"this is Python {sys.version.split()[0]}: install 3.11 or newer, set PYTHON to it"
    )


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_packages_are_installed_in_allowed_versions(requirement: str) -> None:
    name = re.split(r"[<>=]", requirement)[0]
    remedy = f"run `.venv/bin/python -m pip install '{requirement}'`, or delete .venv and run ./launch/test.sh"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(f"{name} is not installed: {remedy}")

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+", maxsplit=1)[0])[:3])

    for operator, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        fits = numbers(version) >= numbers(bound) if operator == ">=" else numbers(version) < numbers(bound)
        assert fits, f"{name} is {version}, expected {requirement}: {remedy}"


def test_torch_computes() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(9.0, device=device).reshape(3, 3)
    assert (x @ x).sum().item() == 486.0, f"torch computes wrong results on {device}: reinstall it"


def test_the_gpt2_tokenizer_loads_without_a_network() -> None:
    from distgpt.data.tokenizer import load_tokenizer

    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995], (
        "the bundled vocabulary is damaged: reinstall distgpt"
    )


@pytest.mark.parametrize("folder", [".", tempfile.gettempdir()])
def test_folders_are_writable(folder: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        pytest.fail(
            f"cannot write in {os.path.realpath(folder)} ({error.strerror}): change its owner, or work elsewhere"
        )


def test_two_gloo_ranks_communicate() -> None:
    try:
        cases, _ = results(2)
    except AssertionError as error:
        pytest.fail(f"two gloo ranks could not connect over the loopback device: {str(error)[-1500:]}")
    assert cases["agreement"][0]["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
