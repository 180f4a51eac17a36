"""Compare the speed of distgpt, a textbook loop, Hugging Face's Trainer and litgpt: `python -m bench.speed`.

Every contestant runs in its own process (or ranks), reads the same sequences in the same order, starts from the same
weights and uses the same AdamW at the same learning rate. In each round every contestant runs once. `distgpt` is
`python -m distgpt.train` on default settings, except compile=on: `auto` would not compile such short runs.
"+ allocator" is a peer with allocator settings like distgpt's. Only the first round compiles; the others use its cache.

Each peer needs its own environment, since their requirements conflict, in the folder given by --peers DIR:

    python -m venv DIR/hf && DIR/hf/bin/pip install torch==2.13.0 transformers accelerate
    python -m venv DIR/litgpt && DIR/litgpt/bin/pip install torch==2.13.0 litgpt

`--curves` compares losses instead of times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.contestants import OUT_OF_MEMORY, REPO, Contestant, Outcome, RunSettings, contestants, python_of, run
from bench.report import add_ratios, align_columns, format_table, speeds_after_warmup, summarize
from bench.work import CPU_SHAPES, GPU_SHAPES, SHAPES, prepare
from distgpt.errors import (
    ArgumentParser,
    ConfigError,
    RuntimeEnvironmentError,
    exit_process,
    pluralize,
    run_command,
)
from distgpt.training.metrics import device_name

CPU_WARM_UP_STEPS = 4
GPU_LOG_EVERY = 10
CURVE_STEPS = 200
CURVE_CONTESTANTS = ["textbook", "hf fp32", "litgpt", "distgpt fp32", "distgpt"]
SETUP_HINT = "`python -m bench.speed --help` shows how to create the environments; --peers DIR is their folder"


def parse_arguments(arguments: Sequence[str], on_gpu: bool) -> argparse.Namespace:
    """The validated command line. Raises ConfigError."""
    parser = ArgumentParser(
        prog="python -m bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",")]

    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    parser.add_argument("--shapes", type=names, default=shapes, help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--ranks", type=names, default=["1"], help="numbers of ranks, such as 1,2 (default 1)")
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 2)
    parser.add_argument("--steps", type=int, help="per run (default 12; 200 on a GPU and with --curves)")
    parser.add_argument("--contestants", type=names, help=f"some of {', '.join(contestants())}")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder that contains the environments hf and litgpt")
    parser.add_argument(
        "--curves", action="store_true", help="compare losses: of all in fp32, and of distgpt in bf16 and fp32"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all results as JSON")
    options = parser.parse_args(arguments)
    options.steps = (CURVE_STEPS if on_gpu or options.curves else 12) if options.steps is None else options.steps
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"command line: --{name}: got {getattr(options, name)}, expected at least 1")
    if on_gpu and not options.curves and options.steps < 2 * GPU_LOG_EVERY:
        raise ConfigError(f"command line: --steps: got {options.steps}, expected at least {2 * GPU_LOG_EVERY} on a GPU")
    known: dict[str, Any] = {"shapes": SHAPES, "contestants": contestants()}
    for option, allowed in known.items():
        for name in getattr(options, option) or ():
            if name not in allowed:
                raise ConfigError(f"command line: --{option}: got {name!r}, expected some of {', '.join(allowed)}")
    _check_ranks(options, on_gpu)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise ConfigError(
            f"command line: --output: {options.output.parent} is not a folder; create it or choose another"
        )
    return options


def _check_ranks(options: argparse.Namespace, on_gpu: bool) -> None:
    """Convert --ranks to numbers. Raises ConfigError where a shape's sequences or the GPUs do not suffice."""
    if not all(text.isascii() and text.isdecimal() and int(text) for text in options.ranks):
        raise ConfigError(f"command line: --ranks: got {','.join(options.ranks)}, expected numbers such as 1,2")
    options.ranks = [1] if options.curves else [int(text) for text in options.ranks]
    for world_size in options.ranks:
        for name in options.shapes:
            if SHAPES[name].sequences % world_size:
                expected = f"a divisor of the {SHAPES[name].sequences} sequences of shape {name}"
                raise ConfigError(f"command line: --ranks: got {world_size}, expected {expected}")
        if on_gpu and world_size > torch.cuda.device_count():
            expected = f"at most {torch.cuda.device_count()} GPUs"
            raise ConfigError(f"command line: --ranks: got {world_size}, expected {expected}")


def select_contestants(options: argparse.Namespace) -> list[Contestant]:
    """The contestants given by --contestants, else the default ones whose environments exist.

    Raises ConfigError where the environment of a given contestant is missing.
    """
    names = options.contestants

    def is_selected(contestant: Contestant) -> bool:
        if names:
            return contestant.name in names
        return contestant.name in CURVE_CONTESTANTS if options.curves else contestant.default

    selected = [contestant for contestant in contestants().values() if is_selected(contestant)]
    missing = {contestant.program for contestant in selected if not _is_installed(contestant.program, options.peers)}
    if missing and names:
        raise ConfigError(
            f"command line: --contestants: no environment for {' and '.join(sorted(missing))}; {SETUP_HINT}"
        )
    if missing:
        print(f"skipped: {' and '.join(sorted(missing))}: {SETUP_HINT}", flush=True)
    return [contestant for contestant in selected if contestant.program not in missing]


def _is_installed(program: str, peers: Path | None) -> bool:
    """Whether a program's environment exists."""
    return program in ("distgpt", "textbook") or (peers is not None and python_of(program, peers).exists())


def measure(contestant: Contestant, settings: RunSettings, accumulate: dict[str, int]) -> Outcome:
    """Run a contestant; while it runs out of memory, halve its micro-batches and run it again.

    `accumulate` keeps the number of micro-steps per update of each contestant between calls.
    """
    sequences = settings.prepared.shape.sequences // settings.world_size
    while True:
        micro_steps = accumulate.setdefault(contestant.name, 1)
        outcome = run(contestant, settings, micro_steps)
        if outcome.failure != OUT_OF_MEMORY or sequences % (2 * micro_steps):
            return outcome
        accumulate[contestant.name] = 2 * micro_steps


def matmul_tflops() -> dict[str, float]:
    """The current speed of large matrix products, by precision."""
    completed = subprocess.run(
        [sys.executable, "-m", "bench.peak"], cwd=REPO, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        raise RuntimeEnvironmentError(f"python -m bench.peak: {completed.stderr.strip().splitlines()[-1]}")
    tflops: dict[str, float] = json.loads(completed.stdout)
    return tflops


def run_rounds(
    settings: RunSettings, selected: list[Contestant], rounds: int, num_warmup_steps: int, label: str
) -> list[dict[str, Any]]:
    """Run all rounds of one shape and world size; returns a row of figures for each contestant."""
    outcomes: dict[str, list[Outcome]] = {contestant.name: [] for contestant in selected}
    accumulate: dict[str, int] = {}
    peaks: list[dict[str, float]] = []
    for number in range(1, rounds + 1):
        peaks.append(matmul_tflops())
        for contestant in selected:
            outcome = measure(contestant, settings, accumulate)
            outcomes[contestant.name].append(outcome)
            speeds = speeds_after_warmup([outcome], settings, num_warmup_steps)
            result = f"{statistics.median(speeds):,.0f} tokens/s" if speeds else outcome.failure
            print(f"{label}, round {number}/{rounds}: {contestant.name}: {result}", file=sys.stderr, flush=True)
    peak = {precision: statistics.median(tflops[precision] for tflops in peaks) for precision in peaks[0]}
    rows = [summarize(name, runs, settings, num_warmup_steps, peak) for name, runs in outcomes.items()]
    for row in rows:
        row["micro_steps"] = accumulate[row["contestant"]]
    return add_ratios(rows)


def compare_losses(settings: RunSettings, selected: list[Contestant], label: str) -> dict[str, Any]:
    """Run each contestant once. Compare fp32 losses with the textbook's, and distgpt's validation loss with fp32's."""
    outcomes: dict[str, Outcome] = {}
    for contestant in selected:
        outcomes[contestant.name] = measure(contestant, settings, {})
        result = outcomes[contestant.name].failure or "done"
        print(f"{label}: {contestant.name}: {result}", file=sys.stderr, flush=True)
    curves = {name: [row["loss"] for row in outcome.rows] for name, outcome in outcomes.items()}
    val_losses = {name: outcome.val_loss for name, outcome in outcomes.items() if outcome.val_loss}
    lines = [["contestant", "last loss", "largest difference", "at step"]]
    differences: dict[str, float] = {}
    for name, outcome in outcomes.items():
        if outcome.precision == "fp32" and curves[name] and curves.get("textbook"):
            pairs = zip(curves[name], curves["textbook"], strict=True)
            difference, step = max((abs(a - b) / b, step) for step, (a, b) in enumerate(pairs, 1))
            differences[name] = difference
            lines.append([name, f"{curves[name][-1]:.4f}", f"{difference:.2e}", str(step)])
    results: dict[str, Any] = {"losses": curves, "val_losses": val_losses, "differences": differences}
    print(f"\n{label}, fp32: loss compared with the textbook's\n{align_columns(lines)}")
    auto, fp32 = (outcomes.get(name, Outcome()).val_loss for name in ("distgpt", "distgpt fp32"))
    if auto is not None and fp32 is not None:
        precision, results["val_difference"] = outcomes["distgpt"].precision, (auto - fp32) / fp32
        values = f"{precision} {auto:.5f}, fp32 {fp32:.5f}, {results['val_difference']:+.3%}"
        print(f"distgpt's validation loss at the end: {values}")
    return results


def describe_environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Command, commit, hardware and versions."""

    def git(*command: str) -> str:
        arguments = ["git", "-C", str(REPO), *command]
        return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip()

    on_gpu = torch.cuda.is_available()
    changed = bool(git("status", "--porcelain", "--untracked-files=no", "distgpt", "bench"))
    return {
        "command": shlex.join(["python", "-m", "bench.speed", *arguments]),
        "commit": (git("rev-parse", "HEAD")[:12] or "unknown") + (", changed" if changed else ""),
        "hardware": device_name(torch.device("cuda" if on_gpu else "cpu")),
        "devices": torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main(arguments: Sequence[str]) -> None:
    """Prepare the work, run all contestants, print and write the results."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises, so that the running contestant is terminated
    on_gpu = torch.cuda.is_available()
    options = parse_arguments(arguments, on_gpu)
    selected = select_contestants(options)
    report: dict[str, Any] = describe_environment(arguments)
    report |= {"steps": options.steps, "rounds": options.rounds, "results": []}
    print(f"{report['hardware']} x {report['devices']}, torch {report['torch']}, commit {report['commit']}", flush=True)
    num_warmup_steps = options.steps // 2 if on_gpu else min(CPU_WARM_UP_STEPS, options.steps - 1)
    log_every = GPU_LOG_EVERY if on_gpu and not options.curves else 1
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            prepared = prepare(Path(folder) / name, SHAPES[name], options.steps)
            for world_size in options.ranks:
                cache = Path(folder) / "compiled"
                settings = RunSettings(prepared, world_size, options.steps, log_every, options.peers, cache)
                result = {"shape": name, "ranks": world_size, "sizes": dataclasses.asdict(prepared.shape)}
                label = f"{name}, {pluralize(world_size, 'rank')}"
                if options.curves:
                    result |= compare_losses(settings, selected, label)
                else:
                    rows = run_rounds(settings, selected, options.rounds, num_warmup_steps, label)
                    result["contestants"] = rows
                    print(f"\n{label}: {prepared.shape.tokens:,} tokens per step\n{format_table(rows)}")
                sys.stdout.flush()
                report["results"].append(result)
                if options.output is not None:
                    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    exit_process(run_command(main))
