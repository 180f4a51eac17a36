"""What is recorded is right, survives a crash, and neither a slow nor a broken outlet holds the run up."""

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

from distgpt import config as configs
from distgpt import metrics
from distgpt.config import Config
from distgpt.metrics import Log, Score, Silence, WandbThread, duration, truncate
from tests.conftest import read_metrics


@pytest.fixture
def config(config_file: Path) -> Config:
    config = configs.load(config_file)
    Path(config.output_dir).mkdir(parents=True)
    return config


def make_log(config: Config, first_step: int = 0, peak: float | None = None) -> Log:
    """256 tokens in a step, 10 MFLOP each, on two ranks."""
    return Log(config, first_step, validated=True, flops_per_token=10**7, peak=peak, ranks=2, wandb_run_id="x")


def test_speed_is_tokens_over_time_and_mfu_is_per_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = make_log(config, peak=0.01024)
    now[0] += 2.0
    log.step_done(4)
    log.step(4, 3.5, 1e-3, 0.5)  # 1,024 tokens in 2 s
    now[0] += 50.0
    log.evaluation(4, Score(3.0, 99, 99))  # its 50 s are nobody's speed
    now[0] += 1.0
    log.step_done(5)
    log.step(5, float("nan"), 1e-3, float("inf"))
    log.close()
    first, val, last = read_metrics(Path(config.output_dir))
    assert (first["tokens-per-second"], first["tflops"], first["mfu"]) == (512.0, 0.00512, 0.25)
    assert val == {"step": 4, "val-loss": 3.0, "val-perplexity": math.exp(3.0)}
    assert (last["tokens-per-second"], last["train-loss"], last["grad-norm"]) == (256.0, None, None)
    assert last["tokens"] == 1280


def test_what_came_after_the_restored_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val-loss": 3}\n{"step": 3}\n{"step": 4, "tr')
    truncate(path, 2, validated=True)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "val-loss": 3}]
    truncate(path, 2, validated=False)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_other_ranks_write_nothing() -> None:
    silence = Silence()
    assert silence.step(1, 2.0, 3.0, 4.0) is None and silence.say("x") is None


class Gone(io.StringIO):
    """A standard output whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_lost_terminal_does_not_stop_the_record(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    log = make_log(config)
    log.step(1, 3.5, 1e-3, 0.5)
    log.step(2, 3.5, 1e-3, 0.5)
    log.close()
    assert [row["step"] for row in read_metrics(Path(config.output_dir))] == [1, 2]


def test_offline_wandb_gets_every_record(config: Config, tmp_path: Path) -> None:
    thread = WandbThread(config, "abc123", "offline")
    for step in range(5):
        thread.send({"step": step, "train-loss": 1.0})
    thread.CLOSE_SECONDS = 60
    assert thread.close() is None
    (folder,) = (Path(config.output_dir) / "wandb").glob("offline-run-*-abc123")
    assert list(folder.glob("*.wandb"))


@pytest.mark.parametrize("body", ["raise OSError('no network')", "import time; time.sleep(60)"])
def test_wandb_that_fails_or_hangs_holds_nothing_up(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """A package of that name, on the path before the real one, whose init fails or hangs."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        f"class Settings:\n    def __init__(self, **k): pass\ndef init(**k):\n    {body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(metrics.WandbThread, "CLOSE_SECONDS", 0.5)
    thread = WandbThread(config, "abc123", "online")
    started_at = time.monotonic()
    for step in range(20_000):  # more than its queue holds
        thread.send({"step": step})
    failure = thread.close()
    assert time.monotonic() - started_at < 5
    assert failure is not None and ("no network" in failure or "still busy" in failure)


def test_memory_that_is_not_known_is_not_a_number(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(config)
    log.memory(0, [None, None])
    log.memory(0, [1_500_000_000, 2_500_000_000])
    log.close()
    printed = capsys.readouterr().out
    assert "memory  n/a at most" in printed and "memory  1.50 GB to 2.50 GB at most" in printed
    assert next(iter(read_metrics(Path(config.output_dir))))["peak-bytes"] == [None, None]


class Full:
    """A file on a disk that is full until it is not, and then takes half of what it is given at a time."""

    def __init__(self, file: io.FileIO, failures: int) -> None:
        self.file, self.failures = file, failures

    def write(self, raw: bytes) -> int:
        if self.failures > 0:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(raw[: -(-len(raw) // 2)])

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_delays_the_record_and_is_told_once(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(config)
    log.file = cast(Any, Full(log.file, failures=3))
    for step in range(1, 21):
        log.step(step, 3.5, 1e-3, 0.5)
    log.close()
    written = (Path(config.output_dir) / "metrics.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in written.split(b"\n")[:-1]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 18  # half a write behind
    assert capsys.readouterr().out.count("warning: metrics.jsonl: No space left on device") == 1
