"""What ends a command early: the errors a user can cause, their exit codes, and one line instead of a traceback.

Exit codes: 0 done, 1 a bug of ours, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 environment, 93 crashes without end,
130 interrupted; `supervise` adds 75 stopped and saved, 76 another process lost.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Something a user can mend. Its text is one line a problem: what was found, what is allowed, what to do."""

    exit_code = 1

    def __init__(self, text: str, everywhere: bool = False) -> None:
        super().__init__(text)
        self.everywhere = everywhere
        """Whether every rank raises it alike, so that one voice a machine is enough."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are reported like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"command line: {one_line(message)}; --help shows what is expected", everywhere=True)


def file_name(text: str) -> str:
    """A path from the command line, for `type=` of an argument; refuses what could not be named in one line."""
    if not text or "\n" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a path on one line; give another or rename it")
    return text


def one_line(text: str) -> str:
    """The text with what would break or repaint a line written out, such as \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(UserError):
    """A wrong config file, override or command line."""

    exit_code = 2


class DataError(UserError):
    """Token files or texts that cannot be trained on or scored."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or trained model that is damaged or does not fit."""

    exit_code = 4


class NumericsError(UserError):
    """A loss or gradient that is no longer a number."""

    exit_code = 5


class MachineError(UserError):
    """A machine, folder, library or network that lacks what the command needs."""

    exit_code = 6


class CrashLoopError(UserError):
    """A run that has crashed at the same step too often to be started again by itself."""

    exit_code = 93


def run_command(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a command's `main` on the process's arguments; turn errors into their lines and return the exit code.

    `--debug` anywhere in the arguments shows the traceback too. What every rank finds, the first of each machine says.
    """
    arguments = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in sys.argv[1:]]
    debug = "--debug" in arguments
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, printing is no reason to fail
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return main([argument for argument in arguments if argument != "--debug"]) or 0
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone (`| head`): nothing to flush
        return 0
    except Exception as error:
        found = None if debug else diagnose(error)
        if found is None:
            raise
        code, text = found
        first = speaks_first()
        if first or not getattr(error, "everywhere", False):
            rank = "" if first else f"rank {os.environ.get('RANK', '?')}: "
            print("\n".join(f"distgpt: error: {rank}{one_line(line)}" for line in text.split("\n")), file=sys.stderr)
        return code
    except KeyboardInterrupt:
        if speaks_first():
            print("distgpt: interrupted; a training run goes on from its last checkpoint", file=sys.stderr)
        return 130


def speaks_first() -> bool:
    """Whether this process speaks for its machine: all do but those that torchrun started after the first."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    started_by_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys() and local_rank.isdecimal()
    return not started_by_torchrun or int(local_rank) == 0


def diagnose(error: BaseException) -> tuple[int, str] | None:
    """Exit code and text, a line a problem, of an error that is no bug of ours; None for one that is."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = f"{failure(error)}; mend that and run the same command again"
        return MachineError.exit_code, one_line(text)
    lacking = ("can't allocate memory", "out of memory", "Cannot allocate memory")  # torch's are RuntimeErrors
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in lacking)):
        reason = (str(error).splitlines() or ["out of memory"])[0]
        return MachineError.exit_code, f"{reason}; lower batch_size (the result stays the same) or the model"
    return None


def failure(error: BaseException) -> str:
    """What went wrong, and where, in a few words."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def leave(code: int | None) -> None:
    """End this process now. A gloo thread that wakes while Python finalises would abort it (pytorch #190489)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(code or 0)
