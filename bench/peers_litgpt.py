"""litgpt's `GPT`, compiled, in a Lightning Fabric loop; `python -m bench.speed` starts it in its own environment.

The loop follows litgpt's own pretraining. Sizes, norms, MLP and tied embeddings are GPT-2's. litgpt has no learned
positions, so it keeps its rotary ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric  # type: ignore[import-not-found]
from litgpt.config import Config  # type: ignore[import-not-found]
from litgpt.model import GPT  # type: ignore[import-not-found]
from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

from bench.contest import (
    BETAS,
    EPS,
    GRAD_CLIP,
    LEARNING_RATE,
    VOCAB,
    WEIGHT_DECAY,
    StepTimer,
    Task,
    micro_batches,
    read_task,
    rename_weights,
)

NAMES = {
    "token_embedding": "transformer.wte",
    "blocks.": "transformer.h.",
    "attention_norm": "norm_1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_norm": "norm_2",
    "mlp_up": "mlp.fc",
    "mlp_down": "mlp.proj",
    "final_norm": "transformer.ln_f",
}
"""Parts of distgpt's parameter names, and their names in litgpt."""


def build_model(task: Task) -> Any:
    """The model with distgpt's initial weights, except the position embedding, which it lacks."""
    shape = task.shape
    config = Config(
        block_size=shape.positions,
        vocab_size=VOCAB,
        padding_multiple=64,  # as in distgpt; litgpt's default of 512 would make larger matmuls
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        parallel_residual=False,
        attn_bias=True,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        rotary_percentage=1.0,
        intermediate_size=4 * shape.width,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    weights = rename_weights(task.initial_weights(), NAMES)
    del weights["position_embedding.weight"]
    rows = weights["transformer.wte.weight"]
    padded = F.pad(rows, (0, 0, 0, config.padded_vocab_size - len(rows)))
    model.load_state_dict(weights | {"transformer.wte.weight": padded, "lm_head.weight": padded})
    return model


def main() -> None:
    """Train."""
    task = read_task(str(__doc__))
    on_cpu = task.device.type == "cpu"
    fabric = Fabric(
        accelerator="cpu" if on_cpu else "cuda",
        devices=task.world_size,
        strategy="ddp" if task.world_size > 1 else "auto",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
    )
    fabric.launch()
    model = fabric.setup(torch.compile(build_model(task)))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, fused=not on_cpu)
    optimizer = fabric.setup_optimizers(optimizer)
    timer = StepTimer(task)
    for step, batch in enumerate(task.batches()[: task.steps], 1):
        losses = []
        for index, (ids, targets) in enumerate(micro_batches(task, batch), 1):
            with fabric.no_backward_sync(model, enabled=index < task.accumulate):
                loss = chunked_cross_entropy(model(ids), targets)
                fabric.backward(loss / task.accumulate)
            losses.append(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if timer.is_due(step):
            timer.log(step, torch.stack(losses).mean().item())


if __name__ == "__main__":
    main()
