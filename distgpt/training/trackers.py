"""Experiment trackers: Weights & Biases and TensorBoard, each on a thread of its own that cannot disturb training."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from distgpt.config.schema import Config
from distgpt.errors import TRACKER_THREAD

QUEUE_SIZE = 10_000
"""Calls that wait for a slow tracker; further ones are dropped."""

CLOSE_SECONDS = 15.0
"""How long the end of a run waits for each tracker."""


class Tracker(Protocol):
    """What a tracker implements. Every call comes from the tracker's own thread, so it may block or raise."""

    package: ClassVar[str]
    """The package that it imports, in `start`."""

    @staticmethod
    def is_enabled(config: Config) -> bool:
        """Whether the config asks for this tracker."""
        ...

    def start(self, config: Config, run_id: str, first_step: int) -> None:
        """Begin a run, or continue the run of this id after `first_step`, the number of steps already done."""
        ...

    def log(self, row: dict[str, Any]) -> None:
        """Record one row of metrics.jsonl: `step`, and named numbers, lists of numbers or None."""
        ...

    def save_file(self, path: Path) -> None:
        """Keep a copy of a file with the run."""
        ...

    def finish(self) -> None:
        """Send everything that is left and end the run."""
        ...


class WandbTracker:
    """Weights & Biases, in the mode that `wandb` in the config says."""

    package: ClassVar[str] = "wandb"

    @staticmethod
    def is_enabled(config: Config) -> bool:
        return _wandb_mode(config) != "disabled"

    def start(self, config: Config, run_id: str, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="distgpt",
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow",
            mode=cast(Any, _wandb_mode(config)),
            dir=config.output_dir,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True),
        )

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=row["step"])

    def save_file(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in `tensorboard/` of output_dir."""

    package: ClassVar[str] = "tensorboard"

    @staticmethod
    def is_enabled(config: Config) -> bool:
        return config.tensorboard

    def start(self, config: Config, run_id: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events from this step on, which an earlier process may have written, are superseded by this one's.
        purge_step = first_step + 1 if first_step > 0 else 0
        self._writer: Any = SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=purge_step)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # a run that is killed keeps its events

    def save_file(self, path: Path) -> None:
        """TensorBoard keeps no files: the run's own folder has them."""

    def finish(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}


class TrackerThread:
    """Runs one tracker on a thread of its own.

    No method raises, and only `finish` waits. Calls are queued, and dropped while the queue is full or once the tracker
    has raised.
    """

    def __init__(self, name: str, tracker: Tracker, config: Config, run_id: str, first_step: int) -> None:
        self.name = name
        self._tracker, self._start_arguments = tracker, (config, run_id, first_step)
        self._failure: str | None = None
        self._num_dropped = 0
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, name=TRACKER_THREAD + name, daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Queue a row of metrics.jsonl."""
        self._put(lambda: self._tracker.log(row))

    def save_file(self, path: Path) -> None:
        """Queue a file."""
        self._put(lambda: self._tracker.save_file(path))

    def finish(self) -> str | None:
        """End the tracker, waiting at most CLOSE_SECONDS; returns what went wrong, if anything did."""
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._calls.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            return self._failure
        if self._thread.is_alive():
            return f"still busy after {CLOSE_SECONDS:g} s"
        return f"too slow: {self._num_dropped:,} records were dropped" if self._num_dropped else None

    def _put(self, call: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._num_dropped += 1

    def _work(self) -> None:
        """The thread: make the queued calls until None arrives."""
        try:
            self._tracker.start(*self._start_arguments)
            while (call := self._calls.get()) is not None:
                call()
            self._tracker.finish()
        except BaseException as error:  # a missing package or network raises anything, SystemExit included
            lines = str(error).strip().splitlines()
            self._failure = f"stopped ({type(error).__name__}: {lines[0] if lines else ''})"


def start_trackers(config: Config, run_id: str, first_step: int, warn: Callable[[str], None]) -> list[TrackerThread]:
    """Start the trackers that the config asks for, where their packages are installed."""
    threads = []
    for name, tracker_class in TRACKERS.items():
        if not tracker_class.is_enabled(config):
            continue
        if importlib.util.find_spec(tracker_class.package) is None:
            warn(
                f"warning: {name}: the package {tracker_class.package} is not installed; the run continues without it; "
                f"to use it, run `pip install {tracker_class.package}`"
            )
            continue
        threads.append(TrackerThread(name, tracker_class(), config, run_id, first_step))
    return threads


def _wandb_mode(config: Config) -> str:
    """online, offline or disabled."""
    if config.wandb == "auto":
        return "online" if _wandb_logged_in() else "disabled"
    return config.wandb


def _wandb_logged_in() -> bool:
    """Whether credentials for Weights & Biases are found, without importing it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    for name in ("~/.netrc", "~/_netrc"):
        try:
            if "api.wandb.ai" in Path(name).expanduser().read_text(encoding="utf-8"):
                return True
        except (OSError, RuntimeError, UnicodeDecodeError):  # no such file, no home directory, not text
            pass
    return False
