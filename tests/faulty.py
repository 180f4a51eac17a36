"""Run a command of distgpt with a fault in it. The product knows nothing of faults, so that they cost it nothing.

    DISTGPT_FAULT=POINT:ACTION[:RANK[:WHEN]] python -m tests.faulty distgpt.train CONFIG ...     (or under torchrun)

POINT is a function of the package, `step.train_step` or `data.ShuffledReader.at`, or `io`: the calls by which files and
folders below `checkpoints` are made, written out, renamed and deleted. ACTION is one of ACTIONS. RANK is 0 if left out,
or `all`. WHEN is the how-manieth call it is in this process (1 if left out), or an argument's value, as in `step=7`.
Only the first start of a torchrun has the fault; with `:always` at the end, its restarts have it too.
"""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IO_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(*_: object) -> None:
    time.sleep(10**6)


def fail(error: Callable[[], BaseException], *_: object) -> None:
    raise error()


def flip(running: Any, *_: object) -> None:
    """Change one bit of the first weight that a running model holds."""
    with torch.no_grad():
        next(running.module.parameters()).view(-1)[:1].view(torch.int32).bitwise_xor_(1)


ACTIONS: dict[str, Callable[..., None]] = {
    "kill": kill_self,
    "stop": stop_self,
    "sleep": sleep,
    "raise": functools.partial(fail, lambda: RuntimeError("injected")),
    "oom": functools.partial(fail, lambda: MemoryError("injected")),
    "enospc": functools.partial(fail, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")),
    "eio": functools.partial(fail, lambda: OSError(errno.EIO, os.strerror(errno.EIO), "injected")),
    "flip": flip,
    "term": lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    "nan": lambda *_: None,
    "torn": kill_self,
}
"""What happens: the others before the call, `nan` to its result; `torn` kills when half a file has reached the disk."""


class Fault:
    """One fault of this process."""

    def __init__(self, text: str) -> None:
        parts = text.removesuffix(":always").split(":")
        self.point, self.action, rank, when = [*parts, *["0", "1"][len(parts) - 2 :]][:4]
        self.always = text.endswith(":always")
        self.mine = rank in ("all", os.environ.get("RANK", "0"))
        self.argument, _, value = when.rpartition("=")
        self.value = int(value)
        self.calls = 0

    def due(self, arguments: dict[str, Any] | None = None) -> bool:
        """Count a call; whether it is the one."""
        self.calls += 1
        return (arguments or {}).get(self.argument) == self.value if self.argument else self.calls == self.value

    def install(self) -> None:
        """Put the fault where it belongs."""
        if not self.mine or (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not self.always):
            return
        if self.point == "io":
            self.watch_io()
            return
        room, *owners, name = self.point.split(".")
        owner: Any = importlib.import_module(f"distgpt.{room}")
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the fault in it."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            due = self.due(dict(signature.bind(*args, **kwargs).arguments))
            if due:
                ACTIONS[self.action](*args)
            result = function(*args, **kwargs)
            return result * float("nan") if due and self.action == "nan" else result

        return faulty

    def watch_io(self) -> None:
        """Let the fault happen at a call that changes what is below a folder `checkpoints`."""
        flush = os.fsync

        def before_event(event: str, args: tuple[Any, ...]) -> None:
            changes = event in IO_EVENTS and not (event == "open" and is_reading(args))
            if changes and below_checkpoints(args) and self.due():
                ACTIONS[self.action]()

        def before_flush(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if "checkpoints" in path.parts and self.due():
                if self.action == "torn" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                ACTIONS[self.action]()
            flush(descriptor)

        sys.addaudithook(before_event)
        os.fsync = before_flush  # type: ignore[assignment]


def is_reading(args: tuple[Any, ...]) -> bool:
    """Whether the arguments of an `open` event change nothing."""
    return not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def below_checkpoints(args: tuple[Any, ...]) -> bool:
    """Whether an event's first argument is a path at or below a folder `checkpoints`, or relative to a folder's
    descriptor, as the deletion of a whole folder names them.
    """
    if not isinstance(args[0], str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(args[0]))
    descriptor = args[-1] if len(args) > 1 else None
    deleting = not path.is_absolute() and isinstance(descriptor, int) and descriptor >= 0
    return "checkpoints" in path.parts or deleting


def main() -> None:
    """Install the fault, if there is one, and become the command."""
    if text := os.environ.get("DISTGPT_FAULT"):
        Fault(text).install()
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
