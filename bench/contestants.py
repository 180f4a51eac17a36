"""Who takes part in `python -m bench.speed`, and one run of one of them in a process (or ranks) of its own."""

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

from bench.work import Prepared
from distgpt import ENVIRONMENT

REPO = Path(__file__).parent.parent
MOST_SECONDS = 3600.0
"""A run that takes longer is ended, and counts as failed."""

PATIENCE_SECONDS = 60.0
"""For a run that was told to end: torchrun gives its ranks half of it."""

OUT_OF_MEMORY = "out of memory"

ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
"""What spares a peer the page faults of fresh memory, from outside: huge pages, and freed blocks kept for reuse."""


@dataclass(frozen=True)
class Contestant:
    """A program and its settings."""

    name: str
    program: str
    """distgpt, textbook, hf or litgpt."""
    precision: str = "fp32"
    """fp32 or bf16; auto leaves it to distgpt."""
    compile: bool = True
    """Of distgpt."""
    environment: dict[str, str] = field(default_factory=dict)
    default: bool = True
    """Whether it takes part unless others are named."""


def contestants() -> dict[str, Contestant]:
    """All that there are, by name."""
    found = [
        Contestant("distgpt", "distgpt", "auto"),
        Contestant("distgpt fp32", "distgpt"),
        Contestant("distgpt plain", "distgpt", compile=False, default=False),
    ]
    peers = [
        Contestant("textbook", "textbook"),
        Contestant("hf fp32", "hf"),
        Contestant("hf bf16", "hf", "bf16"),
        Contestant("litgpt", "litgpt"),
        Contestant("litgpt bf16", "litgpt", "bf16", default=False),
    ]
    for peer in peers:
        found.append(peer)
        name = f"{peer.name} + allocator"
        found.append(Contestant(name, peer.program, peer.precision, environment=ALLOCATOR, default=peer.default))
    return {contestant.name: contestant for contestant in found}


MODULES = {
    "distgpt": "distgpt.train",
    "textbook": "bench.textbook",
    "hf": "bench.peers_hf",
    "litgpt": "bench.peers_litgpt",
}


@dataclass(frozen=True)
class Race:
    """How a contestant is run."""

    prepared: Prepared
    ranks: int
    steps: int
    log_every: int
    peers: Path | None
    """Folder of the peers' environments."""
    cache: Path
    """Where compiled code is kept: empty at first, so that the first round compiles and the others need not."""


@dataclass
class Outcome:
    """What one run showed."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """step, seconds and loss of each line: a line's seconds are the mean of the steps since the line before."""
    first_step_seconds: float = 0.0
    """From the start of the process to the end of the first step."""
    peak_mib: float = 0.0
    """Of the rank that used most."""
    precision: str = "fp32"
    checkpoint_seconds: float | None = None
    """For how long the loop waited for the checkpoint at the end."""
    val_loss: float | None = None
    failure: str | None = None


def python_of(program: str, peers: Path | None) -> Path:
    """The interpreter that a program runs with."""
    if program in ("distgpt", "textbook"):
        return Path(sys.executable)
    assert peers is not None
    return peers / program / "bin" / "python"


def command(contestant: Contestant, race: Race, accumulate: int) -> list[str]:
    """What starts a contestant."""
    start = [str(python_of(contestant.program, race.peers)), "-m"]
    if race.ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={race.ranks}", "-m"]
    start.append(MODULES[contestant.program])
    folder = race.prepared.folder
    if contestant.program != "distgpt":
        options = {"steps": race.steps, "accumulate": accumulate, "log-every": race.log_every}
        options_text = [f"--{name}={value}" for name, value in options.items()]
        return [*start, str(folder), f"--precision={contestant.precision}", *options_text]
    settings = {
        "precision": contestant.precision,
        "compile": "on" if contestant.compile else "off",  # auto would spare a run as short as this
        "num_training_steps": race.steps,
        "log_every": race.log_every,
        "batch_size": race.prepared.shape.sequences // race.ranks // accumulate,
    }
    return [*start, str(folder / "config.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def run(contestant: Contestant, race: Race, accumulate: int = 1) -> Outcome:
    """Run a contestant to its end and read what it showed."""
    shutil.rmtree(race.prepared.folder / "distgpt", ignore_errors=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        **{key: value for key, value in os.environ.items() if key not in {*ALLOCATOR, *ENVIRONMENT}},
        "OMP_NUM_THREADS": str(max(1, cores // race.ranks)),
        "TORCHINDUCTOR_CACHE_DIR": str(race.cache),
        **contestant.environment,
    }
    errors = race.prepared.folder / "stderr.txt"
    started_at = time.monotonic()
    with errors.open("wb") as stderr, ended(command(contestant, race, accumulate), environment, stderr) as process:
        lines = [(time.monotonic() - started_at, line.decode(errors="replace")) for line in process.stdout or ()]
        code = process.wait()
    if code != 0:
        return Outcome(failure=reason(errors.read_text(errors="replace"), code))
    outcome = read_distgpt(lines, race) if contestant.program == "distgpt" else read_peer(lines)
    outcome.precision = outcome.precision if contestant.precision == "auto" else contestant.precision
    return outcome


@contextlib.contextmanager
def ended(arguments: list[str], environment: dict[str, str], stderr: Any) -> Any:
    """A process of which nothing is left at the end, however that comes."""
    process = subprocess.Popen(
        arguments, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
    )
    timer = threading.Timer(MOST_SECONDS, process.terminate)  # torchrun hands it to its ranks, and kills who stays
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def reason(errors: str, code: int) -> str:
    """Why a run failed, in one line."""
    if re.search("out of memory|can't allocate memory|DefaultCPUAllocator", errors):
        return OUT_OF_MEMORY
    raised = re.compile(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)\b|distgpt: error:)")
    told = [line for line in errors.splitlines() if raised.match(line) and "ChildFailedError" not in line]
    return f"exit code {code}: {(told or errors.splitlines() or ['it said nothing'])[-1].strip()[:200]}"


def first_step_seconds(shown_at: float, row: dict[str, float]) -> float:
    """When the first step had ended, from when its line (perhaps of several steps) was shown."""
    return shown_at - (row["step"] - 1) * row["seconds"]


def read_peer(lines: list[tuple[float, str]]) -> Outcome:
    """What the JSON lines of a peer say."""
    found = []
    for shown_at, line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "tokens_per_second" in row:
                found.append((shown_at, row))
    if not found:
        return Outcome(failure="it printed no step")
    rows = [{key: row[key] for key in ("step", "seconds", "loss")} for _, row in found]
    return Outcome(rows, first_step_seconds(found[0][0], rows[0]), max(row["rss_mib"] for _, row in found))


def read_distgpt(lines: list[tuple[float, str]], race: Race) -> Outcome:
    """What distgpt printed and left in its folder."""
    output = race.prepared.folder / "distgpt"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [
        {
            "step": record["step"],
            "seconds": race.prepared.shape.tokens / record["tokens-per-second"],
            "loss": record["train-loss"],
        }
        for record in records
        if "train-loss" in record
    ]
    shown_at = next(shown_at for shown_at, line in lines if re.match(r"step\s+\d+/", line))
    device = next(line for _, line in lines if line.startswith("device"))
    return Outcome(
        rows,
        first_step_seconds(shown_at, rows[0]),
        max(n_bytes or 0 for record in records for n_bytes in record.get("peak-bytes", [])) / 2**20,
        "bf16" if ", bf16" in device else "fp32",
        [record["checkpoint-wait-seconds"] for record in records if "checkpoint-wait-seconds" in record][-1],
        json.loads((output / "eval.json").read_text())["val-loss"],
    )
