"""Plain model in, running model out: precision, compilation, and DDP around it. The model does not know.

Every rank calls every function here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distgpt.config import Config
from distgpt.errors import MachineError
from distgpt.loss import exp_rows
from distgpt.model import DecoderLM
from distgpt.world import World, keep_freed_memory

COMPILE_PAYS_SECONDS = 60
"""Estimated eager training time from which compiling (5 to 30 s, when nothing is cached) is worth its wait."""

EAGER_FLOPS = {"cpu": 5e10, "cuda": 2e12}
"""What small models reach without compilation, in FLOP/s: GPT-tiny on two CPU cores, and on an A10G."""


@dataclass(frozen=True)
class Execution:
    """What `auto` came to. Decided once, kept in the checkpoint, and used again on resume: it moves the last bits."""

    precision: str
    compile: bool
    device: str
    """Type of the device it was decided for."""


def decide(config: Config, n_vocab: int, world: World, may_compile: bool = True) -> Execution:
    """Resolve `precision` and `compile` for this machine; rank 0 decides for all. Every rank calls.

    Raises MachineError if the config asks to compile where that does not work.
    """
    precision: str = config.precision
    compiled = may_compile and config.compile == "on"
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(world.device) else "fp32"
    if config.compile == "auto" and may_compile and world.is_first:
        tokens = config.num_training_steps * config.sequences_per_step * config.seq_len
        flops = tokens * config.model_config.flops_per_token(n_vocab, config.seq_len)
        seconds = flops / EAGER_FLOPS.get(world.device.type, float("inf"))
        compiled = seconds > COMPILE_PAYS_SECONDS and can_compile(world.device)
    elif compiled and not can_compile(world.device):
        raise MachineError(
            "compile: got on, but compiling a line failed here; install a C++ compiler (Debian: apt install g++ "
            "python3-dev), or use compile=auto"
        )
    return Execution(*world.from_first((precision, compiled, world.device.type)))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls run in hardware: elsewhere they are emulated, slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out by compiling one line; it needs a C++ compiler or triton."""
    try:
        compiled = torch.compile(lambda x: x.exp() + 1, dynamic=False)
        return bool(torch.isfinite(compiled(torch.zeros(64, device=device))).all())
    except Exception:  # whatever the missing compiler, header or library raises
        return False


def parallelize(model: DecoderLM, world: World, execution: Execution) -> nn.Module:
    """The model made ready to train on this rank's device; parameters keep their names in `model` itself."""
    model.to(world.device)
    torch.set_float32_matmul_precision("high" if execution.precision == "tf32" else "highest")
    if execution.precision == "bf16":
        model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    if execution.compile:
        compile_parts(model, world.device)
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def compile_parts(model: DecoderLM, device: torch.device) -> None:
    """Compile blocks (one compilation serves all) and head, in place, so that no parameter changes its name.

    The embeddings stay outside: compiled for the CPU, their backward adds atomically, and no two runs are alike.
    """
    for block in model.blocks:
        block.compile(dynamic=False)
    if device.type == "cpu":
        keep_freed_memory()
        model.head.exp_rows = torch.compile(exp_rows, dynamic=False)
    else:
        model.head.compile(dynamic=False)


@contextmanager
def synchronised(running: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-step: only the last of an update exchanges gradients between ranks."""
    if last or not isinstance(running, DistributedDataParallel):
        yield
    else:
        with running.no_sync():
            yield
