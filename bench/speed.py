"""Time distgpt, a textbook loop, Hugging Face's Trainer and litgpt on the same work in turn: `python -m bench.speed`.

Every contestant is a process of its own (or as many ranks), reads the same sequences in the same order, begins with the
same weights and uses the same AdamW at the same rate; round by round each runs once. `distgpt` is its front door on
default settings, but for compile=on: runs this short would decide against it. "+ allocator" is a peer with allocator
settings like distgpt's. The first round compiles with an empty cache, the others find theirs.

The peers need an environment each, since their requirements exclude each other, in a folder named by --peers DIR:

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

from bench.contestants import OUT_OF_MEMORY, REPO, Contestant, Outcome, Race, contestants, python_of, run
from bench.report import add_ratios, aligned, figures, speeds_of, table
from bench.work import CPU_SHAPES, GPU_SHAPES, SHAPES, prepare
from distgpt.errors import ConfigError, MachineError, Parser, leave, run_command
from distgpt.metrics import device_name
from distgpt.plan import count

CPU_WARM_UP_STEPS = 4
GPU_LOG_EVERY = 10
CURVE_STEPS = 200
CURVES = ["textbook", "hf fp32", "litgpt", "distgpt fp32", "distgpt"]
RECIPE = "`python -m bench.speed --help` says how to make their environments, and --peers DIR names their folder"


def parse(arguments: Sequence[str], on_gpu: bool) -> argparse.Namespace:
    """The command line, checked; raises ConfigError."""
    parser = Parser(
        prog="python -m bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",")]

    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    parser.add_argument("--shapes", type=names, default=shapes, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ranks", type=names, default=["1"], help="numbers of ranks, such as 1,2 (default 1)")
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 2)
    parser.add_argument("--steps", type=int, help="of a run (default 12; 200 on a GPU and for --curves)")
    parser.add_argument("--contestants", type=names, help=f"of {', '.join(contestants())}")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of the environments hf and litgpt")
    parser.add_argument("--curves", action="store_true", help="compare losses in fp32, and bf16's with fp32's")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
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
    check_ranks(options, on_gpu)
    return options


def check_ranks(options: argparse.Namespace, on_gpu: bool) -> None:
    """Turn --ranks into numbers; raises ConfigError where a shape's sequences or the GPUs are too few."""
    if not all(text.isascii() and text.isdecimal() and int(text) for text in options.ranks):
        raise ConfigError(f"command line: --ranks: got {','.join(options.ranks)}, expected numbers such as 1,2")
    options.ranks = [1] if options.curves else [int(text) for text in options.ranks]
    for ranks in options.ranks:
        for name in options.shapes:
            if SHAPES[name].sequences % ranks:
                most = f"a divisor of the {SHAPES[name].sequences} sequences of shape {name}"
                raise ConfigError(f"command line: --ranks: got {ranks}, expected {most}")
        if on_gpu and ranks > torch.cuda.device_count():
            raise ConfigError(f"command line: --ranks: got {ranks}, expected at most {torch.cuda.device_count()} GPUs")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise ConfigError(f"command line: --output: {options.output.parent} is no folder; make it or name another")


def choose(options: argparse.Namespace) -> list[Contestant]:
    """Who takes part: all that are named (raises ConfigError where one's environment is missing), else all there."""
    named = options.contestants
    wanted = [
        one
        for one in contestants().values()
        if (one.name in named if named else one.name in CURVES if options.curves else one.default)
    ]
    missing = {one.program for one in wanted if not installed(one.program, options.peers)}
    if missing and named:
        raise ConfigError(f"command line: --contestants: no environment for {' and '.join(sorted(missing))}; {RECIPE}")
    if missing:
        print(f"left out: {' and '.join(sorted(missing))}: {RECIPE}", flush=True)
    return [one for one in wanted if one.program not in missing]


def installed(program: str, peers: Path | None) -> bool:
    """Whether a program's interpreter is there."""
    return program in ("distgpt", "textbook") or (peers is not None and python_of(program, peers).exists())


def measure(contestant: Contestant, race: Race, accumulate: dict[str, int]) -> Outcome:
    """Run a contestant, with ever smaller micro-batches (as remembered in `accumulate`) until they fit its memory."""
    sequences = race.prepared.shape.sequences // race.ranks
    while True:
        micro_steps = accumulate.setdefault(contestant.name, 1)
        outcome = run(contestant, race, micro_steps)
        if outcome.failure != OUT_OF_MEMORY or sequences % (2 * micro_steps):
            return outcome
        accumulate[contestant.name] = 2 * micro_steps


def matmul_tflops() -> dict[str, float]:
    """What a large matrix product reaches now, by precision."""
    done = subprocess.run([sys.executable, "-m", "bench.peak"], cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"python -m bench.peak: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compete(race: Race, who: list[Contestant], rounds: int, warm_up: int, label: str) -> list[dict[str, Any]]:
    """All rounds of one shape on so many ranks: a row of figures for each contestant."""
    outcomes: dict[str, list[Outcome]] = {one.name: [] for one in who}
    accumulate: dict[str, int] = {}
    peaks: list[dict[str, float]] = []
    for number in range(1, rounds + 1):
        peaks.append(matmul_tflops())
        for one in who:
            outcome = measure(one, race, accumulate)
            outcomes[one.name].append(outcome)
            speeds = speeds_of([outcome], race, warm_up)
            found = f"{statistics.median(speeds):,.0f} tokens/s" if speeds else outcome.failure
            print(f"{label}, round {number}/{rounds}: {one.name}: {found}", file=sys.stderr, flush=True)
    peak = {name: statistics.median(found[name] for found in peaks) for name in peaks[0]}
    rows = [figures(name, found, race, warm_up, peak) for name, found in outcomes.items()]
    for row in rows:
        row["micro_steps"] = accumulate[row["contestant"]]
    return add_ratios(rows)


def compare(race: Race, who: list[Contestant], label: str) -> dict[str, Any]:
    """Losses of one run of each: the largest difference from the textbook's, and bf16's validation beside fp32's."""
    outcomes: dict[str, Outcome] = {}
    for one in who:
        outcomes[one.name] = measure(one, race, {})
        print(f"{label}: {one.name}: {outcomes[one.name].failure or 'done'}", file=sys.stderr, flush=True)
    curves = {name: [row["loss"] for row in outcome.rows] for name, outcome in outcomes.items()}
    found: dict[str, Any] = {"losses": curves, "val_losses": {n: o.val_loss for n, o in outcomes.items() if o.val_loss}}
    lines = [["contestant", "last loss", "largest difference", "at step"]]
    differences: dict[str, float] = {}
    for name, outcome in outcomes.items():
        if outcome.precision == "fp32" and curves[name] and curves.get("textbook"):
            pairs = zip(curves[name], curves["textbook"], strict=True)
            difference, step = max((abs(a - b) / b, step) for step, (a, b) in enumerate(pairs, 1))
            differences[name] = difference
            lines.append([name, f"{curves[name][-1]:.4f}", f"{difference:.2e}", str(step)])
    found["differences"] = differences
    print(f"\n{label}, fp32: loss against the textbook's\n{aligned(lines)}")
    auto, strict = (outcomes.get(name, Outcome()).val_loss for name in ("distgpt", "distgpt fp32"))
    if auto is not None and strict is not None:
        precision, found["val_difference"] = outcomes["distgpt"].precision, (auto - strict) / strict
        ends = f"{precision} {auto:.5f}, fp32 {strict:.5f}, {found['val_difference']:+.3%}"
        print(f"distgpt's validation loss at the end: {ends}")
    return found


def surroundings(arguments: Sequence[str]) -> dict[str, Any]:
    """Command, commit, hardware and versions."""
    git = ["git", "-C", str(REPO)]

    def ask(*command: str) -> str:
        return subprocess.run([*git, *command], capture_output=True, text=True, check=False).stdout.strip()

    on_gpu = torch.cuda.is_available()
    changed = bool(ask("status", "--porcelain", "--untracked-files=no", "distgpt", "bench"))
    return {
        "command": shlex.join(["python", "-m", "bench.speed", *arguments]),
        "commit": (ask("rev-parse", "HEAD")[:12] or "unknown") + (", changed" if changed else ""),
        "hardware": device_name(torch.device("cuda" if on_gpu else "cpu")),
        "devices": torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main(arguments: Sequence[str]) -> None:
    """Prepare the work, let all compete, print and write the figures."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no contestant outlives the harness
    on_gpu = torch.cuda.is_available()
    options = parse(arguments, on_gpu)
    who = choose(options)
    report: dict[str, Any] = surroundings(arguments) | {"steps": options.steps, "rounds": options.rounds, "results": []}
    print(f"{report['hardware']} x {report['devices']}, torch {report['torch']}, commit {report['commit']}", flush=True)
    warm_up = options.steps // 2 if on_gpu else min(CPU_WARM_UP_STEPS, options.steps - 1)
    log_every = GPU_LOG_EVERY if on_gpu and not options.curves else 1
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            prepared = prepare(Path(folder) / name, SHAPES[name], options.steps)
            for ranks in options.ranks:
                race = Race(prepared, ranks, options.steps, log_every, options.peers, Path(folder) / "compiled")
                result = {"shape": name, "ranks": ranks, "sizes": dataclasses.asdict(prepared.shape)}
                label = f"{name}, {count(ranks, 'rank')}"
                if options.curves:
                    result |= compare(race, who, label)
                else:
                    result["contestants"] = compete(race, who, options.rounds, warm_up, label)
                    print(f"\n{label}: {prepared.shape.tokens:,} tokens a step\n{table(result['contestants'])}")
                sys.stdout.flush()
                report["results"].append(result)
                if options.output is not None:
                    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    leave(run_command(main))
