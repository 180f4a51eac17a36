"""Estimates equal what is measured: on meta-device models, and on what autograd keeps for backward."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distgpt.checkpoint.weights import build_model
from distgpt.config.loader import load_config
from distgpt.data.sampler import BatchPlan
from distgpt.data.tokenizer import load_tokenizer
from distgpt.distributed.estimate import (
    StepWorkload,
    estimate_memory,
    fits_in_memory,
    largest_batch,
    resolve_grad_sync,
)
from distgpt.distributed.layout import ParallelLayout
from distgpt.distributed.parallelize import parallelize
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.models.architectures import GPT2Config
from distgpt.models.language_model import LanguageModel
from tests.conftest import REPO, Run
from tests.ranks import SINGLE_PROCESS

PUBLISHED = {"GPT-small": 124_439_808, "GPT-medium": 354_823_168, "GPT-large": 774_030_080, "GPT-xl": 1_557_611_200}
"""Parameters of GPT-2's four sizes."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_four_sizes_of_gpt2_are_the_published_ones(name: str) -> None:
    config = load_config(REPO / "configs" / f"{name}.yaml")
    model = build_model(config, load_tokenizer("gpt2"))
    assert all(p.is_meta for p in model.parameters())
    padding = (50304 - 50257) * config.model_config.n_embd
    num_parameters = sum(p.numel() for p in model.parameters()) - padding
    assert config.model_config.num_parameters(50257) == num_parameters == PUBLISHED[name]
    shapes = {parameter_name: tuple(p.shape) for parameter_name, p in model.named_parameters()}
    assert shapes == config.model_config.parameter_shapes(50257)
    workload = StepWorkload(config.model_config, 50257, BatchPlan(8, 8, 1), 1024, "fp32")
    for shard_size in (1, 3, 8, 64):
        largest = sum(len(p.chunk(shard_size)[0].flatten()) for p in model.parameters())
        assert workload.sharded_numel(shard_size) == largest
    logits = model(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 8, 50257)


def saved_for_backward(model: LanguageModel, batch: int, seq_len: int, runtime: RuntimeConfig) -> int:
    """Bytes that a forward pass allocates and leaves for backward, as the profiler of the allocator sees them."""
    wrapped = parallelize(model, SINGLE_PROCESS, runtime)
    ids_BT = torch.zeros(batch, seq_len, dtype=torch.int64)
    gc.collect()  # what is freed meanwhile would count against what is allocated
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, runtime.autocast():
        loss = wrapped(ids_BT, targets=ids_BT)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.events() or [])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_estimated_activations_are_what_a_forward_pass_keeps(kind: str, precision: str) -> None:
    """Of layers added to a model, so that what is outside them cancels."""
    batch, seq_len, layers = 16, 64, (1, 3)
    layout = ParallelLayout(activation_checkpointing=kind)
    runtime = RuntimeConfig(precision, False, "cpu", layout)
    measured, estimated = [], []
    for n_layer in layers:
        config = GPT2Config(n_embd=128, n_head=2, n_positions=seq_len, n_layer=n_layer)
        estimate = estimate_memory(StepWorkload(config, 64, BatchPlan(batch, batch, 1), seq_len, precision), layout)
        measured.append(saved_for_backward(config.build(64), batch, seq_len, runtime))
        estimated.append(estimate["activations"] + estimate["cast or gathered weights"])
    assert measured[1] - measured[0] == pytest.approx(estimated[1] - estimated[0], rel=0.02)


XL_SIZES = GPT2Config(n_embd=1600, n_head=25, n_positions=1024, n_layer=48)
XL = StepWorkload(XL_SIZES, 50257, BatchPlan(512, 8, 8), 1024, "bf16")


@pytest.mark.parametrize(
    "layout", [ParallelLayout("ddp", 8), ParallelLayout("fsdp", 8, 8), ParallelLayout("hsdp", 8, 4)], ids=str
)
@pytest.mark.parametrize("grad_sync", ["auto", "last", "each"])
def test_the_largest_batch_fits_and_one_more_does_not(layout: ParallelLayout, grad_sync: str) -> None:
    device_bytes = 60e9
    largest = largest_batch(XL, layout, grad_sync, device_bytes)

    def fits(batch_size: int) -> bool:
        workload = dataclasses.replace(XL, batch=BatchPlan(batch_size * 8 * XL.batch.micro_steps, batch_size, 8))
        return fits_in_memory(workload, resolve_grad_sync(workload, layout, grad_sync, device_bytes), device_bytes)

    assert largest > 0 and fits(largest) and not fits(largest + 1)


def test_sharding_saves_memory_and_reducing_often_saves_more() -> None:
    def total(layout: ParallelLayout) -> int:
        return sum(estimate_memory(XL, layout).values())

    ddp, fsdp, each = (
        ParallelLayout("ddp", 8),
        ParallelLayout("fsdp", 8, 8),
        ParallelLayout("fsdp", 8, 8, sync_each_micro_step=True),
    )
    assert total(ddp) > total(ParallelLayout("hsdp", 8, 4)) > total(fsdp) > total(each)
    assert resolve_grad_sync(XL, fsdp, "auto", 80e9) == fsdp and resolve_grad_sync(XL, fsdp, "auto", 30e9) == each


def test_the_estimate_is_printed_as_the_docs_show(run: Run, tmp_path: Path) -> None:
    done = run("config", REPO / "configs/GPT-xl.yaml", "--estimate", "--ranks", "64", "--gpu-memory", "141")
    assert done.returncode == 0, done.stderr
    lines = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()}
    assert lines["GB per rank"] == ["ddp", "fsdp", "hsdp", "8", "x", "8"]
    parts = ("weights", "optimizer state", "gradients", "cast or gathered weights", "activations", "logits")
    for column, total in enumerate(lines["total"]):
        assert sum(float(lines[part][column]) for part in parts) == pytest.approx(float(total), rel=0.01)
    assert lines["fits 141 GB"] == ["yes"] * 3
    assert done.stdout.strip() in (REPO / "docs" / "parallelism.md").read_text()  # what the docs show is what it prints


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "0"), "--ranks: got 0, expected a number from 1"),
        (("--gpu-memory", "nan"), "--gpu-memory: got nan, expected GB above 0"),
        (
            ("--ranks", "7", "parallel.strategy=hsdp", "parallel.shard_size=3"),
            "parallel.shard_size: got 3 with 7 ranks",
        ),
    ],
)
def test_an_estimate_for_impossible_numbers_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("config", REPO / "configs/GPT-xl.yaml", "--estimate", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
