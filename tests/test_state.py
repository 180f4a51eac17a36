"""The parts of a training state: names on disk do not depend on how the model is wrapped, and numbers are plain."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from distgpt.models.gpt2 import DecoderLM
from distgpt.optim.optimizers import AdamWConfig
from distgpt.training.state import ModelState, OptimizerState, Progress, RunFacts


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def make_model(wrapping: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with its optimizer after an update."""
    model = DecoderLM(257, 16, 4, 8, 2, seed=1)
    if "checkpoint_wrapper" in wrapping:
        for layer, block in enumerate(model.blocks):
            model.blocks[layer] = checkpoint_wrapper(block)
    if "compile" in wrapping:
        for block in model.blocks:
            block.compile(backend="eager")
    wrapped = DistributedDataParallel(model) if "ddp" in wrapping else model
    optimizer = AdamWConfig().build(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    update(wrapped, optimizer)
    return wrapped, optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(8)[None], targets=torch.arange(8)[None]).backward()
    optimizer.step()


def clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("wrapping", ["checkpoint_wrapper", "compile", "ddp", "checkpoint_wrapper compile ddp"])
def test_names_and_tensors_do_not_depend_on_wrapping(wrapping: str, process_group: None) -> None:
    plain, plain_optimizer = make_model("")
    weights = ModelState(plain).state_dict()
    moments = OptimizerState(plain, plain_optimizer).state_dict()
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    wrapped, optimizer = make_model(wrapping)
    update(wrapped, optimizer)
    ModelState(wrapped).load_state_dict(clone(weights))
    OptimizerState(wrapped, optimizer).load_state_dict(clone(moments))
    for restored, saved in (
        (ModelState(wrapped).state_dict(), weights),
        (OptimizerState(wrapped, optimizer).state_dict(), moments),
    ):
        assert list(restored) == list(saved)
        assert all(torch.equal(restored[name], saved[name]) for name in saved)


def test_optimizer_settings_are_neither_saved_nor_restored() -> None:
    model, optimizer = make_model("")
    state = OptimizerState(model, optimizer)
    tensors = state.state_dict()
    assert tensors and all(isinstance(value, torch.Tensor) for value in tensors.values())
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 0.5, (0.1, 0.2)
    state.load_state_dict(tensors)
    assert all(group["lr"] == 0.5 and group["betas"] == (0.1, 0.2) for group in optimizer.param_groups)


def test_progress_counts_skipped_updates_in_all_and_in_a_row() -> None:
    progress = Progress.start(torch.device("cpu"))
    progress.val_loss = 3.0
    for skipped in (1.0, 1.0, 0.0, 1.0):
        progress.count_update(torch.tensor(skipped))
    saved = json.loads(json.dumps(progress.state_dict()))
    assert saved == {"skipped": [3.0, 1.0], "val_loss": None}
    resumed = Progress.start(torch.device("cpu"))
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.skipped, progress.skipped) and resumed.val_loss is None


def test_run_facts_are_json_and_restore_only_the_wandb_run() -> None:
    saved = RunFacts({"seed": 1}, {"compile": True}, 1, 4, {"torch": "2"}, "tokens", "tokenizer", "wandb-1")
    state_dict = json.loads(json.dumps(saved.state_dict()))
    resumed = RunFacts({"seed": 1}, {"compile": False}, 1, 4, {"torch": "3"}, "tokens", "tokenizer", "wandb-2")
    resumed.load_state_dict(state_dict)
    assert resumed.run_id == "wandb-1"
    assert resumed.runtime == {"compile": False} and resumed.platform == {"torch": "3"}
