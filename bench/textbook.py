"""The training loop of a textbook, as a baseline for distgpt's speed.

Separate q, k, v; explicit softmax attention; fp32; all logits at once; default AdamW; loss.item() every step.
One process, or torchrun with DDP. `python -m bench.speed` prepares its folder and starts it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contest import BETAS, GRAD_CLIP, LEARNING_RATE, VOCAB, StepTimer, micro_batches, read_task, rename_weights

NAMES = {
    "token_embedding": "tokens",
    "position_embedding": "positions",
    "attention_norm": "ln1",
    "attention.": "",
    "mlp_norm": "ln2",
    "mlp_up": "up",
    "mlp_down": "down",
    "final_norm": "ln",
}
"""Parts of distgpt's parameter names, and their names here."""


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mask: Tensor
        self.register_buffer("mask", torch.tril(torch.ones(positions, positions)).bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape

        def split(z: Tensor) -> Tensor:
            return z.view(B, T, self.heads, D // self.heads).transpose(1, 2)

        y = self.ln1(x)
        q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(D // self.heads)
        weights = scores.masked_fill(~self.mask[:T, :T], float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(B, T, D))
        out: Tensor = x + self.down(F.gelu(self.up(self.ln2(x))))
        return out


class Textbook(nn.Module):
    """A GPT with tied embeddings."""

    def __init__(self, layers: int, heads: int, width: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, positions) for _ in range(layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.ln(x) @ self.tokens.weight.T
        return logits


def initial_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """distgpt's weights under this model's names, with q, k and v separated."""
    result: dict[str, Tensor] = {}
    for name, values in rename_weights(weights, NAMES).items():
        if ".qkv." in name:
            result |= {name.replace("qkv", part): third for part, third in zip("qkv", values.chunk(3), strict=True)}
        else:
            result[name] = values
    return result


def main() -> None:
    """Train."""
    task = read_task(str(__doc__))
    shape, device = task.shape, task.device
    model: nn.Module = Textbook(shape.layers, shape.heads, shape.width, shape.positions)
    model.load_state_dict(initial_weights(task.initial_weights()))
    model.to(device)
    if task.world_size > 1:
        torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS)
    timer = StepTimer(task)
    for step, batch in enumerate(task.batches()[: task.steps], 1):
        optimizer.zero_grad()
        total_loss = 0.0
        for ids, targets in micro_batches(task, batch):
            logits = model(ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / task.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total_loss += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        if timer.is_due(step):
            timer.log(step, total_loss)
    if task.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
