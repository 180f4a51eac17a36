"""Errors that a user can cause or fix, their exit codes, and how commands report them: one line per problem.

Exit codes: 0 done, 1 a bug in distgpt, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 environment, 93 crash loop,
130 interrupted. `resilience.signals` adds 75 (stopped, everything saved), 76 (another process was lost) and 128 + n
(a second signal n).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

TRACKER_THREAD = "tracker-"
"""Prefix of the names of the threads on which experiment trackers run."""


class UserError(Exception):
    """An error that the user can fix. Each line of its text says what was found, what is allowed and what to do."""

    exit_code = 1

    def __init__(self, text: str, on_all_ranks: bool = False) -> None:
        super().__init__(text)
        self.on_all_ranks = on_all_ranks
        """Whether every rank raises it identically, so that one report per machine is enough."""


class ConfigError(UserError):
    """A wrong config file, override or command line."""

    exit_code = 2


class DataError(UserError):
    """Token files or texts that cannot be trained on or evaluated."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or trained model that is damaged or does not fit."""

    exit_code = 4


class NumericsError(UserError):
    """A loss or gradient that is not finite."""

    exit_code = 5


class RuntimeEnvironmentError(UserError):
    """A machine, folder, library or network that lacks what the command needs."""

    exit_code = 6


class CrashLoopError(UserError):
    """A run that has crashed at the same step too often to be restarted automatically."""

    exit_code = 93


class ArgumentParser(argparse.ArgumentParser):
    """A command line whose errors are reported like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"command line: {one_line(message)}; --help shows what is expected", on_all_ranks=True)


def path_argument(text: str) -> str:
    """A path from the command line, for `type=` of an argument. Refuses paths that an error line could not show."""
    if not text or "\n" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a path on one line; give another or rename it")
    return text


def one_line(text: str) -> str:
    """The text with every character that is not printable escaped, such as \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def pluralize(n: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def run_command(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a command's `main` on the process's arguments, print its errors as lines and return the exit code.

    `--debug` anywhere in the arguments shows tracebacks. An error that is the same on all ranks is printed once per
    machine.
    """
    arguments = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in sys.argv[1:]]
    debug = "--debug" in arguments
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # printing must not fail, whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return main([argument for argument in arguments if argument != "--debug"]) or 0
    except SystemExit as request:  # argparse, after --help
        return request.code if isinstance(request.code, int) else 0
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        _discard_output(sys.stdout)
        return 0
    except Exception as error:
        explained = None if debug else explain_error(error)
        if explained is None:
            raise
        code, text = explained
        if is_local_rank0() or not getattr(error, "on_all_ranks", False):
            rank = "" if is_local_rank0() else f"rank {os.environ.get('RANK', '?')}: "
            lines = [f"distgpt: error: {rank}{one_line(line)}\n" for line in text.split("\n")]
            print("".join(lines), end="", file=sys.stderr)  # in one write: lines of several ranks must not mix
        return code
    except KeyboardInterrupt:
        if is_local_rank0():
            print("distgpt: interrupted; the same command resumes a run from its last checkpoint", file=sys.stderr)
        return 130


def is_local_rank0() -> bool:
    """Whether this process reports for its machine: all do except ranks that torchrun started after the first."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    started_by_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys() and local_rank.isdecimal()
    return not started_by_torchrun or int(local_rank) == 0


def explain_error(error: BaseException) -> tuple[int, str] | None:
    """Exit code and text (one line per problem) of an error that a user can fix; None for a bug in distgpt."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = f"{short_reason(error)}; fix this and run the same command again"
        return RuntimeEnvironmentError.exit_code, one_line(text)
    oom_markers = ("can't allocate memory", "out of memory", "Cannot allocate memory")  # torch raises RuntimeErrors
    out_of_memory = isinstance(error, RuntimeError) and any(marker in str(error) for marker in oom_markers)
    if isinstance(error, MemoryError) or out_of_memory:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        text = f"{reason}; lower batch_size (keeping global_batch_size) or the size of the model"
        return RuntimeEnvironmentError.exit_code, text
    return None


def short_reason(error: BaseException) -> str:
    """What went wrong, and where, in a few words."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def exit_process(code: int | None) -> NoReturn:
    """End this process with an exit code, whatever becomes of its last output.

    A rank of a multi-process run ends without Python's finalization: a gloo thread that wakes during it would abort
    the process (pytorch #190489). So does a process whose tracker is still busy: wandb's exit hook would wait for it.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # a full disk, or a reader that has exited
            _discard_output(stream)
    if "RANK" in os.environ or any(thread.name.startswith(TRACKER_THREAD) for thread in threading.enumerate()):
        os._exit(code or 0)
    sys.exit(code or 0)


def _discard_output(stream: TextIO) -> None:
    """Send what a stream still holds to /dev/null, so that Python's own flush at exit cannot fail."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
    except (OSError, ValueError):  # not a file, or closed: nothing is flushed at exit
        pass
