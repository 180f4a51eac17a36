"""Loss and gradient norm of GPT-tiny's first steps on any number of ranks, in fp32 or fp64, to compare layouts.

`python bench/drift.py STEPS fp64 one.json [key=value]`, alone or under torchrun, writes them. Overrides such as
parallel.strategy=fsdp choose the layout. `python bench/drift.py one.json four.json` prints the largest relative
differences of two files and their steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from distgpt.checkpoint.weights import build_model
from distgpt.config.loader import load_config
from distgpt.data.dataloader import TrainLoader
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.distributed.context import init_distributed
from distgpt.distributed.parallelize import parallelize
from distgpt.distributed.runtime import resolve_runtime
from distgpt.errors import exit_process
from distgpt.optim.schedules import learning_rate
from distgpt.resilience.preflight import run_preflight
from distgpt.training.step import StepSettings, train_step

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
OVERRIDES = ["device=cpu", "precision=fp32", "compile=off"]


def compare(first: str, second: str) -> None:
    """Print the largest relative difference of each column of two files."""
    rows = zip(json.loads(Path(first).read_text()), json.loads(Path(second).read_text()), strict=True)
    pairs = [(step, a, b) for step, (a, b) in enumerate(rows, 1)]
    for column, name in enumerate(("loss", "gradient norm")):
        difference, step = max((abs(a[column] - b[column]) / abs(a[column]), step) for step, a, b in pairs)
        print(f"{name}: {difference:.2e} at step {step} of {len(pairs)}")


def run(steps: int, dtype: torch.dtype, output: Path, overrides: list[str]) -> None:
    """Train and write [loss, gradient norm] of each step."""
    config = load_config("configs/GPT-tiny.yaml", [f"output_dir={tempfile.mkdtemp()}", *OVERRIDES, *overrides])
    context = init_distributed("cpu")
    inputs = context.rank0_first(lambda: run_preflight(config, fresh=True))
    n_vocab = inputs.tokenizer.n_vocab
    runtime = resolve_runtime(config, n_vocab, context)
    context = context.with_mesh(runtime.layout.shard_size)
    base_model = build_model(config, inputs.tokenizer, runtime.kernels(config)).to(dtype)
    model = parallelize(base_model, context, runtime)
    optimizer = config.optimizer.build(base_model)
    plan = BatchPlan.from_config(config, context.dp_size)
    windows = inputs.dataset.train_windows(config.seq_len, n_vocab)
    loader = TrainLoader(windows, Sampler(len(windows), config.seed, plan, context.dp_rank))
    settings = StepSettings(config.tokens_per_step, config.optimizer.grad_clip, context.dp_size, runtime)
    rows = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.schedule)
        result = train_step(model, optimizer, loader.micro_batches(step), settings)
        loss = float(context.all_reduce_sum(result.loss_sum.double())) / config.tokens_per_step
        rows.append([loss, float(result.grad_norm)])
    if context.is_rank0:
        output.write_text(json.dumps(rows))
    context.close()


def main(arguments: list[str]) -> None:
    """Compare two files, or train and write one."""
    if len(arguments) == 2:
        compare(*arguments)
    else:
        steps, dtype_name, output, *overrides = arguments
        run(int(steps), DTYPES[dtype_name], Path(output), overrides)
        exit_process(0)


if __name__ == "__main__":
    main(sys.argv[1:])
