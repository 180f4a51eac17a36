"""What a run prints before its first step, and the facts behind it: platform, versions, what changed since it began."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distgpt.checkpoint.store import Checkpoint
from distgpt.config.schema import Config
from distgpt.data.sampler import BatchPlan
from distgpt.distributed.context import DistributedContext
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.errors import pluralize
from distgpt.resilience.preflight import RunInputs
from distgpt.training.metrics import device_name

PACKAGE = Path(__file__).parent.parent


def platform_facts(context: DistributedContext) -> dict[str, Any]:
    """The environment that bitwise results depend on, besides the config. Checkpoints record it."""
    return {
        "torch": torch.__version__,
        "device": device_name(context.device),
        "ranks": context.world_size,
        "threads": context.num_threads,
    }


def software_versions() -> dict[str, str]:
    """What must be the same on every rank: Python, libraries and this package's own source."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return {
        "Python version": sys.version.split()[0],
        "torch version": torch.__version__,
        "numpy version": np.__version__,
        "distgpt's source": source.hexdigest()[:12],
    }


def format_run_header(
    config: Config, inputs: RunInputs, runtime: RuntimeConfig, plan: BatchPlan, context: DistributedContext
) -> str:
    """A human-readable description of the run: model, tokens, batch, steps, device, kernels, output, and notes."""
    model, dataset, n_vocab = config.model_config, inputs.dataset, inputs.tokenizer.n_vocab
    steps, tokens_per_step = config.num_training_steps, config.tokens_per_step
    epochs = steps * plan.sequences / len(dataset.train_windows(config.seq_len, n_vocab))
    flops = steps * tokens_per_step * model.flops_per_token(n_vocab, config.seq_len)
    threads = pluralize(context.num_threads, "thread") if context.device.type == "cpu" else ""
    compiled = "compiled" if runtime.compiles_blocks(config.mask_documents) else "not compiled"
    device = (threads, runtime.layout.describe(), runtime.precision, compiled, f"torch {torch.__version__}")
    lines = {
        "model": f"{model.model_type}, {pluralize(model.n_layer, 'layer')}, {pluralize(model.n_head, 'head')}, "
        f"hidden size {model.n_embd}, {pluralize(model.n_positions, 'position')}, "
        f"{pluralize(model.num_parameters(n_vocab), 'parameter')}",
        "tokens": f"{dataset.path}: {len(dataset.train):,} train, {len(dataset.val):,} val "
        f"({config.tokenizer_encoding}, vocabulary {n_vocab:,})",
        "batch": plan.equation(config.seq_len),
        "steps": f"{steps:,} ({steps * tokens_per_step:,} tokens, {epochs:.2f} epochs, {flops:.2g} FLOPs)",
        "device": f"{context.world_size} x {device_name(context.device)}" + "".join(f", {d}" for d in device if d),
        "kernels": runtime.kernels(config).describe(),
        "output": f"{config.output_dir} (the same command resumes a stopped run)",
    }
    if inputs.source:
        lines["from"] = f"{inputs.source}: starting from its weights"
    if inputs.resume:
        lines["resume"] = f"{inputs.resume.path}: after step {inputs.resume.step:,}"
    notes = [f"note    {note}" for note in [*inputs.notes, *_reproducibility_warnings(inputs.resume, context)]]
    return "\n".join([*(f"{name:<8}{text}" for name, text in lines.items()), *notes])


def _reproducibility_warnings(resume: Checkpoint | None, context: DistributedContext) -> Iterator[str]:
    """Why a resumed run will not be bit-identical to an uninterrupted one, if it will not."""
    current, saved = platform_facts(context), resume.state["run"].get("platform", {}) if resume else {}
    changed = [
        f"{name} {value} (was {saved[name]})" for name, value in current.items() if saved.get(name, value) != value
    ]
    if changed:
        yield f"results will not be bit-identical to an uninterrupted run: {', '.join(changed)}"
