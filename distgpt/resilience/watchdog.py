"""The watchdog of a run: stop requests, the time limit, lost ranks, hangs, and how the run ended. Imports no torch."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from distgpt.checkpoint.store import list_checkpoints
from distgpt.errors import explain_error
from distgpt.resilience.run_lock import RunLock
from distgpt.resilience.signals import PEER_LOST, SIGNALS, STOPPED, eprint, received_signals, watchdog_started

if TYPE_CHECKING:
    from distgpt.distributed.context import DistributedContext

__all__ = ["PEER_LOST", "STOPPED", "StopRequested", "Watchdog"]

REASONS = ("", "time limit", *SIGNALS)
"""Why a run stops. Ranks exchange the index, and the largest wins."""

BEAT_SECONDS = 0.5
"""Time between two heartbeats of a rank."""

LOST_BEATS = 8
"""Heartbeats that a rank may miss before it counts as lost. They are watched only when something else is wrong: an
error on this rank, a signal (torchrun sends one to all ranks when one has died), or a hang."""

ABORT_SECONDS = 20
"""After this time an aborting process is ended even if it is still writing its status."""

FAILED, LEAVING = "failed:", "leaving"
"""Published instead of further heartbeats by a rank that exits: with an error of its own, or for another reason."""


class StopRequested(Exception):  # noqa: N818 - it is not an error
    """All ranks have agreed to stop after the same step. The text is the reason."""

    on_all_ranks = True


class Watchdog:
    """Watches a run on this rank, from a thread, inside its `with` block. Every rank opens one.

    The thread publishes heartbeats and ends this process where the run cannot continue: torchrun or a rank is lost, or
    nothing makes progress.

    A stop request (a signal or the time limit) takes effect in one of two ways. Before training begins there is nothing
    to save: all ranks exit, told through the store. During training, `raise_if_stop_requested` raises StopRequested on
    all ranks after the same step, whose state can be saved.
    """

    def __init__(
        self, output_dir: Path, max_minutes: float | None, hang_seconds: float, context: DistributedContext
    ) -> None:
        from distgpt.resilience.heartbeat import AsyncMax, HeartbeatStore  # imports torch

        self.output_dir, self.hang_seconds, self.context = output_dir, hang_seconds, context
        self.step = 0
        """Updates made so far."""
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self._lock: RunLock | None = None
        self._training = False
        self._async_max = AsyncMax(context.world_size)
        self._heartbeats = HeartbeatStore(context)
        self._num_beats = 0
        self._last_progress = 0
        """Heartbeats at the last progress. Not a time: a process that was suspended (Ctrl-Z) has not hung."""
        self._farewell = ""
        """Once set, published instead of heartbeats."""
        self._closed = threading.Event()
        self._launcher_pid = os.getppid()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        watchdog_started.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop watching and release the lock.

        An error that only this rank has is published for the others to report, unless a lost rank is its cause.
        """
        if error is None or getattr(error, "on_all_ranks", False):
            self._farewell = LEAVING  # other ranks may take longer
            with contextlib.suppress(RuntimeError):
                self._beat()
        else:
            try:
                if lost := self._lost_ranks():
                    self._abort(" and ".join(lost))
                self._farewell = f"{FAILED} {_summary(error)}"
                self._beat()
            except RuntimeError as store_error:
                self._abort_without_store(store_error)
        if error is not None:
            code, reason = explain_error(error) or (1, _summary(error))
            self.write_status("failed", reason, code)
        self._closed.set()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def acquire_lock(self) -> bool:
        """Lock the output folder for this run. Returns whether another run had to exit first. Rank 0 calls."""
        self._lock = RunLock(self.output_dir, self.context.restart_count)
        return self._lock.waited

    def start_training(self, step: int) -> None:
        """Note that the set-up is complete and that training starts after `step` updates. All ranks must call."""
        self._training = True
        self.raise_if_stop_requested(step)

    def progress(self) -> None:
        """Note that the run makes progress, so that it does not count as hung."""
        self._last_progress = self._num_beats

    def raise_if_stop_requested(self, step: int) -> None:
        """Raise StopRequested if any rank was asked to stop: on all ranks, at the same call. All ranks must call.

        `step` is the number of updates made so far. Counts as progress.
        """
        self.step = step
        if self._lock is not None:
            self._lock.record_step(step + 1)
        self.progress()
        if reason := REASONS[self._async_max(REASONS.index(self._stop_reason()))]:
            raise StopRequested(reason)

    def write_status(self, state: str, reason: str = "", code: int | None = None) -> None:
        """Write `status.json`, on the rank that holds the lock."""
        if self._lock is not None:
            self._lock.write_status(state, self.step, reason, code)

    def report_stopped(self, reason: str) -> int:
        """Report that the run stopped with everything saved. Returns the exit code.

        Under torchrun the code is 0, since torchrun restarts ranks that exit with any other; `status.json` has 75.
        """
        self.write_status("stopped", reason, STOPPED)
        if self.context.is_rank0:
            eprint(f"distgpt: stopped after step {self.step} ({reason}), everything saved; the same command resumes")
        return 0 if self.context.is_distributed else STOPPED

    def _stop_reason(self) -> str:
        """Why this rank was asked to stop; empty if it was not."""
        if received_signals:
            return received_signals[0][1]
        return "time limit" if time.monotonic() > self._deadline else ""

    def _watch(self) -> None:
        """Publish heartbeats, and watch the launcher, the other ranks and the progress, until closed."""
        while not self._closed.wait(BEAT_SECONDS):
            try:
                self._beat()
                if received_signals and (lost := self._lost_ranks()):
                    self._abort(" and ".join(lost))
                if not self._training and (reason := self._stop_reason()):
                    self._heartbeats.request_stop(reason)
                if reason := self._heartbeats.stop_requested():
                    self._farewell = LEAVING
                    self._beat()
                    os._exit(self.report_stopped(reason))
                if (self._num_beats - self._last_progress) * BEAT_SECONDS > self.hang_seconds:
                    self._abort_hang()
            except RuntimeError as error:
                if not self._closed.is_set():
                    self._abort_without_store(error)
            except OSError as error:  # a file system that fails while a hang is reported
                self._abort(_summary(error))

    def _beat(self) -> None:
        """Publish a heartbeat. Ends this process if the launcher is gone."""
        if self.context.is_distributed and os.getppid() != self._launcher_pid:
            self._abort(f"the launcher (process {self._launcher_pid}) is gone")
        self._num_beats += 1
        self._heartbeats.publish(self._farewell or str(self._num_beats))

    def _lost_ranks(self) -> list[str]:
        """Watch the other ranks for `LOST_BEATS`: which have failed or, if none has, which sent no heartbeat."""
        texts = first = self._heartbeats.read()
        for _ in range(LOST_BEATS if first else 0):
            self._beat()
            time.sleep(BEAT_SECONDS)
            texts = self._heartbeats.read()
            if failed := [f"rank {rank} {text}" for rank, text in texts.items() if text.startswith(FAILED)]:
                return failed
        silent = [rank for rank, text in texts.items() if text == first[rank] != LEAVING]
        return [f"rank {rank} is lost: no heartbeat for {LOST_BEATS * BEAT_SECONDS:g} s" for rank in silent]

    def _abort_hang(self) -> NoReturn:
        """Write the stack of every thread, find lost ranks, and end this process."""
        faulthandler.dump_traceback_later(ABORT_SECONDS, exit=True)
        path = self.output_dir / f"stacks-rank-{self.context.rank}.txt"
        with contextlib.suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        place = f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
        stacks = f"{self.output_dir}/stacks-rank-*.txt show what each rank was doing"
        hang = f"no progress for {self.hang_seconds:g} s, {place}"
        self._abort("; ".join([hang, *self._lost_ranks(), stacks]))

    def _abort_without_store(self, error: RuntimeError) -> NoReturn:
        """End this process because the store, which torchrun hosts, fails."""
        self._abort(f"the launcher's store does not answer ({_summary(error)})")

    def _abort(self, reason: str) -> NoReturn:
        """End this process because the run cannot continue, though this rank could."""
        with contextlib.suppress(RuntimeError):
            self._heartbeats.publish(LEAVING)
        # The file system may be what hangs: whatever happens below, this process ends.
        faulthandler.dump_traceback_later(ABORT_SECONDS, exit=True)
        self.write_status("failed", reason, PEER_LOST)
        saved_step = 0
        with contextlib.suppress(OSError):
            saved_step = max((step for step, _ in list_checkpoints(self.output_dir)), default=0)
        start = f"the checkpoint of step {saved_step}" if saved_step else "the beginning"
        where = f"rank {self.context.rank}, step {self.step}"
        eprint(f"distgpt: error: {where}: {reason}; the same command resumes from {start}")
        os._exit(PEER_LOST)


def _summary(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
