"""`python -m distgpt.check CONFIG [key=value ...]`: check a config, its tokens and its output folder, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distgpt.config.help import config_parser
from distgpt.config.loader import load_config
from distgpt.errors import exit_process, path_argument, run_command
from distgpt.resilience.preflight import run_preflight


def main(arguments: Sequence[str]) -> None:
    """Check a config, its tokens and its output folder without starting the run."""
    parser = config_parser("python -m distgpt.check", str(main.__doc__))
    parser.add_argument("--fresh", action="store_true", help="ignore an earlier run in output_dir")
    parser.add_argument(
        "--from",
        dest="source",
        type=path_argument,
        metavar="RUN",
        help="a run or checkpoint whose weights the run starts with",
    )
    parser.add_argument("--for-launcher", action="store_true", help="print only the device and the output folder")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    inputs = run_preflight(config, options.fresh, options.source and Path(options.source))
    if options.for_launcher:
        print(f"{config.device}\n{config.output_dir}")
    else:
        print(f"{options.config}: OK; {len(inputs.dataset.train):,} training tokens in {inputs.dataset.path}")


if __name__ == "__main__":
    exit_process(run_command(main))
