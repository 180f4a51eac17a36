"""What a checkpoint holds: the parts of a run that a resume needs, each implementing torch's `Stateful` protocol.

To add something to checkpoints, write a `Stateful` class and add one field to `TrainState`. Its `state_dict()` is flat:
tensors are stored in the safetensors files as "part.key", everything else (which must be valid JSON) in `state.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class ModelState(Stateful):
    """The weights under their canonical names: what DDP, FSDP, checkpoint_wrapper and compile add is stripped."""

    module: nn.Module
    """The model as `parallelize` returned it."""

    def state_dict(self) -> dict[str, Any]:
        """Every weight by name; under FSDP this rank's shards, as DTensors."""
        return get_model_state_dict(self.module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every weight. All ranks must call."""
        set_model_state_dict(self.module, state_dict)


@dataclass
class OptimizerState(Stateful):
    """The optimizer's tensors (step counts and moments), named after the weights they belong to.

    Its settings, such as the betas, are not saved: the config gives them.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Every tensor as "state.WEIGHT.NAME"; zeros before the first update."""
        return {name: value for name, value in self._flat().items() if isinstance(value, Tensor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every tensor; the settings stay as they are. All ranks must call."""
        set_optimizer_state_dict(self.module, self.optimizer, self._flat() | state_dict, options=_FLAT)

    def _flat(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.module, self.optimizer, options=_FLAT)


@dataclass
class RunFacts(Stateful):
    """What identifies a run and must match, or be reported as changed, when it is resumed. Plain JSON."""

    config: dict[str, Any]
    runtime: dict[str, Any]
    """The resolved precision, compilation, device and parallel layout."""
    order_version: int
    """Version of the formula that orders the training sequences."""
    sequences_per_step: int
    platform: dict[str, Any]
    """What else affects the last bits of a result, such as the version of torch and the number of ranks."""
    tokens: str
    """Fingerprint of the token file."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    run_id: str
    """Identifies the run to trackers."""

    def state_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the run id. The other fields describe the current process and stay as they are."""
        self.run_id = state_dict.get("run_id") or self.run_id


@dataclass
class Progress(Stateful):
    """Counters and the last validation loss of a run."""

    skipped: Tensor
    """Updates skipped because the gradient was not finite: [total, consecutive]. fp32, on the run's device."""
    val_loss: float | None = None
    """Of the weights as they are now; None if they were not evaluated."""

    @classmethod
    def start(cls, device: torch.device) -> Progress:
        """The progress of a run that has made no update."""
        return cls(torch.zeros(2, device=device))

    def count_update(self, skipped: Tensor) -> None:
        """Count one update, which makes `val_loss` outdated. `skipped` (on the device) is 1 if it was, else 0."""
        self.skipped = (self.skipped + skipped) * torch.stack([torch.ones_like(skipped), skipped])
        self.val_loss = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Waits for the device."""
        return {"skipped": self.skipped.tolist(), "val_loss": self.val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set both fields."""
        self.skipped = torch.tensor(state_dict["skipped"], dtype=self.skipped.dtype, device=self.skipped.device)
        self.val_loss = state_dict["val_loss"]


@dataclass
class TrainState(Stateful):
    """All parts of a checkpoint. Each field is one part, and its name prefixes the names of the part's tensors."""

    model: ModelState
    optimizer: OptimizerState
    run: RunFacts
    progress: Progress

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{part: {key: value}}. All ranks must call."""
        return {field.name: getattr(self, field.name).state_dict() for field in dataclasses.fields(self)}

    def load_state_dict(self, state_dict: dict[str, dict[str, Any]]) -> None:
        """Load the parts that are given; the others stay as they are. All ranks must call."""
        for field in dataclasses.fields(self):
            if field.name in state_dict:
                getattr(self, field.name).load_state_dict(state_dict[field.name])
