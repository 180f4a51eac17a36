"""Apply activation checkpointing, compilation and DDP or FSDP to a model with PyTorch's APIs.

The model itself is written for a single device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from distgpt.distributed.context import DistributedContext
from distgpt.distributed.layout import ParallelLayout
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.models.language_model import LanguageModel

NamedTensors = Iterable[tuple[str, Tensor]]
"""Parameter names, each with the whole parameter's values on the CPU."""

aten = torch.ops.aten
SAC_SAVE_OPS = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""Outputs that selective activation checkpointing keeps: those of matmuls and fused attention, which are expensive."""


def parallelize(
    model: LanguageModel, context: DistributedContext, runtime: RuntimeConfig, weights: NamedTensors | None = None
) -> nn.Module:
    """The model ready to train: wrapped, on its device, with its weights. All ranks must call.

    The model is changed in place, so that it can be used beside the wrapped one (for evaluation, say). A model on the
    meta device gets its values here, by default its initial ones, each rank only its shard of them: no rank ever holds
    the whole model. Sharded layouts need a context with a mesh (`DistributedContext.with_mesh`).
    """
    layout = runtime.layout
    torch.set_float32_matmul_precision("high" if runtime.precision == "tf32" else "highest")
    compiles_blocks = runtime.compiles_blocks(model.end_of_text is not None)
    if model.end_of_text is not None and compiles_blocks:  # the graph breaks at attention: checkpoint its pieces
        _apply_compile(model, context)
    _apply_activation_checkpointing(model, layout.activation_checkpointing)
    if model.end_of_text is None and compiles_blocks:
        _apply_compile(model, context)
    if runtime.compile and context.device.type != "cpu":
        model.head.compile(dynamic=False)
    if layout.is_sharded:
        _apply_fsdp(model, context, runtime)
    if model.token_embedding.weight.is_meta:
        model.to_empty(device=context.device)
        load_parameters(model, model.initial_weights() if weights is None else weights, context.device)
    else:
        model.to(context.device)
    return _apply_ddp(model, context, layout) if layout.strategy == "ddp" else model


def canonical_name(name: str) -> str:
    """A parameter's name as if its module had not been wrapped for activation checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


@torch.no_grad()
def load_parameters(model: nn.Module, values: NamedTensors, device: torch.device) -> None:
    """Give every parameter, or this rank's shard of it, its values; one whole parameter at a time."""
    assert not list(model.buffers()), "models have no buffers: they would stay uninitialized"
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in values:
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            placement = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(tensor.to(device), *placement, src_data_rank=None))
        else:
            parameter.copy_(tensor)


def _apply_activation_checkpointing(model: LanguageModel, mode: str) -> None:
    """Let each block drop its activations and recompute them in backward (Chen et al. 2016)."""
    if mode == "none":
        return
    settings: dict[str, Any] = {}
    if mode == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAC_SAVE_OPS)
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = checkpoint_wrapper(block, **settings)


def _apply_compile(model: LanguageModel, context: DistributedContext) -> None:
    """Compile each block; as the blocks are identical, one compilation serves all.

    The embeddings stay eager: in inductor's CPU code their backward uses atomic adds, which are not deterministic.
    """
    # Otherwise dynamo splits the graph of each block at DDP's gradient buckets.
    torch._dynamo.config.optimize_ddp = False
    # The CPU's own generator is faster than inductor's, and gives the dropout masks of eager execution.
    options: dict[str, Any] | None = {"fallback_random": True} if context.device.type == "cpu" else None
    for block in model.blocks:
        block.compile(dynamic=False, options=options)


def _apply_fsdp(model: LanguageModel, context: DistributedContext, runtime: RuntimeConfig) -> None:
    """Shard every parameter's rows over the ranks (FSDP2); a block is gathered while it computes.

    The root group holds the embeddings, one of which is tied to the LM head, and the final norm. It stays in fp32 to
    keep the residual stream and the embedding's summed gradient in fp32. In bf16 the blocks' weights are gathered in
    bf16, norms and biases included (DDP keeps these in fp32).
    """
    layout = runtime.layout
    assert context.mesh is not None, "sharded layouts need DistributedContext.with_mesh"
    mesh = context.mesh if layout.strategy == "hsdp" else context.mesh["dp_shard"]
    reduce_dtype = torch.bfloat16 if layout.reduce_dtype == "bf16" else None
    root_policy = block_policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    if runtime.precision == "bf16":
        block_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype or torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=block_policy, reshard_after_forward=layout.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)


def _apply_ddp(model: LanguageModel, context: DistributedContext, layout: ParallelLayout) -> DistributedDataParallel:
    """Replicate the model on every rank."""
    device_ids = [context.device] if context.device.type == "cuda" else None
    replicated = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if layout.reduce_dtype == "bf16":
        replicated.register_comm_hook(None, lambda _, bucket: _average_in_bf16(bucket.buffer()))
    return replicated


def _average_in_bf16(gradient: Tensor) -> torch.futures.Future[Any]:
    """Average a bucket of DDP's gradients in bf16. torch's own hook for that refuses to run without a GPU."""
    bf16_gradient = gradient.to(torch.bfloat16).div_(dist.get_world_size())
    handle = dist.all_reduce(bf16_gradient, async_op=True)
    assert handle is not None
    averaged: torch.futures.Future[Any] = handle.get_future().then(lambda done: gradient.copy_(done.value()[0]))
    return averaged
