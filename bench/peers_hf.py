"""Hugging Face's `Trainer` with `GPT2LMHeadModel`; `python -m bench.speed` starts it in its own environment.

Everything is at its default except what all contestants share: the data and their order, AdamW's settings, and one
printed line per step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (  # type: ignore[import-not-found]
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.contest import (
    BETAS,
    EPS,
    GRAD_CLIP,
    LEARNING_RATE,
    VOCAB,
    WEIGHT_DECAY,
    StepTimer,
    Task,
    read_task,
    rename_weights,
)

NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "blocks.": "h.",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
    "final_norm": "ln_f",
}
"""Parts of distgpt's parameter names, and their names in GPT2Model."""


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The shared batches as single sequences, in order."""

    def __init__(self, task: Task) -> None:
        self.rows = task.batches()[: task.steps].reshape(-1, task.shape.positions + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        # The model would shift `labels`, which loses the last target of each sequence.
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


class TimerCallback(TrainerCallback):  # type: ignore[misc]
    """Prints a line for each step that the Trainer logs."""

    def __init__(self, task: Task) -> None:
        self.timer = StepTimer(task)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer = StepTimer(self.timer.task)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.timer.log(state.global_step, logs["loss"])


def build_model(task: Task) -> Any:
    """GPT-2 with distgpt's initial weights."""
    shape = task.shape
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    weights = rename_weights(task.initial_weights(), NAMES)
    # GPT2Model's Conv1D stores transposed matrices.
    weights = {
        name: values.T if values.ndim == 2 and name.startswith("h.") else values for name, values in weights.items()
    }
    model.transformer.load_state_dict(weights)
    return model


def main() -> None:
    """Train."""
    task = read_task(str(__doc__))
    on_cpu = task.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(task.folder / "hf"),
        max_steps=task.steps,
        per_device_train_batch_size=task.shape.sequences // task.world_size // task.accumulate,
        gradient_accumulation_steps=task.accumulate,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=GRAD_CLIP,
        bf16=task.precision == "bf16",
        use_cpu=on_cpu,
        ddp_backend=None if task.world_size == 1 else "gloo" if on_cpu else "nccl",
        logging_steps=task.log_every,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(build_model(task), arguments, train_dataset=Sequences(task), callbacks=[TimerCallback(task)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
