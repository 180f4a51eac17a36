"""Trackers receive every row, and one that fails or hangs changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.training import trackers
from distgpt.training.metrics import MetricLogger
from distgpt.training.trackers import TRACKERS, TrackerThread, WandbTracker, start_trackers
from tests.conftest import environment, read_metrics


@pytest.fixture
def config(config_file: Path) -> Config:
    config = load_config(config_file)
    Path(config.output_dir).mkdir(parents=True)
    return config


def make_logger(config: Config, first_step: int = 0) -> MetricLogger:
    return MetricLogger(
        config,
        first_step=first_step,
        validated=True,
        flops_per_token=10**7,
        peak_tflops=None,
        world_size=1,
        run_id="abc123",
    )


class FakeTracker:
    """Records the calls it receives; raises or hangs in the method that `fault` names."""

    package: ClassVar[str] = "json"
    fault: ClassVar[str] = ""
    released: ClassVar[threading.Event] = threading.Event()
    calls: ClassVar[list[tuple[Any, ...]]] = []

    @staticmethod
    def is_enabled(config: Config) -> bool:
        return True

    def start(self, config: Config, run_id: str, first_step: int) -> None:
        self._call("start", run_id, first_step)

    def log(self, row: dict[str, Any]) -> None:
        self._call("log", row)

    def save_file(self, path: Path) -> None:
        self._call("save_file", path)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any) -> None:
        if self.fault == f"raise in {method}":
            raise OSError("no network")
        if self.fault == f"hang in {method}":
            self.released.wait(60)
        self.calls.append((method, *arguments))


@pytest.fixture
def fake_tracker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FakeTracker as the only tracker; hanging calls return when the test ends."""
    monkeypatch.setattr(FakeTracker, "released", threading.Event())
    monkeypatch.setattr(FakeTracker, "calls", [])
    monkeypatch.setattr(trackers, "TRACKERS", {"fake": FakeTracker})
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    yield FakeTracker
    FakeTracker.released.set()


def run_logger(config: Config) -> list[dict[str, Any]]:
    """Log a short run; returns the rows of metrics.jsonl, without the measured speed."""
    logger = make_logger(config)
    for step in range(1, 6):
        logger.step_done(step)
        logger.log_step(step, 4.0 - step / 10, 1e-3, 0.5)
    logger.log_evaluation(5, {"val-loss": 3.0})
    logger.close()
    rows = read_metrics(Path(config.output_dir))
    return [{key: value for key, value in row.items() if key not in ("tokens-per-second", "tflops")} for row in rows]


def test_a_tracker_receives_every_row_of_the_metrics_file(config: Config, fake_tracker: type[FakeTracker]) -> None:
    run_logger(config)
    (start, *logs, finish) = fake_tracker.calls
    assert start == ("start", "abc123", 0) and finish == ("finish",)
    assert [row for _, row in logs] == read_metrics(Path(config.output_dir))


def test_files_are_passed_to_the_tracker(config: Config, fake_tracker: type[FakeTracker]) -> None:
    thread = TrackerThread("fake", fake_tracker(), config, "abc123", 7)
    thread.save_file(Path("eval.json"))
    assert thread.finish() is None
    assert fake_tracker.calls == [("start", "abc123", 7), ("save_file", Path("eval.json")), ("finish",)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise in start", "fake: stopped (OSError: no network); metrics.jsonl has every number"),
        ("raise in log", "fake: stopped (OSError: no network); metrics.jsonl has every number"),
        ("raise in finish", "fake: stopped (OSError: no network); metrics.jsonl has every number"),
        ("hang in start", "fake: still busy after 0.5 s; metrics.jsonl has every number"),
        ("hang in log", "fake: still busy after 0.5 s; metrics.jsonl has every number"),
        ("hang in finish", "fake: still busy after 0.5 s; metrics.jsonl has every number"),
    ],
)
def test_a_tracker_that_raises_or_hangs_changes_nothing_and_is_reported_once(
    config: Config,
    fake_tracker: type[FakeTracker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    message: str,
) -> None:
    expected_rows = run_logger(config)
    (Path(config.output_dir) / "metrics.jsonl").unlink()
    assert "fake" not in capsys.readouterr().out
    monkeypatch.setattr(fake_tracker, "fault", fault)
    started_at = time.monotonic()
    assert run_logger(config) == expected_rows
    assert time.monotonic() - started_at < 5
    assert [line for line in capsys.readouterr().out.splitlines() if "fake" in line] == [message]


def test_rows_are_dropped_while_the_queue_is_full(
    config: Config, fake_tracker: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 5)
    monkeypatch.setattr(fake_tracker, "fault", "hang in start")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 10)
    thread = TrackerThread("fake", fake_tracker(), config, "abc123", 0)
    started_at = time.monotonic()
    for step in range(20):
        thread.log({"step": step})
    assert time.monotonic() - started_at < 1
    fake_tracker.released.set()
    assert thread.finish() == "too slow: 15 records were dropped"
    logged = [arguments[0]["step"] for method, *arguments in fake_tracker.calls if method == "log"]
    assert logged == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("body", ["raise OSError('no network')", "import time; time.sleep(60)"])
def test_wandb_that_fails_or_hangs_does_not_block_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, body: str
) -> None:
    """With a package named wandb on the path before the real one, whose init fails or hangs."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        f"class Settings:\n    def __init__(self, **k): pass\ndef init(**k):\n    {body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    request.addfinalizer(lambda: sys.modules.pop("wandb", None))
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    config = dataclasses.replace(config, wandb="online")
    (thread,) = start_trackers(config, "abc123", 0, warn=print)
    started_at = time.monotonic()
    for step in range(20_000):  # more than its queue holds
        thread.log({"step": step})
    failure = thread.finish()
    assert time.monotonic() - started_at < 5
    assert failure is not None and ("no network" in failure or "still busy" in failure)


def test_offline_wandb_gets_every_row(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 60)
    config = dataclasses.replace(config, wandb="offline")
    (thread,) = start_trackers(config, "abc123", 0, warn=print)
    assert thread.name == "wandb"
    for step in range(5):
        thread.log({"step": step, "train-loss": 1.0})
    assert thread.finish() is None
    (folder,) = (Path(config.output_dir) / "wandb").glob("offline-run-*-abc123")
    assert list(folder.glob("*.wandb"))


@pytest.mark.parametrize(
    ("setting", "environment", "netrc", "enabled"),
    [
        ("disabled", {"WANDB_API_KEY": "x"}, "", False),
        ("offline", {}, "", True),
        ("online", {}, "", True),
        ("auto", {}, "", False),
        ("auto", {"WANDB_API_KEY": "x"}, "", True),
        ("auto", {}, "machine api.wandb.ai\n  login user\n  password x\n", True),
        ("auto", {}, "machine example.com\n", False),
    ],
)
def test_wandb_auto_means_online_when_logged_in(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: Any,
    environment: dict[str, str],
    netrc: str,
    enabled: bool,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text(netrc)
    assert WandbTracker.is_enabled(dataclasses.replace(config, wandb=setting)) == enabled


def read_events(config: Config) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar by tag, as TensorBoard reads them."""
    accumulator: Any = EventAccumulator(str(Path(config.output_dir) / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_back_every_number(config: Config) -> None:
    config = dataclasses.replace(config, tensorboard=True)
    logger = make_logger(config)
    logger.log_memory(0, [10**9])
    for step in (1, 2):
        logger.step_done(step)
        logger.log_step(step, 4.5 - step, 0.25, float("nan"))
    logger.log_evaluation(2, {"val-loss": 3.0, "val-perplexity": 20.0})
    logger.close()
    rows = read_metrics(Path(config.output_dir))
    expected: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                expected.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    events = read_events(config)
    assert events == expected
    assert events["train-loss"] == [(1, 3.5), (2, 2.5)] and events["val-loss"] == [(2, 3.0)]
    assert "grad-norm" not in events and "peak-bytes" not in events  # not finite; a list


def test_a_resumed_run_replaces_the_tensorboard_events_after_its_checkpoint(config: Config) -> None:
    config = dataclasses.replace(config, tensorboard=True)
    for first_step, last_step, loss in ((0, 5, 4.0), (3, 6, 2.0), (0, 1, 1.0)):  # a run, its resume, a fresh run
        logger = make_logger(config, first_step)
        for step in range(first_step + 1, last_step + 1):
            logger.log_step(step, loss, 1e-3, 0.5)
        logger.close()
        if last_step == 6:
            assert read_events(config)["train-loss"] == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert read_events(config)["train-loss"] == [(1, 1.0)]


def test_tensorboard_that_is_not_installed_is_one_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find_spec(name, *rest)
    )
    config = dataclasses.replace(config, tensorboard=True)
    rows = run_logger(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5]
    assert [line for line in capsys.readouterr().out.splitlines() if "tensorboard" in line] == [
        "warning: tensorboard: the package tensorboard is not installed; the run continues without it; "
        "to use it, run `pip install tensorboard`"
    ]


def test_a_config_without_trackers_starts_none(config: Config) -> None:
    assert start_trackers(config, "abc123", 0, warn=print) == []
    assert set(TRACKERS) == {"wandb", "tensorboard"}


EXIT_WITH_BUSY_TRACKER = """
import atexit, sys, time
from distgpt.config.loader import load_config
from distgpt.errors import exit_process
from distgpt.training import trackers

class HangingTracker:
    package = "json"
    def start(self, *arguments):
        atexit.register(time.sleep, 60)  # as wandb waits for its own process
        time.sleep(60)

trackers.CLOSE_SECONDS = 0.5
thread = trackers.TrackerThread("hanging", HangingTracker(), load_config(sys.argv[1]), "abc123", 0)
print(thread.finish())
exit_process(75)
"""


def test_a_busy_tracker_does_not_delay_the_end_of_the_process(config_file: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_BUSY_TRACKER, str(config_file)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (75, "still busy after 0.5 s\n"), completed.stderr
