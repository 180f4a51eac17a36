"""What `auto` resolves to for a run: precision, compilation and the parallel layout. All ranks must call.

Resolved once, kept in the checkpoint and used again on resume, since each of them affects rounding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from distgpt.config.schema import Config
from distgpt.data.sampler import BatchPlan
from distgpt.distributed.context import DistributedContext
from distgpt.distributed.estimate import StepWorkload, fits_in_memory, resolve_grad_sync
from distgpt.distributed.layout import ParallelLayout
from distgpt.errors import ConfigError, RuntimeEnvironmentError
from distgpt.models.kernels import Kernels, resolve_kernels

COMPILE_BREAK_EVEN_SECONDS = 60
"""Estimated eager training time from which compiling (5 to 30 s when nothing is cached) pays."""

EAGER_FLOPS = {"cpu": 1e11, "cuda": 2e12}
"""What small models reach without compilation, in FLOP/s: GPT-tiny on two CPU cores, and on an A10G."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run is executed. It changes speed, memory and rounding, nothing else."""

    precision: str
    """bf16, tf32 or fp32."""
    compile: bool
    device: str
    """Type of the device that it was resolved for."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)

    def compiles_blocks(self, has_documents: bool) -> bool:
        """Whether blocks are compiled. Document attention breaks a block's graph, and selective activation
        checkpointing does not work on the compiled pieces, so that such blocks stay eager."""
        return self.compile and not (has_documents and self.layout.activation_checkpointing == "selective")

    def kernels(self, config: Config) -> Kernels:
        """The implementations that the model is built with."""
        blocks_compiled = self.compiles_blocks(config.mask_documents)
        sizes = config.model_config.head_size, config.seq_len
        return resolve_kernels(self.device, self.precision, self.compile, blocks_compiled, *sizes)

    def autocast(self) -> AbstractContextManager[None]:
        """The context to call the model in."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()


def resolve_runtime(
    config: Config, n_vocab: int, context: DistributedContext, previous: RuntimeConfig | None = None
) -> RuntimeConfig:
    """Resolve what the config leaves open for this machine; rank 0 decides for all.

    `previous` is what the run being resumed used; what still applies is used again. Raises ConfigError where the ranks
    do not suit the strategy, RuntimeEnvironmentError if the config asks to compile where that does not work.
    """
    if previous is None or previous.device != context.device.type:
        precision, compiled = resolve_precision(config, context), _resolve_compile(config, n_vocab, context)
        previous = None
    else:
        precision, compiled = previous.precision, previous.compile
    if previous is not None and previous.layout.world_size == context.world_size:
        layout = previous.layout
    else:
        layout = _resolve_layout(config, n_vocab, precision, context)
    _check_layout(layout, context)
    return RuntimeConfig(precision, compiled, context.device.type, layout)


def resolve_precision(config: Config, context: DistributedContext) -> str:
    """bf16 where rank 0's device has native bf16 matmuls, unless the config says otherwise."""
    auto = "bf16" if _has_native_bf16(context.device) else "fp32"
    return str(context.broadcast_object(auto if config.precision == "auto" else config.precision))


def _resolve_compile(config: Config, n_vocab: int, context: DistributedContext) -> bool:
    """Whether to compile: as the config says, or where that works and pays.

    A warm compile cache does not count: otherwise the second run of a command could differ in rounding from the first.
    """
    remedy = "install a C++ compiler (Debian: apt install g++ python3-dev)"
    if config.compile == "on" and not _can_compile(context.device):
        raise RuntimeEnvironmentError(
            f"compile: got on, but compiling a test function failed here; {remedy}, or use compile=auto"
        )
    compiled = config.compile == "on"
    if config.compile == "auto" and context.is_rank0:
        flops_per_token = config.model_config.flops_per_token(n_vocab, config.seq_len)
        flops = config.num_training_steps * config.tokens_per_step * flops_per_token
        pays = flops / EAGER_FLOPS.get(context.device.type, float("inf")) > COMPILE_BREAK_EVEN_SECONDS
        compiled = pays and _can_compile(context.device)
        if pays and not compiled:
            reason = "not compiled, since compiling a test function failed here"
            print(f"note    {reason}; {remedy} for a faster run\n", end="", flush=True)
    return bool(context.broadcast_object(compiled))


def _resolve_layout(config: Config, n_vocab: int, precision: str, context: DistributedContext) -> ParallelLayout:
    """How the model is spread: `auto` shards it only where the estimated memory does not fit otherwise."""
    parallel, world_size = config.parallel, context.world_size
    batch = BatchPlan.from_config(config, world_size)
    workload = StepWorkload(config.model_config, n_vocab, batch, config.seq_len, precision)
    device_bytes = min(context.all_gather_object(context.memory_bytes))
    template = ParallelLayout(
        world_size=world_size,
        reshard_after_forward=parallel.reshard_after_forward,
        activation_checkpointing=config.activation_checkpointing,
        reduce_dtype=parallel.reduce_dtype,
    )
    strategy: str = parallel.strategy
    if strategy == "auto" and world_size == 1:
        strategy = "none"
    elif strategy == "auto":
        strategy = "ddp" if fits_in_memory(workload, replace(template, strategy="ddp"), device_bytes) else "fsdp"
    shard_sizes = {"fsdp": world_size, "hsdp": parallel.shard_size or _ranks_per_node(context)}
    layout = replace(template, strategy=strategy, shard_size=shard_sizes.get(strategy, 1))
    return resolve_grad_sync(workload, layout, parallel.grad_sync, device_bytes)


def _ranks_per_node(context: DistributedContext) -> int:
    """Ranks on each node; 0 where nodes differ."""
    sizes = set(context.all_gather_object(context.local_world_size))
    return int(sizes.pop()) if len(sizes) == 1 else 0


def _check_layout(layout: ParallelLayout, context: DistributedContext) -> None:
    """Raise ConfigError, on every rank, where these ranks cannot run a layout."""
    strategy, shard_size, world_size = layout.strategy, layout.shard_size, context.world_size
    problem = None
    if strategy == "none" and world_size > 1:
        problem = f"parallel.strategy: got none with {world_size} ranks, expected ddp, fsdp or hsdp; use auto"
    elif strategy != "none" and not context.is_distributed:
        problem = f"parallel.strategy: got {strategy} without torchrun, expected auto or none; start with torchrun"
    elif shard_size == 0:
        problem = (
            "parallel.shard_size: got null, but nodes have different numbers of ranks; "
            "set the number of ranks that share a replica"
        )
    elif world_size % shard_size:
        problem = (
            f"parallel.shard_size: got {shard_size} with {world_size} ranks, expected a divisor of {world_size}; "
            "change it, or the number of ranks"
        )
    if problem is not None:
        raise ConfigError(problem, on_all_ranks=True)


def _has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls run in hardware. Elsewhere they are emulated, slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tested by compiling a small function; it needs a C++ compiler or triton."""
    try:
        compiled = torch.compile(lambda x: x.exp() + 1, dynamic=False)
        return bool(torch.isfinite(compiled(torch.zeros(64, device=device))).all())
    except Exception:  # whatever the missing compiler, header or library raises
        return False
