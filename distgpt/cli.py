"""The `distgpt NAME` entry point: the same commands as `python -m distgpt.NAME`."""

from __future__ import annotations

import importlib
import sys

from distgpt import supervise
from distgpt.errors import leave, run_command

COMMANDS = {
    "train": "train the model a config describes, or continue its run",
    "generate": "continue prompts with a trained model",
    "evaluate": "score a trained model on held-out tokens or text",
    "check": "check a config, its tokens and its output folder",
    "config": "print a config with every default filled in",
    "data": "check a token file and show what it holds",
}


def main() -> None:
    """Run the command that the first argument names on the rest."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: distgpt COMMAND ...    (distgpt COMMAND --help tells more)\n")
        print("\n".join(f"  {command:<10}{meaning}" for command, meaning in COMMANDS.items()))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if name not in COMMANDS:
        print(f"distgpt: error: got the command {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    if name == "train":
        supervise.listen()  # before torch, which takes seconds to load
    leave(run_command(importlib.import_module(f"distgpt.{name}").main))
