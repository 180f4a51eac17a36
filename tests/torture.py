"""Torture tests: real runs killed on your own machine and file system. Prints one line per test; exits 1 on failure.

    python -m tests.torture kills --runs 200       kill -9 at random moments: no checkpoint is lost, runs resume unaided
    python -m tests.torture io                     kill -9, or half a file, at every I/O call of a save
    python -m tests.torture identical              20 kills or none: bit-identical curve, weights and moments
    python -m tests.torture signals --runs 100     any signal, to any process, at any time: clean exit, one step lost
    python -m tests.torture recovery               seconds from kill -9 to the next training step
    python -m tests.torture stall                  how long saving delays training

`--folder DIR` selects a folder on the file system to test (by default a temporary one), `--layouts 1,3:ddp,4:fsdp` the
numbers of ranks and the strategies, `--seed` the random moments.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from distgpt.checkpoint import store
from tests.conftest import REPO, read_metrics, training_curve
from tests.started import PLAIN, Started, handles_signals, processes_in

CONFIG = """
output_dir: run
tokenizer_encoding: bytes
model_config: {n_embd: 96, n_head: 4, n_positions: 64, n_layer: 3}
data: tokens.npz
device: cpu
batch_size: 8
seq_len: 64
num_warmup_steps: 2
num_training_steps: 1000000
min_lr: 1e-4
max_lr: 1e-3
log_every: 1
eval: {every: 10, max_tokens: 512}
checkpoint: {every: 2, keep: 2}
wandb: disabled
"""
"""A checkpoint of 4 MB every second step of about 30 ms, so that a kill often falls into a save."""

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
HANDLED = f"--signals-to-handle={','.join(SIGNALS)}"

Layout = tuple[int, str]
"""A number of ranks and a strategy."""


def prepare(folder: Path) -> Path:
    """Create a folder with a config and tokens for a run."""
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    tokens = np.frombuffer((REPO / "README.md").read_bytes() * 9, dtype=np.uint8).astype(np.uint16)
    np.savez(folder / "tokens.npz", train=tokens, val=tokens[:1003])
    return folder


def start(folder: Path, layout: Layout, *arguments: str, fault: str | None = None, compiled: bool = False) -> Started:
    """Start the run in a folder, or resume it."""
    ranks, strategy = layout
    plain = () if compiled else PLAIN
    options = (f"parallel.strategy={strategy}", *plain, *arguments)
    return Started(folder, ranks, *options, fault=fault, torchrun_options=(HANDLED,))


def checkpoint_problems(run: Started, at_least: int) -> list[str]:
    """What is wrong with the checkpoints of a dead run: any damaged one, or a newest one older than `at_least`."""
    latest, skipped = store.latest_valid(run.output_dir)
    step = latest.step if latest else 0
    lost = [f"step {step} is the newest, {at_least} had been saved"] if step < at_least else []
    return lost + skipped


def saved_step(run: Started) -> int:
    """Step of the newest checkpoint, from its name alone."""
    return max((step for step, _ in store.list_checkpoints(run.output_dir)), default=0)


def wait_for_checkpoint_or_step(run: Started, saved: int, recorded: int) -> None:
    """Wait until a checkpoint of step `saved` or later exists, or `recorded` steps are recorded."""
    run.wait_until(lambda: saved_step(run) >= saved or run.recorded() >= recorded, 300)


def wait_for_signal_handlers(run: Started, num_ranks: int) -> None:
    """Wait until every rank handles signals."""
    run.wait_until(lambda: len(run.ranks()) == num_ranks and all(map(handles_signals, run.ranks().values())))


def wait_for_printed_step(run: Started) -> None:
    """Wait until this launch of a run has printed a training step."""
    run.wait_until(lambda: "\nstep " in run.text())


def tensor_hashes(output_dir: Path) -> dict[str, str]:
    """The hash of every tensor of the newest checkpoint."""
    latest, _ = store.latest_valid(output_dir)
    assert latest is not None
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for path in latest.path.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def exact_curve(output_dir: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of each step, to the last bit."""
    return [(step, loss.hex(), norm.hex()) for step, loss, norm in training_curve(output_dir)]


def kill(run: Started, rng: random.Random) -> str:
    """kill -9 all processes, one rank, or torchrun alone; then wait until no process of the run is left."""
    ranks = run.ranks()
    target = rng.choice(["all", "a rank", "torchrun"]) if len(ranks) > 1 else "all"
    if target == "torchrun":
        os.kill(run.process.pid, signal.SIGKILL)
    elif target == "a rank":
        os.kill(rng.choice(list(ranks.values())), signal.SIGKILL)
    if target != "all":
        deadline = time.monotonic() + 40
        while processes_in(run.folder) and time.monotonic() < deadline:
            time.sleep(0.05)
            run.process.poll()
        if survivors := processes_in(run.folder):
            target += f" (SURVIVORS: {survivors})"
    run.end()
    return target


def kills(folder: Path, layouts: list[Layout], runs: int, rng: random.Random) -> Iterator[str]:
    """kill -9 at random moments, `runs` times in all; each layout has one run, which is resumed after each kill."""
    for number, layout in enumerate(layouts):
        run_folder = prepare(folder / f"kills-{layout[0]}-{layout[1]}")
        problems, targets, num_in_save = [], Counter[str](), 0
        for _ in range(runs // len(layouts) + (number < runs % len(layouts))):
            run = start(run_folder, layout)
            try:
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0, 4))  # while it starts
                else:
                    run.wait_for_steps(run.recorded() + 2)
                    time.sleep(rng.uniform(0, 1))
            except AssertionError:
                problems.append(f"it did not resume: {run.text()[-600:]}")
            before = saved_step(run)
            target = kill(run, rng)
            targets[target] += 1
            num_in_save += any((run.output_dir / "checkpoints").glob(".step-*.partial"))
            problems += [f"{target}: {problem}" for problem in checkpoint_problems(run, before)]
            problems += [target] * ("SURVIVORS" in target)
        steps_recorded = [step for step, _, _ in training_curve(run_folder / "run")]
        if steps_recorded != list(range(1, len(steps_recorded) + 1)):
            problems.append("not every step is recorded exactly once")
        yield report(f"kills: {layout}: {dict(targets)}, {num_in_save} of them in a save", problems)


def report(summary: str, problems: list[str]) -> str:
    """One line, and one more for each problem."""
    return "\n".join([f"{summary}: {len(problems)} problems", *problems])


def io(folder: Path, layouts: list[Layout], every: int) -> Iterator[str]:
    """Die at each (or every n-th) I/O call by which a save changes the disk, on the first and on the last rank."""
    for layout in layouts:
        num_deaths, problems = 0, []
        base = prepare(folder / f"io-{layout[0]}-{layout[1]}")
        six_steps, eight_steps = (("lr_decay_steps=8", f"num_training_steps={steps}") for steps in (6, 8))
        run = start(base, layout, *six_steps)  # three checkpoints, of which two are kept
        assert run.process.wait() == 0, run.text()
        for action, rank in itertools.product(("kill", "torn"), sorted({0, layout[0] - 1})):
            for call in itertools.count(1, every):
                run_folder = base.with_name(f"{base.name}-{action}-{rank}-{call}")
                shutil.copytree(base, run_folder)
                run = start(run_folder, layout, *eight_steps, fault=f"io:{action}:{rank}:{call}")
                code = run.process.wait()
                if code == 0:
                    break
                assert code == -signal.SIGKILL or "SIGKILL" in run.text(), run.text()  # it died of nothing else
                run.end()
                num_deaths += 1
                new_problems = checkpoint_problems(run, 6)
                if not new_problems and call % 4 == 1:  # and the same command resumes it
                    run = start(run_folder, layout, *eight_steps)
                    failed = run.process.wait() != 0
                    new_problems = [run.text()[-600:]] if failed else checkpoint_problems(run, 8)
                problems += [f"{action} at call {call} of rank {rank}: {problem}" for problem in new_problems]
                shutil.rmtree(run_folder)
        yield report(f"io: {layout}: died at {num_deaths} I/O calls of saves", problems)


def identical(folder: Path, layouts: list[Layout], num_kills: int, rng: random.Random) -> Iterator[str]:
    """A run with kills against one without, on default settings: GPT-tiny, compiled, bf16 where available."""
    steps = ("num_training_steps=120", "checkpoint.every=5", "log_every=1", "eval.every=50", "data=tokens.npz")
    for layout in layouts:
        outcomes = []
        for kills_of_run in (0, num_kills):
            run_folder = prepare(folder / f"identical-{layout[0]}-{layout[1]}-{kills_of_run}")
            shutil.copy(REPO / "configs" / "GPT-tiny.yaml", run_folder / "tiny.yaml")
            for _ in range(kills_of_run):
                run = start(run_folder, layout, *steps, "output_dir=run", compiled=True)
                before = saved_step(run)
                wait_for_checkpoint_or_step(run, before + 1, 119)
                time.sleep(rng.uniform(0, 1.5))
                kill(run, rng)
            run = start(run_folder, layout, *steps, "output_dir=run", compiled=True)
            assert run.process.wait() == 0, run.text()
            outcomes.append((exact_curve(run.output_dir), tensor_hashes(run.output_dir)))
        device = next(line for line in run.text().splitlines() if line.startswith("device"))
        compared = f"{len(outcomes[0][0])} steps and {len(outcomes[0][1])} tensors compared"
        difference = ["they differ"] * (outcomes[0] != outcomes[1])
        yield report(f"identical: {num_kills} kills, {device}: {compared}", difference)


def signals(folder: Path, layouts: list[Layout], runs: int, rng: random.Random) -> Iterator[str]:
    """A random signal to a random target in a random phase: the run reports that it stopped, and loses no step."""
    problems, phases, slowest_seconds = [], Counter[str](), 0.0
    for number in range(runs):
        layout = layouts[number % len(layouts)]
        run_folder = folder / f"signals-{layout[0]}-{layout[1]}"
        if not run_folder.exists():
            prepare(run_folder)
        phase = rng.choice(["start", "step", "evaluation", "save"])
        settings = {"evaluation": ["eval.every=1", "eval.max_tokens=100000"], "save": ["checkpoint.every=1"]}
        run = start(run_folder, layout, *settings.get(phase, ["checkpoint.every=9"]))
        wait_for_signal_handlers(run, layout[0])
        if phase == "start":
            time.sleep(rng.uniform(0, 3))
        else:
            run.wait_for_steps(run.recorded() + 1)
            time.sleep(rng.uniform(0, 0.5))
        name, ranks = rng.choice(SIGNALS), run.ranks()
        target = rng.choice(["torchrun", "a rank", "all ranks"]) if layout[0] > 1 else "the process"
        pids = {"torchrun": [run.process.pid], "a rank": [rng.choice(list(ranks.values()))]}
        for pid in pids.get(target, list(ranks.values())):
            os.kill(pid, getattr(signal, name))
        signalled_at = time.monotonic()
        phases[f"{phase}, {target}"] += 1
        case = f"{layout} {name} to {target} in {phase}"
        try:
            code = run.process.wait(60)
            slowest_seconds = max(slowest_seconds, time.monotonic() - signalled_at)
            expected = {75} if layout[0] == 1 else {0} if target != "torchrun" else {0, 1}
            reports = [line for line in run.lines() if "everything saved" in line]
            if code not in expected or len(reports) != 1 or len(run.lines()) != 1:
                problems.append(f"{case}: code {code}, printed {run.lines()}: {run.text()[-600:]}")
            if run.recorded() - run.newest_step() > 1:
                problems.append(f"{case}: {run.recorded()} steps made, {run.newest_step()} saved")
        except Exception as error:
            problems.append(f"{case}: {error!r}: {run.text()[-600:]}")
        run.end()
    yield report(f"signals: {runs} ({dict(phases)}), slowest exit {slowest_seconds:.1f} s", problems)


def recovery(folder: Path, layouts: list[Layout]) -> Iterator[str]:
    """Seconds from kill -9 of all processes to the next training step: GPT-tiny, default settings, warm caches."""
    for layout in layouts:
        run_folder = prepare(folder / f"recovery-{layout[0]}-{layout[1]}")
        shutil.copy(REPO / "configs" / "GPT-tiny.yaml", run_folder / "tiny.yaml")
        arguments = ("checkpoint.every=3", "log_every=1", "data=tokens.npz", "output_dir=run")
        times = []
        for _ in range(4):
            run = start(run_folder, layout, *arguments, compiled=True)
            before = saved_step(run)
            wait_for_printed_step(run)
            times.append(time.monotonic() - run.began_at)
            run.wait_for_checkpoint(before + 1)
            run.end()
        yield f"recovery: {layout}: {', '.join(f'{seconds:.1f}' for seconds in times[1:])} s (from a kill to a step)"


def stall(folder: Path, layouts: list[Layout]) -> Iterator[str]:
    """How long a checkpoint every 100 steps delays the training of GPT-tiny, and of a model with short steps."""
    for layout in layouts:
        for name, config in (("GPT-tiny", (REPO / "configs" / "GPT-tiny.yaml").read_text()), ("small", CONFIG)):
            run_folder = prepare(folder / f"stall-{layout[0]}-{layout[1]}-{name}")
            (run_folder / "tiny.yaml").write_text(config)
            arguments = ["checkpoint.every=100", "log_every=10", "num_training_steps=300", "eval.every=1000000"]
            compiled = name == "GPT-tiny"
            run = start(run_folder, layout, *arguments, "data=tokens.npz", "output_dir=run", compiled=compiled)
            assert run.process.wait() == 0, run.text()
            rows = read_metrics(run.output_dir)
            waits = [row["checkpoint-wait-seconds"] for row in rows if "checkpoint-wait-seconds" in row]
            speeds = sorted(row["tokens-per-second"] for row in rows if "tokens-per-second" in row)
            tokens_per_step = next(row["tokens"] for row in rows if "tokens" in row) / 10
            interval_seconds = 100 * tokens_per_step / speeds[len(speeds) // 2]
            share = max(waits[:-1]) / interval_seconds
            yield f"stall: {layout}, {name}: {waits} s, {share:.2%} of the {interval_seconds:.1f} s between checkpoints"


def main() -> int:
    """Run one kind of torture test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["kills", "io", "identical", "signals", "recovery", "stall"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="io: test only every n-th call")
    parser.add_argument("--layouts", default="1,3:ddp,3:fsdp,4:ddp")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layouts = [
        (int(ranks), strategy or "auto")
        for ranks, _, strategy in (x.partition(":") for x in options.layouts.split(","))
    ]
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.folder) as scratch:
        folder = Path(scratch)
        kinds = {
            "kills": lambda: kills(folder, layouts, options.runs, rng),
            "io": lambda: io(folder, layouts, options.every),
            "identical": lambda: identical(folder, layouts, options.runs, rng),
            "signals": lambda: signals(folder, layouts, options.runs, rng),
            "recovery": lambda: recovery(folder, layouts),
            "stall": lambda: stall(folder, layouts),
        }
        failed = False
        for line in kinds[options.kind]():
            print(line, flush=True)
            failed |= "problems" in line and not line.endswith(": 0 problems")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
