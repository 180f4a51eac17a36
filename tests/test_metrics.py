"""Metrics are correct, survive a crash, and a broken terminal or a full disk does not stop the run."""

from __future__ import annotations

import errno
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.training.metrics import EvalResult, MetricLogger, NullLogger, _drop_rows_after, _format_duration
from tests.conftest import read_metrics


@pytest.fixture
def config(config_file: Path) -> Config:
    config = load_config(config_file)
    Path(config.output_dir).mkdir(parents=True)
    return config


def make_logger(config: Config, first_step: int = 0, peak_tflops: float | None = None) -> MetricLogger:
    """256 tokens per step, 10 MFLOP per token, two ranks."""
    return MetricLogger(
        config,
        first_step=first_step,
        validated=True,
        flops_per_token=10**7,
        peak_tflops=peak_tflops,
        world_size=2,
        run_id="x",
    )


def test_speed_is_tokens_per_second_and_mfu_is_per_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = make_logger(config, peak_tflops=0.01024)
    now[0] += 2.0
    logger.step_done(4)
    logger.log_step(4, 3.5, 1e-3, 0.5)  # 1,024 tokens in 2 s
    now[0] += 50.0
    logger.log_evaluation(4, EvalResult(3.0, 99, 99).numbers())  # its 50 s do not count for the speed
    now[0] += 1.0
    logger.step_done(5)
    logger.log_step(5, float("nan"), 1e-3, float("inf"))
    logger.close()
    first, val, last = read_metrics(Path(config.output_dir))
    assert (first["tokens-per-second"], first["tflops"], first["mfu"]) == (512.0, 0.00512, 0.25)
    assert val == {"step": 4, "val-loss": 3.0, "val-perplexity": math.exp(3.0)}
    assert (last["tokens-per-second"], last["train-loss"], last["grad-norm"]) == (256.0, None, None)
    assert last["tokens"] == 1280


def test_rows_and_lines_have_their_documented_format(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = make_logger(config, first_step=4, peak_tflops=0.01024)
    now[0] += 0.5
    logger.step_done(5)
    logger.log_step(5, 3.5, 1e-3, 0.5)
    logger.log_evaluation(5, {"val-loss": 3.25, "val-perplexity": 25.79, "accuracy": 0.5})
    now[0] += 0.5
    logger.step_done(6)
    logger.log_step(6, 3.5, 1e-3, 0.5, skipped=2)
    logger.log_checkpoint_wait(6, 0.00123)
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    numbers = "lr 1.00e-03  norm 0.50  512 tok/s  0.00512 TFLOPS (25.0% MFU)"
    assert lines == [
        f"step  5/12  loss 3.5000  {numbers}  eta 00:04",
        "step  5/12  val-loss 3.2500  val-perplexity 25.79  accuracy 0.5000",
        f"step  6/12  loss 3.5000  val 3.2500  {numbers}  skipped 2  eta 00:03",
    ]
    step, evaluation, _, checkpoint = read_metrics(Path(config.output_dir))
    assert list(step) == [
        "step",
        "train-loss",
        "learning-rate",
        "grad-norm",
        "tokens-per-second",
        "tflops",
        "mfu",
        "tokens",
        "skipped",
    ]
    assert evaluation == {"step": 5, "val-loss": 3.25, "val-perplexity": 25.79, "accuracy": 0.5}
    assert checkpoint == {"step": 6, "checkpoint-wait-seconds": 0.0012}


def test_rows_after_the_restored_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val-loss": 3}\n{"step": 3}\n{"step": 4, "tr')
    _drop_rows_after(path, 2, validated=True)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "val-loss": 3}]
    _drop_rows_after(path, 2, validated=False)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_are_formatted_as_clocks(seconds: float, text: str) -> None:
    assert _format_duration(seconds) == text


def test_the_logger_of_other_ranks_does_nothing() -> None:
    logger = NullLogger()
    assert logger.log_step(1, 2.0, 3.0, 4.0) is None and logger.print("x") is None and logger.close() is None


class RecordingOutput(io.StringIO):
    """A standard output that records each write separately."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


def test_every_line_is_printed_in_one_write(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    output = RecordingOutput()
    monkeypatch.setattr(sys, "stdout", output)
    logger = make_logger(config)
    logger.print("a header\nof two lines")
    logger.log_step(1, 3.5, 1e-3, 0.5)
    logger.log_memory(1, [10**9, 10**9])
    logger.log_evaluation(1, {"val-loss": 3.0})
    logger.close()
    assert len(output.writes) == 4
    assert all(text.endswith("\n") and len(text) > 1 for text in output.writes)


class ClosedPipe(io.StringIO):
    """A standard output whose reader has exited."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_terminal_does_not_stop_the_metrics_file(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    logger = make_logger(config)
    logger.log_step(1, 3.5, 1e-3, 0.5)
    logger.log_step(2, 3.5, 1e-3, 0.5)
    logger.close()
    assert [row["step"] for row in read_metrics(Path(config.output_dir))] == [1, 2]


def test_unknown_memory_is_recorded_as_null(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make_logger(config)
    logger.log_memory(0, [None, None])
    logger.log_memory(0, [1_500_000_000, 2_500_000_000])
    logger.close()
    printed = capsys.readouterr().out
    assert "memory  n/a peak per rank so far" in printed
    assert "memory  1.50 GB to 2.50 GB peak per rank so far" in printed
    assert next(iter(read_metrics(Path(config.output_dir))))["peak-bytes"] == [None, None]


class FullDisk:
    """A file on a disk that is full for a number of writes, and then accepts half of each write."""

    def __init__(self, file: io.FileIO, failures: int) -> None:
        self.file, self.failures = file, failures

    def write(self, raw: bytes) -> int:
        if self.failures > 0:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(raw[: -(-len(raw) // 2)])

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_delays_the_metrics_file_and_is_reported_once(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = make_logger(config)
    logger._file = cast(Any, FullDisk(logger._file, failures=3))
    for step in range(1, 21):
        logger.log_step(step, 3.5, 1e-3, 0.5)
    logger.close()
    written = (Path(config.output_dir) / "metrics.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in written.split(b"\n")[:-1]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 18  # half a write behind
    assert capsys.readouterr().out.count("warning: metrics.jsonl: No space left on device") == 1
