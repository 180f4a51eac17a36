"""The work of `python -m bench.speed`: shapes, synthetic tokens, and what every contestant reads of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from bench.contest import BETAS, EPS, GRAD_CLIP, LEARNING_RATE, VOCAB, WEIGHT_DECAY, Shape
from distgpt import config as configs
from distgpt.data import ShuffledReader
from distgpt.model import DecoderLM
from distgpt.plan import Sizes
from distgpt.shards import open_tokens

SHAPES = {
    "A": Shape(layers=2, heads=2, width=32, positions=128, sequences=32),  # configs/GPT-tiny.yaml
    "B": Shape(layers=6, heads=6, width=384, positions=256, sequences=8),
    "GPT-full": Shape(layers=6, heads=6, width=384, positions=512, sequences=64),
    "124M": Shape(layers=12, heads=12, width=768, positions=1024, sequences=64),
    "350M": Shape(layers=24, heads=16, width=1024, positions=1024, sequences=32),
    "1.5B": Shape(layers=48, heads=25, width=1600, positions=1024, sequences=16),
    "tiny": Shape(layers=1, heads=2, width=16, positions=16, sequences=4),  # only to see that the harness runs
}
CPU_SHAPES = ["A", "B"]
GPU_SHAPES = ["A", "B", "GPT-full", "124M", "350M", "1.5B"]

VAL_SEQUENCES = 32


@dataclass(frozen=True)
class Prepared:
    """A folder that holds a shape's work."""

    folder: Path
    shape: Shape
    flops_per_token: int
    loader_seconds: float
    """Median time that distgpt's reader takes for an update's sequences."""


def synthetic_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Tokens that a model can learn: each is followed by its fixed successor half of the time, else drawn by Zipf."""
    rng = np.random.default_rng(seed)
    frequencies = 1 / (np.arange(VOCAB) + 2.7)
    drawn = rng.choice(VOCAB, count, p=frequencies / frequencies.sum())
    fresh = rng.random(count) < 0.5
    fresh[0] = True
    since = np.arange(count) - np.maximum.accumulate(np.where(fresh, np.arange(count), 0))
    tokens, successors = drawn[np.arange(count) - since], np.random.default_rng(1).permutation(VOCAB)
    for age in range(1, int(since.max()) + 1):
        tokens = np.where(since >= age, successors[tokens], tokens)
    return np.asarray(tokens, dtype=np.uint16)


def prepare(folder: Path, shape: Shape, steps: int) -> Prepared:
    """Write tokens and config for distgpt, and for its peers the same batches and its initial weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(shape)))
    train = synthetic_tokens(steps * shape.tokens + 1)
    val = synthetic_tokens(VAL_SEQUENCES * shape.positions + 1, seed=2)
    np.savez(folder / "tokens.npz", train=train, val=val)
    (folder / "config.yaml").write_text(yaml.safe_dump(run_config(folder, shape, steps)))
    config = configs.load(folder / "config.yaml")
    loader_seconds = write_batches(folder, config)
    with torch.random.fork_rng():
        model = DecoderLM(VOCAB, shape.width, shape.heads, shape.positions, shape.layers, seed=config.seed)
    weights = model.without_padding(model.state_dict())
    save_file({name: values.contiguous() for name, values in weights.items()}, folder / "initial.safetensors")
    return Prepared(folder, shape, sizes_of(shape).flops_per_token(shape.positions), loader_seconds)


def sizes_of(shape: Shape) -> Sizes:
    """A shape's model, for the plan on paper."""
    return Sizes(VOCAB, shape.width, shape.heads, shape.positions, shape.layers)


def run_config(folder: Path, shape: Shape, steps: int) -> dict[str, object]:
    """distgpt's config: what all contestants share, everything else at its default."""
    return {
        "output_dir": str(folder / "distgpt"),
        "data": str(folder / "tokens.npz"),
        "model_config": {
            "n_embd": shape.width,
            "n_head": shape.heads,
            "n_positions": shape.positions,
            "n_layer": shape.layers,
        },
        "batch_size": shape.sequences,
        "global_batch_size": shape.sequences,
        "seq_len": shape.positions,
        "num_warmup_steps": 0,
        "num_training_steps": steps,
        "min_lr": LEARNING_RATE,
        "max_lr": LEARNING_RATE,
        "optimizer": {
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "grad_clip": GRAD_CLIP,
        },
        "wandb": "disabled",
    }


def write_batches(folder: Path, config: configs.Config) -> float:
    """Write all updates' sequences in the order in which distgpt reads them; return a read's median time."""
    steps, T = config.num_training_steps, config.seq_len
    tokens = open_tokens(folder / "tokens.npz")["train"]
    reader = ShuffledReader(tokens, VOCAB, T, config.seed, config.batch_plan(ranks=1), rank=0)
    batches = np.empty((steps, config.sequences_per_step, T + 1), dtype=np.uint16)
    times = []
    for step in range(steps):
        started_at = time.perf_counter()
        (batch,) = reader.at(step)
        times.append(time.perf_counter() - started_at)
        batches[step, :, :-1], batches[step, :, -1] = batch.ids_BT, batch.targets_BT[:, -1]
    np.save(folder / "batches.npy", batches)
    return statistics.median(times)
