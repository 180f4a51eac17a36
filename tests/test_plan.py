"""The plan on paper is what is measured: on meta-device models, and on what autograd keeps."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distgpt import config as configs
from distgpt.model import DecoderLM
from distgpt.parallel import Execution, parallelize
from distgpt.plan import BatchPlan, Layout, Sizes, Work, fits, largest_batch, memory, settle
from distgpt.tokenizer import load_tokenizer
from distgpt.trained import build_model
from tests.conftest import REPO, Run
from tests.test_exercise import ALONE

PUBLISHED = {"GPT-small": 124_439_808, "GPT-medium": 354_823_168, "GPT-large": 774_030_080, "GPT-xl": 1_557_611_200}
"""Parameters of GPT-2's four sizes."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_four_sizes_of_gpt2_are_what_was_published(name: str) -> None:
    config = configs.load(REPO / "configs" / f"{name}.yaml")
    sizes = config.model_config.sizes(50257)
    model = build_model(config, load_tokenizer("gpt2"))
    assert all(p.is_meta for p in model.parameters())
    padding = (50304 - 50257) * config.model_config.n_embd
    assert sizes.parameters == sum(p.numel() for p in model.parameters()) - padding == PUBLISHED[name]
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    assert shapes == sorted(sizes.outer_shapes + sizes.block_shapes * sizes.n_layer)
    for shards in (1, 3, 8, 64):
        largest = sum(len(p.chunk(shards)[0].flatten()) for p in model.parameters())
        assert sizes.stored(shards) == largest
    logits = model(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 8, 50257)


def kept_bytes(model: DecoderLM, batch: int, seq_len: int, execution: Execution) -> int:
    """What a forward pass allocates and leaves for backward, as the profiler of the allocator sees it."""
    running = parallelize(model, ALONE, execution)
    ids_BT = torch.zeros(batch, seq_len, dtype=torch.int64)
    gc.collect()  # what is freed meanwhile would count against what is allocated
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = running(ids_BT, targets_BT=ids_BT)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.events() or [])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_activations_on_paper_are_what_a_forward_pass_leaves(kind: str, bf16: bool) -> None:
    """Layers added to a model, so that what is outside them cancels."""
    batch, seq_len, layers = 16, 64, (1, 3)
    layout = Layout(activation_checkpointing=kind)
    execution = Execution("bf16" if bf16 else "fp32", False, "cpu", layout)
    measured, planned = [], []
    for n_layer in layers:
        plan = memory(Work(Sizes(64, 128, 2, seq_len, n_layer), BatchPlan(batch, batch, 1), seq_len, bf16), layout)
        measured.append(kept_bytes(DecoderLM(64, 128, 2, seq_len, n_layer), batch, seq_len, execution))
        planned.append(plan["activations"] + plan["weight copies"])
    assert measured[1] - measured[0] == pytest.approx(planned[1] - planned[0], rel=0.02)


XL = Work(Sizes(50257, 1600, 25, 1024, 48), BatchPlan(512, 8, 8), 1024, bf16=True)


@pytest.mark.parametrize("layout", [Layout("ddp", 8), Layout("fsdp", 8, 8), Layout("hsdp", 8, 4)], ids=str)
@pytest.mark.parametrize("reduce_gradients", ["auto", "last", "each"])
def test_the_largest_batch_fits_and_one_more_does_not(layout: Layout, reduce_gradients: str) -> None:
    device_bytes = 60e9
    most = largest_batch(XL, layout, reduce_gradients, device_bytes)

    def enough(batch_size: int) -> bool:
        work = dataclasses.replace(XL, batch=BatchPlan(batch_size * 8 * XL.batch.micro_steps, batch_size, 8))
        return fits(work, settle(work, layout, reduce_gradients, device_bytes), device_bytes)

    assert most > 0 and enough(most) and not enough(most + 1)


def test_sharding_saves_memory_and_exchanging_often_saves_more() -> None:
    def total(layout: Layout) -> int:
        return sum(memory(XL, layout).values())

    ddp, fsdp, each = Layout("ddp", 8), Layout("fsdp", 8, 8), Layout("fsdp", 8, 8, reduce_each=True)
    assert total(ddp) > total(Layout("hsdp", 8, 4)) > total(fsdp) > total(each)
    assert settle(XL, fsdp, "auto", 80e9) == fsdp and settle(XL, fsdp, "auto", 30e9) == each


def test_the_plan_is_printed_without_torch(run: Run, tmp_path: Path) -> None:
    done = run("config", REPO / "configs/GPT-xl.yaml", "--plan", "--ranks", "64", "--gpu-memory", "141")
    assert done.returncode == 0, done.stderr
    lines = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    assert lines["GB on each rank"] == ["ddp", "fsdp", "hsdp", "8", "x", "8"]
    parts = ("weights", "moments", "gradients", "weight copies", "activations", "logits")
    for column, total in enumerate(lines["total"]):
        assert sum(float(lines[part][column]) for part in parts) == pytest.approx(float(total), rel=0.01)
    assert lines["fits 141 GB"] == ["yes"] * 3
    assert done.stdout.strip() in (REPO / "README.md").read_text()  # what the README shows is what it prints


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "0"), "--ranks: got 0, expected a number from 1"),
        (("--gpu-memory", "nan"), "--gpu-memory: got nan, expected GB above 0"),
        (
            ("--ranks", "7", "parallel.strategy=hsdp", "parallel.shard_ranks=3"),
            "parallel.shard_ranks: got 3 with 7 ranks",
        ),
    ],
)
def test_a_plan_for_nothing_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("config", REPO / "configs/GPT-xl.yaml", "--plan", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
