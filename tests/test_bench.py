"""The benchmark gives every contestant the same work, and prints its measurements."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.speed import parse_arguments, select_contestants
from bench.work import synthetic_tokens
from distgpt.errors import ConfigError
from tests.conftest import REPO, environment

STEPS = 4


def test_contestants_compute_the_same_losses_and_appear_in_the_table(tmp_path: Path) -> None:
    output, contestants = tmp_path / "speed.json", ["distgpt eager", "textbook"]
    options = ["--shapes=tiny", f"--steps={STEPS}", "--rounds=1", f"--contestants={','.join(contestants)}"]
    completed = subprocess.run(
        [sys.executable, "-m", "bench.speed", *options, f"--output={output}"],
        cwd=REPO,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    report = json.loads(output.read_text())
    rows = {row["contestant"]: row for row in report["results"][0]["contestants"]}
    distgpt, textbook = ([step["loss"] for step in rows[name]["rounds"][0]] for name in contestants)
    assert len(distgpt) == STEPS
    assert distgpt == pytest.approx(textbook, rel=1e-3)
    assert distgpt[0] == pytest.approx(textbook[0], rel=1e-5)  # later, different forms of GELU let them diverge
    columns = ["tokens/s", "middle half", "TFLOPS", "MFU (matmul)", "MiB per rank", "first step s", "loader ms"]
    for text in (*columns, "checkpoint ms", *contestants, f"torch {report['torch']}"):
        assert text in completed.stdout
    assert all(row["first_step_seconds"][0] > 0 and row["peak_mib"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--shapes=C", "--shapes: got 'C'"),
        ("--contestants=nobody", "--contestants: got 'nobody'"),
        ("--contestants=litgpt", "no environment for litgpt"),
        ("--ranks=3", "--ranks: got 3"),
        ("--ranks=two", "--ranks: got two"),
        ("--steps=0", "--steps: got 0"),
        ("--output=/nowhere/at/all.json", "--output: /nowhere/at is not a folder"),
    ],
)
def test_an_invalid_argument_is_reported_in_one_line(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        select_contestants(parse_arguments([argument], on_gpu=False))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_synthetic_tokens_can_be_learned() -> None:
    tokens = synthetic_tokens(20_000).astype(int)
    assert (tokens == synthetic_tokens(20_000)).all()
    last: dict[int, int] = {}
    repeated = [last.get(a) == b or bool(last.update({a: b})) for a, b in itertools.pairwise(tokens)]
    unigrams = np.bincount(tokens).max() / len(tokens)
    assert np.mean(repeated[10_000:]) > 2 * unigrams  # a token predicts its successor better than frequencies do
