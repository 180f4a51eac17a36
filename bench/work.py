"""The work of `python -m bench.speed`: shapes, synthetic tokens, and the files that the contestants read."""

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
from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.data.dataloader import TrainLoader
from distgpt.data.dataset import TokenWindows
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.data.token_files import open_token_file
from distgpt.models.architectures import GPT2Config

SHAPES = {
    "A": Shape(layers=2, heads=2, width=32, positions=128, sequences=32),  # configs/GPT-tiny.yaml
    "B": Shape(layers=6, heads=6, width=384, positions=256, sequences=8),
    "GPT-full": Shape(layers=6, heads=6, width=384, positions=512, sequences=64),
    "124M": Shape(layers=12, heads=12, width=768, positions=1024, sequences=64),
    "350M": Shape(layers=24, heads=16, width=1024, positions=1024, sequences=32),
    "1.5B": Shape(layers=48, heads=25, width=1600, positions=1024, sequences=16),
    "tiny": Shape(layers=1, heads=2, width=16, positions=16, sequences=4),  # only for testing the benchmark itself
}
CPU_SHAPES = ["A", "B"]
GPU_SHAPES = ["A", "B", "GPT-full", "124M", "350M", "1.5B"]

VAL_SEQUENCES = 32


@dataclass(frozen=True)
class PreparedWork:
    """A folder with a shape's work."""

    folder: Path
    shape: Shape
    flops_per_token: int
    loader_seconds: float
    """Median time in which distgpt's loader reads the sequences of an update."""


def synthetic_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Tokens that a model can learn.

    Each is followed by its fixed successor with probability 1/2, else by a token drawn from a Zipf distribution.
    """
    rng = np.random.default_rng(seed)
    frequencies = 1 / (np.arange(VOCAB) + 2.7)
    drawn = rng.choice(VOCAB, count, p=frequencies / frequencies.sum())
    is_drawn = rng.random(count) < 0.5
    is_drawn[0] = True
    distance = np.arange(count) - np.maximum.accumulate(np.where(is_drawn, np.arange(count), 0))
    tokens, successors = drawn[np.arange(count) - distance], np.random.default_rng(1).permutation(VOCAB)
    for number in range(1, int(distance.max()) + 1):
        tokens = np.where(distance >= number, successors[tokens], tokens)
    return np.asarray(tokens, dtype=np.uint16)


def prepare(folder: Path, shape: Shape, steps: int) -> PreparedWork:
    """Write the tokens and config for distgpt, and its batches and initial weights for the peers."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(shape)))
    train = synthetic_tokens(steps * shape.tokens + 1)
    val = synthetic_tokens(VAL_SEQUENCES * shape.positions + 1, seed=2)
    np.savez(folder / "tokens.npz", train=train, val=val)
    (folder / "config.yaml").write_text(yaml.safe_dump(_run_config(folder, shape, steps)))
    config = load_config(folder / "config.yaml")
    loader_seconds = _write_batches(folder, config)
    with torch.random.fork_rng():
        model = config.model_config.build(VOCAB, seed=config.seed)
    weights = model.remove_vocab_padding(model.state_dict())
    save_file({name: values.contiguous() for name, values in weights.items()}, folder / "initial.safetensors")
    flops_per_token = config.model_config.flops_per_token(VOCAB, shape.positions)
    return PreparedWork(folder, shape, flops_per_token, loader_seconds)


def model_config(shape: Shape) -> GPT2Config:
    """A shape's model."""
    return GPT2Config(n_embd=shape.width, n_head=shape.heads, n_positions=shape.positions, n_layer=shape.layers)


def _run_config(folder: Path, shape: Shape, steps: int) -> dict[str, object]:
    """distgpt's config: the settings that all contestants share; everything else is at its default."""
    return {
        "output_dir": str(folder / "distgpt"),
        "data": str(folder / "tokens.npz"),
        "model_config": dataclasses.asdict(model_config(shape)),
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


def _write_batches(folder: Path, config: Config) -> float:
    """Write the sequences of all updates in the order in which distgpt reads them; returns the median time per read."""
    steps, T = config.num_training_steps, config.seq_len
    tokens = open_token_file(folder / "tokens.npz")["train"]
    windows = TokenWindows(tokens, T, VOCAB)
    loader = TrainLoader(
        windows, Sampler(len(windows), config.seed, BatchPlan.from_config(config, dp_size=1), dp_rank=0)
    )
    batches = np.empty((steps, config.sequences_per_step, T + 1), dtype=np.uint16)
    times = []
    for step in range(steps):
        started_at = time.perf_counter()
        (batch,) = loader.micro_batches(step)
        times.append(time.perf_counter() - started_at)
        batches[step, :, :-1], batches[step, :, -1] = batch.ids_BT, batch.targets_BT[:, -1]
    np.save(folder / "batches.npy", batches)
    return statistics.median(times)
