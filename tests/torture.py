"""Torture: real runs, really killed, on your own machine and file system. Prints a line a test; exits 1 if one fails.

    python -m tests.torture kills --runs 200       kill -9 at random moments: no checkpoint lost, no hand needed
    python -m tests.torture io                     kill -9, or half a file, at every I/O call of a save
    python -m tests.torture twenty                 20 kills against none: same curve, weights and moments, bit for bit
    python -m tests.torture signals --runs 100     any signal, to anybody, any time: a clean exit, a step lost at most
    python -m tests.torture recovery               seconds from kill -9 to the next training step
    python -m tests.torture stall                  what saving costs the loop

`--folder DIR` names a folder on the file system to test (by default a temporary one), `--layouts 1,3:ddp,4:fsdp` the
ranks and strategies, `--seed` the moments.
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

from distgpt import checkpoint
from tests.conftest import REPO, read_metrics, training_curve
from tests.started import PLAIN, Started, listens, processes_in

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
"""A checkpoint of 4 MB every second step of some 30 ms: a kill often falls in a save."""

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
HANDLED = f"--signals-to-handle={','.join(SIGNALS)}"

Layout = tuple[int, str]


def prepare(folder: Path) -> Path:
    """A folder with a config and tokens for a run."""
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    tokens = np.frombuffer((REPO / "README.md").read_bytes() * 9, dtype=np.uint8).astype(np.uint16)
    np.savez(folder / "tokens.npz", train=tokens, val=tokens[:1003])
    return folder


def start(folder: Path, layout: Layout, *arguments: str, fault: str | None = None, compiled: bool = False) -> Started:
    """Start the run in a folder, or go on with it."""
    ranks, strategy = layout
    plain = () if compiled else PLAIN
    options = (f"parallel.strategy={strategy}", *plain, *arguments)
    return Started(folder, ranks, *options, fault=fault, torchrun_options=(HANDLED,))


def sound(run: Started, at_least: int) -> list[str]:
    """What is wrong with a run's checkpoints after its death: each is whole, and none as new as `at_least` is gone."""
    newest, rejected = checkpoint.newest(run.output_dir)
    step = newest.step if newest else 0
    lost = [f"step {step} is the newest, {at_least} had been saved"] if step < at_least else []
    return lost + rejected


def saved(run: Started) -> int:
    """Step of the newest checkpoint, by its name alone."""
    return max((step for step, _ in checkpoint.on_disk(run.output_dir)), default=0)


def hashes(output_dir: Path) -> dict[str, str]:
    """The hash of every tensor of the newest checkpoint."""
    newest, _ = checkpoint.newest(output_dir)
    assert newest is not None
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for path in newest.path.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def hex_curve(output_dir: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of each step, to the last bit."""
    return [(step, loss.hex(), norm.hex()) for step, loss, norm in training_curve(output_dir)]


def kill(run: Started, chance: random.Random) -> str:
    """kill -9 everything, or one rank, or torchrun alone; then wait until nothing of the run is left."""
    ranks = run.ranks()
    target = chance.choice(["all", "a rank", "torchrun"]) if len(ranks) > 1 else "all"
    if target == "torchrun":
        os.kill(run.process.pid, signal.SIGKILL)
    elif target == "a rank":
        os.kill(chance.choice(list(ranks.values())), signal.SIGKILL)
    if target != "all":
        deadline = time.monotonic() + 40
        while processes_in(run.folder) and time.monotonic() < deadline:
            time.sleep(0.05)
            run.process.poll()
        if left := processes_in(run.folder):
            target += f" (LEFT BEHIND: {left})"
    run.end()
    return target


def kills(folder: Path, layouts: list[Layout], runs: int, chance: random.Random) -> Iterator[str]:
    """kill -9 at random moments, `runs` in all; the run of each layout goes on in its folder through all its kills."""
    for number, layout in enumerate(layouts):
        here = prepare(folder / f"kills-{layout[0]}-{layout[1]}")
        problems, targets, in_a_save = [], Counter[str](), 0
        for _ in range(runs // len(layouts) + (number < runs % len(layouts))):
            run = start(here, layout)
            try:
                if chance.random() < 0.2:
                    time.sleep(chance.uniform(0, 4))  # while it starts
                else:
                    steps = run.recorded()
                    run.wait_until(lambda run=run, steps=steps: run.recorded() > steps + 1)
                    time.sleep(chance.uniform(0, 1))
            except AssertionError:
                problems.append(f"it did not go on by itself: {run.text()[-600:]}")
            before = saved(run)
            target = kill(run, chance)
            targets[target] += 1
            in_a_save += any((run.output_dir / "checkpoints").glob(".step-*.partial"))
            problems += [f"{target}: {problem}" for problem in sound(run, before)] + [target] * ("LEFT" in target)
        curve = [step for step, _, _ in training_curve(here / "run")]
        if curve != list(range(1, len(curve) + 1)):
            problems.append("the steps on record are not each there once")
        yield report(f"kills: {layout}: {dict(targets)}, {in_a_save} of them in a save", problems)


def report(what: str, problems: list[str]) -> str:
    """A line, and a line for each problem."""
    return "\n".join([f"{what}: {len(problems)} problems", *problems])


def io(folder: Path, layouts: list[Layout], every: int) -> Iterator[str]:
    """Die at every (or every so-manieth) call by which a save changes the disk, on the first and on the last rank."""
    for layout in layouts:
        tried, problems = 0, []
        base = prepare(folder / f"io-{layout[0]}-{layout[1]}")
        run = start(base, layout, "num_training_steps=6")  # three checkpoints, of which two are left
        assert run.process.wait() == 0, run.text()
        for action, rank in itertools.product(("kill", "torn"), sorted({0, layout[0] - 1})):
            for call in itertools.count(1, every):
                here = base.with_name(f"{base.name}-{action}-{rank}-{call}")
                shutil.copytree(base, here)
                run = start(here, layout, "num_training_steps=8", fault=f"io:{action}:{rank}:{call}")
                if run.process.wait() == 0:
                    break
                run.end()
                tried += 1
                found = sound(run, 6)
                if not found and call % 4 == 1:  # and the same command goes on
                    run = start(here, layout, "num_training_steps=8")
                    found = [run.text()[-600:]] if run.process.wait() != 0 else sound(run, 8)
                problems += [f"{action} at call {call} of rank {rank}: {problem}" for problem in found]
                shutil.rmtree(here)
        yield report(f"io: {layout}: died at {tried} I/O calls of saves", problems)


def twenty(folder: Path, layouts: list[Layout], times: int, chance: random.Random) -> Iterator[str]:
    """A run with so many kills against one with none, on default settings: GPT-tiny, compiled, bf16 where available."""
    steps = ("num_training_steps=120", "checkpoint.every=5", "log_every=1", "eval.every=50", "data=tokens.npz")
    for layout in layouts:
        outcome = []
        for killed in (0, times):
            here = prepare(folder / f"twenty-{layout[0]}-{layout[1]}-{killed}")
            shutil.copy(REPO / "configs" / "GPT-tiny.yaml", here / "tiny.yaml")
            for _ in range(killed):
                run = start(here, layout, *steps, "output_dir=run", compiled=True)
                before = saved(run)
                run.wait_until(lambda run=run, before=before: saved(run) > before or run.recorded() >= 119, 300)
                time.sleep(chance.uniform(0, 1.5))
                kill(run, chance)
            run = start(here, layout, *steps, "output_dir=run", compiled=True)
            assert run.process.wait() == 0, run.text()
            outcome.append((hex_curve(run.output_dir), hashes(run.output_dir)))
        how = next(line for line in run.text().splitlines() if line.startswith("device"))
        what = f"{len(outcome[0][0])} steps and {len(outcome[0][1])} tensors compared"
        different = ["they differ"] * (outcome[0] != outcome[1])
        yield report(f"twenty: {times} kills, {how}: {what}", different)


def signals(folder: Path, layouts: list[Layout], runs: int, chance: random.Random) -> Iterator[str]:
    """A random signal to a random target in a random phase: the run says that it stopped, and loses no step."""
    problems, phases, slowest = [], Counter[str](), 0.0
    for number in range(runs):
        layout = layouts[number % len(layouts)]
        here = folder / f"signals-{layout[0]}-{layout[1]}"
        if not here.exists():
            prepare(here)
        phase = chance.choice(["start", "step", "evaluation", "save"])
        settings = {"evaluation": ["eval.every=1", "eval.max_tokens=100000"], "save": ["checkpoint.every=1"]}
        run = start(here, layout, *settings.get(phase, ["checkpoint.every=9"]))
        run.wait_until(lambda run=run, n=layout[0]: len(run.ranks()) == n and all(map(listens, run.ranks().values())))
        if phase == "start":
            time.sleep(chance.uniform(0, 3))
        else:
            steps = run.recorded()
            run.wait_until(lambda run=run, steps=steps: run.recorded() > steps)
            time.sleep(chance.uniform(0, 0.5))
        name, ranks = chance.choice(SIGNALS), run.ranks()
        target = chance.choice(["torchrun", "a rank", "all ranks"]) if layout[0] > 1 else "the process"
        chosen = {"torchrun": [run.process.pid], "a rank": [chance.choice(list(ranks.values()))]}
        for pid in chosen.get(target, list(ranks.values())):
            os.kill(pid, getattr(signal, name))
        began_at = time.monotonic()
        phases[f"{phase}, {target}"] += 1
        what = f"{layout} {name} to {target} in {phase}"
        try:
            code = run.process.wait(60)
            slowest = max(slowest, time.monotonic() - began_at)
            expected = {75} if layout[0] == 1 else {0} if target != "torchrun" else {0, 1}
            said = [line for line in run.lines() if "everything saved" in line]
            if code not in expected or len(said) != 1 or len(run.lines()) != 1:
                problems.append(f"{what}: code {code}, said {run.lines()}: {run.text()[-600:]}")
            if run.recorded() - run.newest_step() > 1:
                problems.append(f"{what}: {run.recorded()} steps made, {run.newest_step()} saved")
        except Exception as error:
            problems.append(f"{what}: {error!r}: {run.text()[-600:]}")
        run.end()
    yield report(f"signals: {runs} ({dict(phases)}), slowest exit {slowest:.1f} s", problems)


def recovery(folder: Path, layouts: list[Layout]) -> Iterator[str]:
    """Seconds from kill -9 of everything to the next training step, GPT-tiny on default settings, caches warm."""
    for layout in layouts:
        here = prepare(folder / f"recovery-{layout[0]}-{layout[1]}")
        shutil.copy(REPO / "configs" / "GPT-tiny.yaml", here / "tiny.yaml")
        arguments = ("checkpoint.every=3", "log_every=1", "data=tokens.npz", "output_dir=run")
        times = []
        for _ in range(4):
            run = start(here, layout, *arguments, compiled=True)
            before = saved(run)
            run.wait_until(lambda run=run: "\nstep " in run.text())
            times.append(time.monotonic() - run.began_at)
            run.wait_for_checkpoint(before + 1)
            run.end()
        yield f"recovery: {layout}: {', '.join(f'{seconds:.1f}' for seconds in times[1:])} s (from a kill to a step)"


def stall(folder: Path, layouts: list[Layout]) -> Iterator[str]:
    """What a checkpoint every 100 steps costs the loop of GPT-tiny, and of a model whose steps are short."""
    for layout in layouts:
        for name, config in (("GPT-tiny", (REPO / "configs" / "GPT-tiny.yaml").read_text()), ("small", CONFIG)):
            here = prepare(folder / f"stall-{layout[0]}-{layout[1]}-{name}")
            (here / "tiny.yaml").write_text(config)
            arguments = ["checkpoint.every=100", "log_every=10", "num_training_steps=300", "eval.every=1000000"]
            began = start(here, layout, *arguments, "data=tokens.npz", "output_dir=run", compiled=name == "GPT-tiny")
            assert began.process.wait() == 0, began.text()
            rows = read_metrics(began.output_dir)
            waits = [row["checkpoint-wait-seconds"] for row in rows if "checkpoint-wait-seconds" in row]
            speeds = sorted(row["tokens-per-second"] for row in rows if "tokens-per-second" in row)
            tokens = next(row["tokens"] for row in rows if "tokens" in row) / 10
            between = 100 * tokens / speeds[len(speeds) // 2]
            share = max(waits[:-1]) / between
            yield f"stall: {layout}, {name}: {waits} s, {share:.2%} of the {between:.1f} s between checkpoints"


def main() -> int:
    """Run one kind of torture, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["kills", "io", "twenty", "signals", "recovery", "stall"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="io: only every so-manieth call")
    parser.add_argument("--layouts", default="1,3:ddp,3:fsdp,4:ddp")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layouts = [
        (int(ranks), strategy or "auto")
        for ranks, _, strategy in (x.partition(":") for x in options.layouts.split(","))
    ]
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.folder) as scratch:
        folder = Path(scratch)
        kinds = {
            "kills": lambda: kills(folder, layouts, options.runs, chance),
            "io": lambda: io(folder, layouts, options.every),
            "twenty": lambda: twenty(folder, layouts, options.runs, chance),
            "signals": lambda: signals(folder, layouts, options.runs, chance),
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
