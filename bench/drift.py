"""Loss and gradient norm of GPT-tiny's first steps on any number of ranks, in fp32 or fp64, to compare layouts.

`python bench/drift.py 130 fp64 one.json`, `torchrun --nproc_per_node=4 bench/drift.py 130 fp64 four.json [key=value]`
(such as parallel.strategy=fsdp), then
`python bench/drift.py one.json four.json` prints the largest relative differences and their steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from distgpt import config as configs
from distgpt import trained
from distgpt import world as worlds
from distgpt.check import check
from distgpt.data import ShuffledReader
from distgpt.errors import leave
from distgpt.optim import build_optimizer, learning_rate, set_learning_rate
from distgpt.parallel import Execution, decide_layout, parallelize
from distgpt.step import train_step


def compare(first: str, second: str) -> None:
    """Print the largest relative difference of each column of two files."""
    rows = zip(json.loads(Path(first).read_text()), json.loads(Path(second).read_text()), strict=True)
    pairs = [(step, a, b) for step, (a, b) in enumerate(rows, 1)]
    for column, name in enumerate(("loss", "gradient norm")):
        worst = max((abs(a[column] - b[column]) / abs(a[column]), step) for step, a, b in pairs)
        print(f"{name}: {worst[0]:.2e} at step {worst[1]} of {len(pairs)}")


def run(steps: int, dtype: torch.dtype, output: Path, overrides: list[str]) -> None:
    """Train and write [loss, gradient norm] of each step."""
    config = configs.load("configs/GPT-tiny.yaml", [f"output_dir={tempfile.mkdtemp()}", "device=cpu", *overrides])
    world = worlds.start("cpu")
    start = world.first_rank_first(lambda: check(config, fresh=True))
    model = trained.build_model(config, start.tokenizer).to(dtype)
    execution = Execution("fp32", False, "cpu", decide_layout(config, model.n_vocab, "fp32", world))
    running = parallelize(model, world, execution)
    optimizer = build_optimizer(model, config.optimizer)
    stream = start.tokens.train, model.n_vocab, config.seq_len, config.seed
    reader = ShuffledReader(*stream, config.batch_plan(world.size), world.rank)
    schedule = config.num_warmup_steps, config.num_training_steps, config.min_lr, config.max_lr
    rows = []
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, *schedule))
        tokens = config.tokens_per_step
        result = train_step(running, optimizer, reader.at(step), tokens, config.optimizer.grad_clip, world)
        rows.append([float(world.sum(result.loss_sum.double())) / tokens, float(result.grad_norm)])
    if world.is_first:
        output.write_text(json.dumps(rows))
    world.close()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        compare(*sys.argv[1:])
    else:
        dtype = {"fp32": torch.float32, "fp64": torch.float64}[sys.argv[2]]
        run(int(sys.argv[1]), dtype, Path(sys.argv[3]), sys.argv[4:])
        leave(0)
