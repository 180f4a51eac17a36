"""Fixtures that many test modules share: a small corpus, a small config, and ways to start the real commands."""

from __future__ import annotations

import argparse
import json
import json.encoder
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).parent.parent

TINY = """
output_dir: {folder}/run
tokenizer_encoding: bytes
model_config: {{n_embd: 32, n_head: 4, n_positions: 32, n_layer: 2}}
data: {corpus}
device: cpu
batch_size: 8
seq_len: 32
num_warmup_steps: 2
num_training_steps: 12
min_lr: 1e-4
max_lr: 1e-3
log_every: 1
eval: {{every: 5, max_tokens: 512}}
checkpoint: {{every: 4, keep: 2}}
wandb: disabled
"""
"""A run of about a second. Its tokens are bytes of source files of the standard library."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of byte tokens: 100,000 for training and 1,003 for validation, which no batch size divides."""
    path = tmp_path_factory.mktemp("corpus") / "tokens.npz"
    train = np.frombuffer(Path(str(argparse.__file__)).read_bytes(), dtype=np.uint8)
    val = np.frombuffer(Path(str(json.encoder.__file__)).read_bytes(), dtype=np.uint8)
    np.savez(path, train=train.astype(np.uint16), val=val[:1003].astype(np.uint16))
    return path


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    """The tiny config; it writes its output below `tmp_path`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(folder=tmp_path, corpus=corpus))
    return path


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(name: str, arguments: Sequence[object], ranks: int = 1) -> list[str]:
    """`python -m distgpt.NAME ...`, under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", f"distgpt.{name}", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the package importable, and without the variables that torchrun sets."""
    from_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in from_torchrun}
    return inherited | {"PYTHONPATH": str(REPO)} | extra


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a real command in a new process from an empty folder; returns its output and exit code."""

    def start(name: str, *arguments: object, ranks: int = 1, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(name, arguments, ranks),
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


@pytest.fixture
def begin(config_file: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts runs of the tiny config in the background, and kills what is left of them afterwards."""
    from tests.started import Started

    started: list[Started] = []

    def start(ranks: int, *arguments: str, **settings: Any) -> Any:
        started.append(Started(tmp_path, ranks, *arguments, **settings))
        return started[-1]

    yield start
    for run in started:
        run.end()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def training_curve(output_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every training step in a run's metrics.jsonl."""
    return [(r["step"], r["train-loss"], r["grad-norm"]) for r in read_metrics(output_dir) if "train-loss" in r]
