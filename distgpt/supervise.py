"""What may end a run: signals, the time limit, a lost peer, a hang.

Imports no torch, which takes seconds to load: signals are heard before it is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from distgpt.checkpoint import on_disk
from distgpt.errors import diagnose, leave, run_command
from distgpt.lock import Lock, read_status

if TYPE_CHECKING:
    from distgpt.world import World

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
REASONS = ("", "time limit", *SIGNALS)
"""What ranks vote on, by number: the largest wins."""

STOPPED, PEER_LOST = 75, 76
"""Exit codes: stopped with everything saved; another process of the run was lost or hung. The same command goes on."""

ECHO_SECONDS = 0.5
"""torchrun repeats to its workers what a terminal has sent to all of them: that is not a second signal."""

BEAT_SECONDS = 0.5
LOST_SECONDS = 2.0
"""Without a sign of life, a rank counts as lost when something else says so too, such as a failed collective."""

SILENT_SECONDS = 4.0
"""The same when all that says so is a signal, which may have come from the user."""

FAILED, LEAVING = "failed:", "leaving"
"""What a rank that ends tells the others: because of an error of its own, or because of another rank."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """All ranks have agreed to end the run here; the text says why."""

    everywhere = True


supervised = threading.Event()
"""Set once a Supervisor watches."""

heard: list[tuple[float, str]] = []
"""Signals so far: when, and which."""


def listen() -> None:
    """Hear signals from now on instead of dying of them; a second one ends this process at once. Main thread only.

    A thread reads them as the operating system delivers them, since Python's own handlers would wait until the main
    thread comes back from whatever it computes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for name in SIGNALS:
        signal.signal(getattr(signal, name), lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=hear, args=(reader,), name="signals", daemon=True).start()
    if "RANK" in os.environ:  # a torchrun has started us: without it, ranks wait for each other in vain
        threading.Thread(target=await_supervisor, args=(os.getppid(),), name="launcher", daemon=True).start()


def await_supervisor(launcher: int) -> None:
    """End this process if its launcher is gone before there is a Supervisor to notice."""
    while not supervised.wait(BEAT_SECONDS):
        if os.getppid() != launcher:
            say(f"distgpt: error: the launcher (process {launcher}) is gone; run the same command again")
            os._exit(PEER_LOST)


def hear(reader: int) -> None:
    """Note signals as they come."""
    while raw := os.read(reader, 1):
        name, now = signal.Signals(raw[0]).name, time.monotonic()
        if name not in SIGNALS or (heard and now - heard[0][0] < ECHO_SECONDS):
            continue
        heard.append((now, name))
        if len(heard) > 1:
            say(f"distgpt: {name} again: leaving at once; the run goes on from its last checkpoint")
            os._exit(128 + raw[0])


def say(text: str) -> None:
    """Print a line on stderr, wherever it goes."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def summary(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Supervisor:
    """Watches over a run on this rank, from the lock to the last line. Every rank makes one and calls alike."""

    def __init__(self, output_dir: Path, max_minutes: float | None, hang_seconds: float, world: World) -> None:
        self.output_dir, self.world, self.hang_seconds = output_dir, world, hang_seconds
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.lock: Lock | None = None
        self.step = 0
        self.began = False
        """Whether steps are being made. Before, nothing can be lost: a rank that is told to stop leaves at once."""
        self.progressed_at = time.monotonic()
        self.vote = world.open_vote()
        self.peers = world.open_peers()
        self.closed = threading.Event()
        self.launcher = os.getppid()
        self.beats = 0
        threading.Thread(target=self.watch, name="supervisor", daemon=True).start()
        supervised.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop watching and give the lock back. After an error, find out whether it is another rank's, or tell ours."""
        if error is not None and self.peers is not None and not getattr(error, "everywhere", False):
            try:
                if lost := self.lost_peers(LOST_SECONDS):
                    self.leave(" and ".join(lost))
                self.peers.tell(f"{FAILED} {summary(error)}")
            except RuntimeError as unreachable:
                self.leave(f"the launcher's store does not answer ({summary(unreachable)})", tell=False)
        if error is not None:
            code, reason = diagnose(error) or (1, summary(error))
            self.status("failed", reason, code)
        elif self.peers is not None:
            self.peers.tell(LEAVING)  # it may take another rank longer
        self.closed.set()
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def take_lock(self) -> bool:
        """Own the output folder until this process ends; whether another run had to end first. Rank 0 calls."""
        self.lock = Lock(self.output_dir, self.world.restarts)
        return self.lock.waited

    def begin(self, step: int) -> None:
        """Note that everything is ready and that steps follow, after `step`. Every rank calls."""
        self.began = True
        self.obey(step)

    def progress(self) -> None:
        """Note that the run is getting on."""
        self.progressed_at = time.monotonic()

    def obey(self, step: int) -> None:
        """Raise Stopped, on all ranks at the same call, if any of them has been told to stop. Every rank calls.

        `step` is the last that has been made.
        """
        self.step = step
        if self.lock is not None:
            self.lock.at_step(step + 1)
        self.progress()
        if reason := REASONS[self.vote(REASONS.index(self.told_to_stop()))]:
            raise Stopped(reason)

    def told_to_stop(self) -> str:
        """The signal that this rank has heard, or that its time is up; else nothing."""
        if heard:
            return heard[0][1]
        return "time limit" if time.monotonic() > self.deadline else ""

    def status(self, state: str, reason: str = "", code: int | None = None) -> None:
        """Write `status.json`, on the rank that holds the lock."""
        if self.lock is not None:
            self.lock.status(state, self.step, reason, code)

    def stopped(self, reason: str) -> int:
        """Report the end of a run that was told to stop, everything saved; returns its exit code.

        Under torchrun that is 0, since it would start again what ends with anything else; `status.json` holds 75.
        """
        self.status("stopped", reason, STOPPED)
        if self.world.is_first:
            say(f"distgpt: stopped after step {self.step} ({reason}), everything saved; the same command goes on")
        return 0 if self.world.grouped else STOPPED

    def stop_before_it_began(self, reason: str) -> NoReturn:
        """End this process, and through the board all others, where no rank has anything to save."""
        if self.peers is not None:
            self.peers.stop(reason)
            self.peers.tell(LEAVING)
        os._exit(self.stopped(reason))

    def beat(self) -> None:
        """Give a sign of life; leave if torchrun has not."""
        if self.world.grouped and os.getppid() != self.launcher:
            self.leave(f"the launcher (process {self.launcher}) is gone", tell=False)
        if self.peers is not None:
            self.beats += 1
            self.peers.tell(str(self.beats))

    def lost_peers(self, silence: float) -> list[str]:
        """Ranks that have failed or give no sign of life for so many seconds; looks for a little longer than that."""
        until = time.monotonic() + silence + 2 * BEAT_SECONDS
        while self.peers is not None and time.monotonic() < until:
            self.beat()
            told = self.peers.read()
            if failed := [f"rank {rank} {text}" for rank, (text, _) in told.items() if text.startswith(FAILED)]:
                return failed
            silent = [rank for rank, (text, seconds) in told.items() if seconds > silence and text != LEAVING]
            if silent:
                return [f"rank {rank} is lost: it gives no sign of life" for rank in silent]
            time.sleep(BEAT_SECONDS / 2)
        return []

    def watch(self) -> None:
        """Give signs of life, and look for those of the others and of the launcher, until closed."""
        while not self.wait():
            try:
                self.beat()
                if heard and (lost := self.lost_peers(SILENT_SECONDS)):  # torchrun stops the others when one has died
                    self.leave(" and ".join(lost))
                if not self.began and (reason := self.told_to_stop()):
                    self.stop_before_it_began(reason)
                if self.peers is not None and (reason := self.peers.stopping()):
                    self.stop_before_it_began(reason)
                if time.monotonic() - self.progressed_at > self.hang_seconds:
                    self.report_hang()
            except RuntimeError as error:  # of the store, which the launcher keeps
                if not self.closed.is_set():
                    self.leave(f"the launcher's store does not answer ({summary(error)})", tell=False)

    def wait(self) -> bool:
        """Wait for the next beat; whether the run has been closed. While this process was stopped, it did not hang."""
        slept_at = time.monotonic()
        closed = self.closed.wait(BEAT_SECONDS)
        overslept = time.monotonic() - slept_at - BEAT_SECONDS
        if overslept > LOST_SECONDS:  # as after Ctrl-Z and fg
            self.progressed_at += overslept
        return closed

    def report_hang(self) -> NoReturn:
        """Write what every thread is doing, find who is stuck, and leave."""
        path = self.output_dir / f"stacks-rank-{self.world.rank}.txt"
        with contextlib.suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        place = f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
        where = f"{self.output_dir}/stacks-rank-*.txt tell what each rank was doing"
        found = self.lost_peers(LOST_SECONDS)
        self.leave("; ".join([f"no progress for {self.hang_seconds:g} s, {place}", *found, where]))

    def leave(self, reason: str, tell: bool = True) -> NoReturn:
        """End this process because the run cannot go on around it; `tell` the others, if the launcher is there."""
        if self.peers is not None and tell:
            self.peers.tell(LEAVING)
        self.status("failed", reason, PEER_LOST)
        newest = max((step for step, _ in on_disk(self.output_dir)), default=0)
        saved = f"checkpoint of step {newest}" if newest else "beginning"
        say(
            f"distgpt: error: rank {self.world.rank}, step {self.step}: {reason}; "
            f"the same command goes on from the {saved}"
        )
        os._exit(PEER_LOST)


def main(arguments: Sequence[str]) -> int:
    """For run.sh: the exit code of the ranks that process LAUNCHER started, else CODE. OUTPUT_DIR LAUNCHER CODE."""
    output_dir, launcher, code = arguments
    status = read_status(Path(output_dir))
    return int(code if status.get("launcher") != int(launcher) or status.get("code") is None else status["code"])


if __name__ == "__main__":
    leave(run_command(main))
