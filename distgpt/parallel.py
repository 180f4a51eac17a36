"""Plain model in, running model out: recomputation, compilation, precision, and DDP or FSDP. The model does not know.

Every rank calls every function here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from distgpt.config import Config
from distgpt.errors import ConfigError, MachineError, NumericsError
from distgpt.loss import Tiles, exp_rows
from distgpt.model import DecoderLM
from distgpt.plan import Layout, fits, settle
from distgpt.world import World

COMPILE_PAYS_SECONDS = 60
"""Estimated eager training time from which compiling (5 to 30 s, when nothing is cached) is worth its wait."""

EAGER_FLOPS = {"cpu": 1e11, "cuda": 2e12}
"""What small models reach without compilation, in FLOP/s: GPT-tiny on two CPU cores, and on an A10G."""

Weights = Iterable[tuple[nn.Parameter, Tensor]]
"""Parameters, each with its whole values on the CPU."""

aten = torch.ops.aten
SAVED_WHEN_SELECTIVE = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""Outputs that selective recomputation keeps: matmuls and attention, the dear ones (Korthikanti et al. 2022)."""


@dataclass(frozen=True)
class Execution:
    """What `auto` came to. Decided once, kept in the checkpoint, and used again on resume: it moves the last bits."""

    precision: str
    compile: bool
    device: str
    """Type of the device it was decided for."""
    layout: Layout = field(default_factory=Layout)


def decide(config: Config, n_vocab: int, world: World, kept: Execution | None = None) -> Execution:
    """Resolve what the config leaves to us for this machine; rank 0 decides for all. Every rank calls.

    `kept` is what the run being continued had decided: what still applies is used again. Raises ConfigError where
    the ranks do not suit the strategy, MachineError if the config asks to compile where that does not work.
    """
    if kept is None or kept.device != world.device.type:
        precision, compiled = decide_precision(config, world), decide_compile(config, n_vocab, world)
    else:
        precision, compiled = kept.precision, kept.compile
    if kept is not None and kept.layout.ranks == world.size and kept.device == world.device.type:
        layout = kept.layout
    else:
        layout = decide_layout(config, n_vocab, precision, world)
    check_layout(layout, world)
    return Execution(precision, compiled, world.device.type, layout)


def decide_precision(config: Config, world: World) -> str:
    """bf16 where rank 0's device multiplies it, unless the config says. Every rank calls."""
    auto = "bf16" if multiplies_bf16(world.device) else "fp32"
    return str(world.from_first(auto if config.precision == "auto" else config.precision))


def decide_compile(config: Config, n_vocab: int, world: World) -> bool:
    """Whether to compile: as the config says, or where that works and pays. Every rank calls.

    What is cached does not count: the same command would otherwise give other bits the second time.
    """
    remedy = "install a C++ compiler (Debian: apt install g++ python3-dev)"
    if config.compile == "on" and not can_compile(world.device):
        raise MachineError(f"compile: got on, but compiling a line failed here; {remedy}, or use compile=auto")
    compiled = config.compile == "on"
    if config.compile == "auto" and world.is_first:
        flops_per_token = config.model_config.sizes(n_vocab).flops_per_token(config.seq_len)
        flops = config.num_training_steps * config.tokens_per_step * flops_per_token
        seconds = flops / EAGER_FLOPS.get(world.device.type, float("inf"))
        pays = seconds > COMPILE_PAYS_SECONDS
        compiled = pays and can_compile(world.device)
        if pays and not compiled:
            print(f"note    not compiled, since compiling a line failed here; {remedy} for a faster run", flush=True)
    return bool(world.from_first(compiled))


def decide_layout(config: Config, n_vocab: int, precision: str, world: World) -> Layout:
    """How the model is spread: for `auto`, over as few ranks as its memory on paper allows. Every rank calls."""
    asked, work = config.parallel, config.work(n_vocab, world.size, precision)
    device_bytes = min(world.gather(world.memory_bytes))
    template = Layout(
        ranks=world.size,
        reshard_after_forward=asked.reshard_after_forward,
        activation_checkpointing=config.activation_checkpointing,
        reduce_dtype=asked.reduce_dtype,
    )
    strategy: str = asked.strategy
    if strategy == "auto" and world.size == 1:
        strategy = "none"
    elif strategy == "auto":
        strategy = "ddp" if fits(work, replace(template, strategy="ddp"), device_bytes) else "fsdp"
    shard_ranks = {"fsdp": world.size, "hsdp": asked.shard_ranks or ranks_of_a_machine(world)}.get(strategy, 1)
    layout = replace(template, strategy=strategy, shard_ranks=shard_ranks)
    return settle(work, layout, asked.reduce_gradients, device_bytes)


def ranks_of_a_machine(world: World) -> int:
    """Ranks on each machine, 0 where machines differ. Every rank calls."""
    found = set(world.gather(world.local_size))
    return int(found.pop()) if len(found) == 1 else 0


def check_layout(layout: Layout, world: World) -> None:
    """Raise ConfigError, on every rank, where these ranks cannot run a layout."""
    strategy, shard_ranks = layout.strategy, layout.shard_ranks
    if strategy == "none" and world.size > 1:
        raise ConfigError(
            f"parallel.strategy: got none with {world.size} ranks, expected ddp, fsdp or hsdp; use auto",
            everywhere=True,
        )
    if strategy != "none" and not world.grouped:
        raise ConfigError(
            f"parallel.strategy: got {strategy} without torchrun, expected auto or none; start with torchrun",
            everywhere=True,
        )
    if shard_ranks == 0:
        raise ConfigError(
            "parallel.shard_ranks: got null with machines of different numbers of ranks; say how many ranks share a "
            "model",
            everywhere=True,
        )
    if world.size % shard_ranks:
        raise ConfigError(
            f"parallel.shard_ranks: got {shard_ranks} with {world.size} ranks, expected a divisor of {world.size}; "
            "change it, or the number of ranks",
            everywhere=True,
        )


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


@dataclass(frozen=True)
class Running:
    """A model ready to train: called like the model itself."""

    module: nn.Module
    """The model as DDP or FSDP wrapped it."""
    layout: Layout

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The model's own forward."""
        result: Tensor = self.module(*args, **kwargs)
        return result

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-step: gradients are exchanged on the last of an update only.

        `reduce_each` adds up shards instead of whole gradients, at the price of an exchange each time.
        """
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last or self.layout.reduce_each)
            self.module.set_requires_all_reduce(last)
            self.module.set_reshard_after_backward(last or self.layout.reshard_after_forward)
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield

    def check_replicas(self, step: int, world: World) -> None:
        """Raise NumericsError, on every rank, unless all ranks that hold the same weights hold the same bits of them.

        A fault of memory or of a processor makes them differ without a sign in the loss. Every rank calls.
        """
        shard_ranks = self.layout.shard_ranks
        if shard_ranks == world.size:
            return
        mine = [local(p.detach()) for p in self.module.parameters()]
        hashes = torch.stack([torch.hash_tensor(part).view(torch.int64) for part in mine if part.numel()])
        everyone = world.gather(hashlib.sha256(repr(hashes.tolist()).encode()).hexdigest())
        for shard in range(shard_ranks):
            ranks = range(shard, world.size, shard_ranks)
            found = [everyone[rank] for rank in ranks]
            most = max(found, key=found.count)
            odd = [rank for rank in ranks if everyone[rank] != most]
            if odd:
                who = (
                    f"rank {odd[0]} holds"
                    if found.count(most) > len(ranks) / 2
                    else f"ranks {ranks[0]} and {odd[0]} hold"
                )
                raise NumericsError(
                    f"step {step}: {who} other weights than the rest, expected the same bits on ranks {list(ranks)}; "
                    "suspect its memory or processor; the same command goes on from the last checkpoint",
                    everywhere=True,
                )

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` if it is longer; returns its global norm, the same on every rank."""
        parameters = list(self.module.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):  # so far of this rank's shards
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parallelize(model: DecoderLM, world: World, execution: Execution, weights: Weights | None = None) -> Running:
    """Make the model ready to train, in place: parameters keep their names.

    A model on the meta device gets its weights here, by default its initial ones, each rank only its share: no rank
    ever holds the whole.
    """
    layout = execution.layout
    torch.set_float32_matmul_precision("high" if execution.precision == "tf32" else "highest")
    if layout.activation_checkpointing != "none":
        recompute_blocks(model, selective=layout.activation_checkpointing == "selective")
    if execution.compile:
        compile_parts(model, world.device, layout.activation_checkpointing)
    if world.device.type == "cpu" and (execution.compile or execution.precision == "bf16"):
        model.head.tiles = Tiles(torch.compile(exp_rows, dynamic=False) if execution.compile else exp_rows)
    if execution.precision == "bf16":
        model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    if layout.sharded:
        shard(model, world, execution)
    if model.token_embedding.weight.is_meta:
        model.to_empty(device=world.device)
        fill(model.initial_weights() if weights is None else weights, world.device)
    else:
        model.to(world.device)
    if layout.strategy == "ddp":
        device_ids = [world.device] if world.device.type == "cuda" else None
        replicated = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        if layout.reduce_dtype == "bf16":
            replicated.register_comm_hook(None, lambda _, bucket: average_in_bf16(bucket.buffer()))
        return Running(replicated, layout)
    return Running(model, layout)


def average_in_bf16(gradient: Tensor) -> torch.futures.Future[Any]:
    """Average a bucket of DDP's gradients in bf16. torch's own hook for that refuses to run without a GPU."""
    narrow = gradient.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(narrow, async_op=True)
    assert work is not None
    averaged: torch.futures.Future[Any] = work.get_future().then(lambda sent: gradient.copy_(sent.value()[0]))
    return averaged


def recompute_blocks(model: DecoderLM, selective: bool) -> None:
    """Let each block drop what it computed and compute it again in backward (Chen et al. 2016)."""
    saved = functools.partial(create_selective_checkpoint_contexts, SAVED_WHEN_SELECTIVE)
    settings: dict[str, Any] = {"context_fn": saved} if selective else {}
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **settings)


def compile_parts(model: DecoderLM, device: torch.device, recomputed: str) -> None:
    """Compile blocks (one compilation serves all) and a GPU's head, in place: no parameter changes its name.

    The embeddings stay outside: compiled for the CPU, their backward adds atomically, and no two runs are alike.
    """
    parts: tuple[str, ...] = ("forward",)  # not `block.compile()`, which would take in FSDP's hooks
    if model.end_of_text is not None:  # attention within documents has new shapes each time
        # Inside compiled code, selective recomputation would not see the matmuls whose outputs it is to keep.
        parts = () if recomputed == "selective" else ("before", "after")
    # The CPU's own generator is faster than inductor's, and draws the same dropout as without compilation.
    options: dict[str, Any] | None = {"fallback_random": True} if device.type == "cpu" else None
    for block in model.blocks:
        for part in parts:
            setattr(block, part, torch.compile(getattr(block, part), dynamic=False, options=options))
    if device.type != "cpu":
        model.head.compile(dynamic=False)


def shard(model: DecoderLM, world: World, execution: Execution) -> None:
    """Spread every parameter's rows over the ranks (FSDP2); a block is gathered while it computes.

    The embeddings, one of them used at both ends, and the last norm are a unit of their own and stay fp32, so that the
    residual stream and the sum of the embedding's two gradients do. In bf16 the blocks' weights are gathered in bf16
    (norms and biases too, which DDP keeps in fp32).
    """
    layout = execution.layout
    copies = world.size // layout.shard_ranks
    axes = {"replicate": copies, "shard": layout.shard_ranks} if layout.strategy == "hsdp" else {"shard": world.size}
    mesh = init_device_mesh(world.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    reduce_dtype = torch.bfloat16 if layout.reduce_dtype == "bf16" else None
    outer = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype or torch.float32, cast_forward_inputs=False)
    inner = narrow if execution.precision == "bf16" else outer
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner, reshard_after_forward=layout.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=outer, reshard_after_forward=False)


@torch.no_grad()
def fill(weights: Weights, device: torch.device) -> None:
    """Give every parameter, or this rank's shard of it, its values; one whole parameter at a time."""
    for parameter, values in weights:
        if isinstance(parameter, DTensor):
            placement = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(values.to(device), *placement, src_data_rank=None))
        else:
            parameter.copy_(values)
