"""Signals that ask a run to stop, and the launcher's death before there is a watchdog. Imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")

STOPPED, PEER_LOST = 75, 76
"""Exit codes: stopped with everything saved; another process of the run was lost or hung. The same command resumes."""

REPEAT_SECONDS = 0.5
"""torchrun forwards to its ranks what a terminal has already sent them: within this time it is the same signal."""

POLL_SECONDS = 0.5
"""Interval for polling the launcher."""

received_signals: list[tuple[float, str]] = []
"""Signals received so far: the time (monotonic) and name of each."""

watchdog_started = threading.Event()
"""Set once a Watchdog watches the launcher."""


def install_signal_handlers() -> None:
    """Record signals from now on instead of being ended by them; a second one ends this process at once.

    Call it on the main thread, before torch is imported. A thread reads the signals as the system delivers them:
    Python's own handlers would wait until the main thread returns from whatever it computes.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    for name in SIGNALS:
        signal.signal(getattr(signal, name), lambda *_: None)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    threading.Thread(target=_record_signals, args=(read_fd,), name="signals", daemon=True).start()
    if "RANK" in os.environ:  # torchrun started this process, and without it ranks wait for each other forever
        threading.Thread(target=_watch_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def eprint(text: str) -> None:
    """Print a line on stderr in one write, so that lines of several ranks do not mix. A failure is ignored."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _record_signals(read_fd: int) -> None:
    """Append each signal to `received_signals` as it arrives."""
    while raw := os.read(read_fd, 1):
        name, now = signal.Signals(raw[0]).name, time.monotonic()
        if name not in SIGNALS or (received_signals and now - received_signals[0][0] < REPEAT_SECONDS):
            continue
        received_signals.append((now, name))
        if len(received_signals) > 1:
            eprint(
                f"distgpt: second signal ({name}), exiting at once; the same command resumes from the last checkpoint"
            )
            os._exit(128 + raw[0])


def _watch_launcher(launcher_pid: int) -> None:
    """End this process if its launcher exits before a Watchdog watches it."""
    while not watchdog_started.wait(POLL_SECONDS):
        if os.getppid() != launcher_pid:
            eprint(f"distgpt: error: the launcher (process {launcher_pid}) is gone; run the same command again")
            os._exit(PEER_LOST)
