"""The plan on paper is what is measured: on meta-device models, and on what autograd keeps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distgpt import config as configs
from distgpt.checkpoint import build_model
from distgpt.model import DecoderLM
from distgpt.parallel import Execution, parallelize
from distgpt.plan import BatchPlan, Layout, Sizes, memory
from distgpt.tokenizer import load_tokenizer
from tests.conftest import REPO
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
    layout = Layout(activation_checkpointing=kind, bf16=bf16)
    execution = Execution("bf16" if bf16 else "fp32", False, "cpu", layout)
    measured, planned = [], []
    for n_layer in layers:
        plan = memory(Sizes(64, 128, 2, seq_len, n_layer), layout, BatchPlan(batch, batch, 1), seq_len)
        measured.append(kept_bytes(DecoderLM(64, 128, 2, seq_len, n_layer), batch, seq_len, execution))
        planned.append(plan["activations"] + plan["weight copies"])
    assert measured[1] - measured[0] == pytest.approx(planned[1] - planned[0], rel=0.02)
