"""Run a command of distgpt with an injected fault. The package contains no code for this, so that it costs nothing.

    DISTGPT_FAULT=POINT:ACTION[:RANK[:WHEN]] python -m tests.faulty distgpt.train CONFIG ...     (or under torchrun)

POINT is a function of the package by its path below `distgpt`, such as `training.step.train_step` or
`data.dataloader.TrainLoader.micro_batches`. Or it is `io`: all calls that create, flush, rename or delete files and
folders below a folder `checkpoints`. ACTION is a key of ACTIONS. RANK is a number or `all`, by default 0. WHEN is the
number of the call in this process, by default 1, or the value of an argument, as in `step=7`.
The fault is injected only into the processes that torchrun starts first; with `:always` at the end, also into those
that it starts after a failure.
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
from torch import nn

IO_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(*_: object) -> None:
    time.sleep(10**6)


def fail(error: Callable[[], BaseException], *_: object) -> None:
    raise error()


def flip_bit(model: nn.Module, *_: object) -> None:
    """Change one bit of the first weight of the model that the function is called with."""
    with torch.no_grad():
        next(model.parameters()).view(-1)[:1].view(torch.int32).bitwise_xor_(1)


ACTIONS: dict[str, Callable[..., None]] = {
    "kill": kill_self,
    "stop": stop_self,
    "sleep": sleep,
    "raise": functools.partial(fail, lambda: RuntimeError("injected")),
    "oom": functools.partial(fail, lambda: MemoryError("injected")),
    "enospc": functools.partial(fail, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")),
    "eio": functools.partial(fail, lambda: OSError(errno.EIO, os.strerror(errno.EIO), "injected")),
    "flip": flip_bit,
    "term": lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    "nan": lambda *_: None,
    "torn": kill_self,
}
"""What happens before the call, with its arguments. `nan` multiplies the result by NaN instead; `torn` first cuts the
file that is being flushed to half its length."""


class Fault:
    """The fault of this process, from the text in DISTGPT_FAULT."""

    def __init__(self, text: str) -> None:
        parts = text.removesuffix(":always").split(":")
        self.point, self.action, rank, when = [*parts, *["0", "1"][len(parts) - 2 :]][:4]
        self.on_this_rank = rank in ("all", os.environ.get("RANK", "0"))
        self.after_restarts = text.endswith(":always")
        self.argument, _, value = when.rpartition("=")
        self.value = int(value)
        self.num_calls = 0

    def is_due(self, arguments: dict[str, Any] | None = None) -> bool:
        """Count a call and return whether it is the faulty one."""
        self.num_calls += 1
        if self.argument:
            return (arguments or {}).get(self.argument) == self.value
        return self.num_calls == self.value

    def install(self) -> None:
        """Replace the function, or watch I/O, if this process is to have the fault."""
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not self.on_this_rank or (is_restart and not self.after_restarts):
            return
        if self.point == "io":
            self.watch_io()
            return
        *path, name = self.point.split(".")
        owner: Any = importlib.import_module("distgpt")
        for part in path:
            is_package = hasattr(owner, "__path__")
            owner = importlib.import_module(f"{owner.__name__}.{part}") if is_package else getattr(owner, part)
        setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the fault in it."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            is_due = self.is_due(dict(signature.bind(*args, **kwargs).arguments))
            if is_due:
                ACTIONS[self.action](*args)
            result = function(*args, **kwargs)
            return result * float("nan") if is_due and self.action == "nan" else result

        return faulty

    def watch_io(self) -> None:
        """Inject the fault into one of the calls that change what is below a folder `checkpoints`."""
        fsync = os.fsync

        def before_event(event: str, args: tuple[Any, ...]) -> None:
            is_change = event in IO_EVENTS and not (event == "open" and opens_for_reading(args))
            if is_change and is_below_checkpoints(args) and self.is_due():
                ACTIONS[self.action]()

        def faulty_fsync(fd: int) -> None:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if "checkpoints" in path.parts and self.is_due():
                if self.action == "torn" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                ACTIONS[self.action]()
            fsync(fd)

        sys.addaudithook(before_event)
        os.fsync = faulty_fsync  # type: ignore[assignment]


def opens_for_reading(args: tuple[Any, ...]) -> bool:
    """Whether the arguments of an `open` event change nothing on disk."""
    return not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def is_below_checkpoints(args: tuple[Any, ...]) -> bool:
    """Whether an event's first argument is a path at or below a folder `checkpoints`.

    A path relative to a folder's descriptor counts too: `shutil.rmtree` names what it deletes in this way.
    """
    if not isinstance(args[0], str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(args[0]))
    dir_fd = args[-1] if len(args) > 1 else None
    is_relative_to_fd = not path.is_absolute() and isinstance(dir_fd, int) and dir_fd >= 0
    return "checkpoints" in path.parts or is_relative_to_fd


def main() -> None:
    """Install the fault, if there is one, and run the command."""
    if text := os.environ.get("DISTGPT_FAULT"):
        Fault(text).install()
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
