"""The `distgpt COMMAND` entry point: the same commands as `python -m distgpt.COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import distgpt
from distgpt.errors import ConfigError, exit_process, one_line, run_command

COMMANDS = {
    "train": "train the model that a config describes, or resume its run",
    "generate": "continue prompts with a trained model",
    "evaluate": "evaluate a trained model on held-out tokens or text",
    "check": "check a config, its tokens and its output folder",
    "config": "print a config with every default filled in, or estimate what it needs",
    "data": "check a token file and show its contents",
}


def main() -> None:
    """Run the command that the first argument names on the other arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        exit_process(run_command(_without_command) or (2 if len(sys.argv) < 2 else 0))
    del sys.argv[1]
    if name == "train":
        from distgpt.resilience.signals import install_signal_handlers

        install_signal_handlers()  # before torch, which takes seconds to import
    exit_process(run_command(import_command(name)))


def import_command(name: str) -> Callable[[Sequence[str]], int | None]:
    """The `main` of a command."""
    module = f"distgpt.{name}.__main__" if name in ("config", "data") else f"distgpt.{name}"
    main: Callable[[Sequence[str]], int | None] = importlib.import_module(module).main
    return main


def _without_command(arguments: Sequence[str]) -> None:
    """Print the usage or the version. Raises ConfigError for anything else."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: distgpt COMMAND ...    (`distgpt COMMAND --help` shows a command's arguments)\n")
        print("\n".join(f"  {command:<10}{meaning}" for command, meaning in COMMANDS.items()))
    elif name == "--version":
        print(f"distgpt {distgpt.__version__}")
    else:
        raise ConfigError(f"got the command {one_line(name)!r}, expected one of {', '.join(COMMANDS)}")
