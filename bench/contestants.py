"""The contestants of `python -m bench.speed`, and how one of them is run in its own process or ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.work import PreparedWork
from distgpt import ENVIRONMENT

REPO = Path(__file__).parent.parent
MAX_SECONDS = 3600.0
"""A run that takes longer is terminated and counts as failed."""

TERMINATION_SECONDS = 60.0
"""Between SIGTERM and SIGKILL; torchrun gives its ranks half of it."""

OUT_OF_MEMORY = "out of memory"

ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
"""Spares a peer the page faults of fresh memory: huge pages, and freed blocks are kept for reuse."""


@dataclass(frozen=True)
class Contestant:
    """A program and its settings."""

    name: str
    program: str
    """distgpt, textbook, hf or litgpt."""
    precision: str = "fp32"
    """fp32 or bf16; auto lets distgpt choose."""
    compile: bool = True
    """Whether distgpt compiles."""
    environment: dict[str, str] = field(default_factory=dict)
    default: bool = True
    """Whether it is run without --contestants."""


def contestants() -> dict[str, Contestant]:
    """All contestants by name."""
    all_contestants = [
        Contestant("distgpt", "distgpt", "auto"),
        Contestant("distgpt fp32", "distgpt"),
        Contestant("distgpt eager", "distgpt", compile=False, default=False),
    ]
    peers = [
        Contestant("textbook", "textbook"),
        Contestant("hf fp32", "hf"),
        Contestant("hf bf16", "hf", "bf16"),
        Contestant("litgpt", "litgpt"),
        Contestant("litgpt bf16", "litgpt", "bf16", default=False),
    ]
    for peer in peers:
        all_contestants.append(peer)
        name = f"{peer.name} + allocator"
        all_contestants.append(
            Contestant(name, peer.program, peer.precision, environment=ALLOCATOR, default=peer.default)
        )
    return {contestant.name: contestant for contestant in all_contestants}


MODULES = {
    "distgpt": "distgpt.train",
    "textbook": "bench.textbook",
    "hf": "bench.peers_hf",
    "litgpt": "bench.peers_litgpt",
}


@dataclass(frozen=True)
class RunSettings:
    """How every contestant is run."""

    prepared: PreparedWork
    world_size: int
    steps: int
    log_every: int
    peers: Path | None
    """Folder of the peers' environments."""
    cache: Path
    """Folder for compiled code. It is empty at first, so that only the first round compiles."""


@dataclass
class Outcome:
    """The measurements of one run."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """step, seconds and loss of each printed line. The seconds are the mean of the steps since the previous line."""
    first_step_seconds: float = 0.0
    """From the start of the process to the end of the first step."""
    peak_mib: float = 0.0
    """The largest of all ranks."""
    precision: str = "fp32"
    checkpoint_seconds: float | None = None
    """How long the loop waited for the final checkpoint."""
    val_loss: float | None = None
    failure: str | None = None


def python_of(program: str, peers: Path | None) -> Path:
    """The Python interpreter of a program's environment."""
    if program in ("distgpt", "textbook"):
        return Path(sys.executable)
    assert peers is not None
    return peers / program / "bin" / "python"


def command(contestant: Contestant, settings: RunSettings, accumulate: int) -> list[str]:
    """The command line that starts a contestant, with `accumulate` micro-steps per update."""
    start = [str(python_of(contestant.program, settings.peers)), "-m"]
    if settings.world_size > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={settings.world_size}", "-m"]
    start.append(MODULES[contestant.program])
    folder = settings.prepared.folder
    if contestant.program != "distgpt":
        options = {"steps": settings.steps, "accumulate": accumulate, "log-every": settings.log_every}
        option_arguments = [f"--{name}={value}" for name, value in options.items()]
        return [*start, str(folder), f"--precision={contestant.precision}", *option_arguments]
    overrides = {
        "precision": contestant.precision,
        "compile": "on" if contestant.compile else "off",  # auto would not compile such a short run
        "num_training_steps": settings.steps,
        "log_every": settings.log_every,
        "batch_size": settings.prepared.shape.sequences // settings.world_size // accumulate,
    }
    return [*start, str(folder / "config.yaml"), *(f"{key}={value}" for key, value in overrides.items())]


def run(contestant: Contestant, settings: RunSettings, accumulate: int = 1) -> Outcome:
    """Run a contestant to its end and read its measurements."""
    shutil.rmtree(settings.prepared.folder / "distgpt", ignore_errors=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        **{key: value for key, value in os.environ.items() if key not in {*ALLOCATOR, *ENVIRONMENT}},
        "OMP_NUM_THREADS": str(max(1, cores // settings.world_size)),
        "TORCHINDUCTOR_CACHE_DIR": str(settings.cache),
        **contestant.environment,
    }
    errors = settings.prepared.folder / "stderr.txt"
    arguments = command(contestant, settings, accumulate)
    started_at = time.monotonic()
    with errors.open("wb") as stderr, _process(arguments, environment, stderr) as process:
        lines = [(time.monotonic() - started_at, line.decode(errors="replace")) for line in process.stdout or ()]
        code = process.wait()
    if code != 0:
        return Outcome(failure=_failure_reason(errors.read_text(errors="replace"), code))
    outcome = _read_distgpt(lines, settings) if contestant.program == "distgpt" else _read_peer(lines)
    outcome.precision = outcome.precision if contestant.precision == "auto" else contestant.precision
    return outcome


@contextlib.contextmanager
def _process(arguments: list[str], environment: dict[str, str], stderr: Any) -> Any:
    """A process that is terminated when the context ends, also by an exception."""
    process = subprocess.Popen(
        arguments, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
    )
    timer = threading.Timer(MAX_SECONDS, process.terminate)  # torchrun passes SIGTERM on, and kills ranks that stay
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(TERMINATION_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _failure_reason(errors: str, code: int) -> str:
    """Why a run failed, in one line, from its standard error."""
    if re.search("out of memory|can't allocate memory|DefaultCPUAllocator", errors):
        return OUT_OF_MEMORY
    raised = re.compile(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)\b|distgpt: error:)")
    messages = [line for line in errors.splitlines() if raised.match(line) and "ChildFailedError" not in line]
    return f"exit code {code}: {(messages or errors.splitlines() or ['no error output'])[-1].strip()[:200]}"


def _first_step_seconds(printed_at: float, row: dict[str, float]) -> float:
    """When the first step ended, given the time at which the first line (perhaps of several steps) was printed."""
    return printed_at - (row["step"] - 1) * row["seconds"]


def _read_peer(lines: list[tuple[float, str]]) -> Outcome:
    """The measurements in the JSON lines of a peer."""
    printed = []
    for printed_at, line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "tokens_per_second" in row:
                printed.append((printed_at, row))
    if not printed:
        return Outcome(failure="it printed no step")
    rows = [{key: row[key] for key in ("step", "seconds", "loss")} for _, row in printed]
    return Outcome(rows, _first_step_seconds(printed[0][0], rows[0]), max(row["rss_mib"] for _, row in printed))


def _read_distgpt(lines: list[tuple[float, str]], settings: RunSettings) -> Outcome:
    """The measurements in distgpt's output and its output folder."""
    output = settings.prepared.folder / "distgpt"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [
        {
            "step": record["step"],
            "seconds": settings.prepared.shape.tokens / record["tokens-per-second"],
            "loss": record["train-loss"],
        }
        for record in records
        if "train-loss" in record
    ]
    printed_at = next(printed_at for printed_at, line in lines if re.match(r"step\s+\d+/", line))
    device = next(line for _, line in lines if line.startswith("device"))
    return Outcome(
        rows,
        _first_step_seconds(printed_at, rows[0]),
        max(n_bytes or 0 for record in records for n_bytes in record.get("peak-bytes", [])) / 2**20,
        "bf16" if ", bf16" in device else "fp32",
        [record["checkpoint-wait-seconds"] for record in records if "checkpoint-wait-seconds" in record][-1],
        json.loads((output / "eval.json").read_text())["val-loss"],
    )
