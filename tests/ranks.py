"""Cases that run on real gloo ranks, all of them in one start of torchrun for each number of ranks.

`results(ranks)` starts `torchrun -m tests.ranks` once and returns what each case returned on each rank.
A case is a function of (context, folder). Its result travels as JSON; arrays go into files in `folder`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from distgpt.checkpoint import saver
from distgpt.checkpoint.store import Checkpoint
from distgpt.checkpoint.weights import WEIGHTS_FILE, save_weights
from distgpt.data.dataloader import Batch, TrainLoader
from distgpt.data.dataset import TokenWindows
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.data.token_files import TokenArray, open_token_file
from distgpt.data.tokenizer import load_tokenizer
from distgpt.distributed.context import DistributedContext, init_distributed
from distgpt.distributed.layout import ParallelLayout
from distgpt.distributed.parallelize import canonical_name, parallelize
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.errors import ConfigError, DataError, exit_process
from distgpt.evaluate import EvalInputs, evaluate
from distgpt.models import cross_entropy
from distgpt.models.cross_entropy import IGNORE_INDEX
from distgpt.models.gpt2 import DecoderLM
from distgpt.models.kernels import resolve_kernels
from distgpt.optim.optimizers import AdamWConfig
from distgpt.training.state import ModelState, OptimizerState, Progress, RunFacts, TrainState
from distgpt.training.step import StepSettings, seed_dropout, train_step, warm_up
from tests.conftest import REPO, environment

N_VOCAB, SEQ_LEN, SEQUENCES = 101, 16, 8
TOKENS = SEQUENCES * SEQ_LEN
END_OF_TEXT = 7
LEARNING_RATE, CLIP = 3e-3, 0.5
SINGLE_PROCESS = DistributedContext(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"), num_threads=1)


def strategies(ranks: int) -> list[str]:
    """What so many ranks can run; torchrun gives even one rank a process group."""
    return ["none", "ddp", "fsdp"] if ranks == 1 else ["ddp", "fsdp"] + ["hsdp"] * (ranks == 4)


def runtime_of(
    context: DistributedContext, strategy: str, precision: str = "fp32", compiled: bool = False, **settings: Any
) -> RuntimeConfig:
    """A strategy on all ranks; hsdp with two replicas."""
    shard_size = {"fsdp": context.world_size, "hsdp": context.world_size // 2}.get(strategy, 1)
    layout = ParallelLayout(strategy, context.world_size, shard_size, **settings)
    return RuntimeConfig(precision, compiled, "cpu", layout)


def small_model(
    n_vocab: int = N_VOCAB,
    n_embd: int = 21,
    end_of_text: int | None = None,
    n_head: int = 3,
    runtime: RuntimeConfig | None = None,
    p_dropout: float = 0.0,
) -> DecoderLM:
    """By default an odd hidden size, and a vocabulary whose padded rows 3 ranks do not divide.

    It is built with the kernels that a run would choose for `runtime`.
    """
    runtime = runtime or RuntimeConfig("fp32", False, "cpu")
    blocks_compiled = runtime.compiles_blocks(end_of_text is not None)
    kernels = resolve_kernels("cpu", runtime.precision, runtime.compile, blocks_compiled, n_embd // n_head, SEQ_LEN)
    sizes = n_vocab, n_embd, n_head, SEQ_LEN, 2
    return DecoderLM(*sizes, p_dropout, seed=3, end_of_text=end_of_text, kernels=kernels)


def thin_model() -> DecoderLM:
    """So thin that of 4 ranks the last holds nothing of most parameters."""
    return small_model(n_embd=5, n_head=1)


def wrap(model: DecoderLM, context: DistributedContext, runtime: RuntimeConfig) -> nn.Module:
    """The model parallelized over all ranks."""
    return parallelize(model, _with_mesh(context, runtime.layout.shard_size), runtime)


@functools.cache
def _with_mesh(context: DistributedContext, shard_size: int) -> DistributedContext:
    """One mesh serves all cases: each has process groups of its own."""
    return context.with_mesh(shard_size)


def settings_of(runtime: RuntimeConfig, context: DistributedContext, num_targets: int, clip: float) -> StepSettings:
    """What a step of these ranks needs."""
    return StepSettings(num_targets, clip, context.world_size, runtime)


def stream(folder: Path, length: int, n_vocab: int = N_VOCAB) -> TokenArray:
    """Random tokens in a file, the same on every rank; one in eight ends a text."""
    path = folder / f"stream-{length}-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.npy"
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, n_vocab, length)
    np.save(path, np.where(generator.random(length) < 1 / 8, END_OF_TEXT, tokens).astype(np.uint16))
    return open_token_file(path)["tokens"]


def loader(folder: Path, rank: int, plan: BatchPlan, end_of_text: int | None = None) -> TrainLoader:
    """One rank's batches of the random stream."""
    windows = TokenWindows(stream(folder, 999), SEQ_LEN, N_VOCAB)
    return TrainLoader(windows, Sampler(len(windows), 0, plan, rank), end_of_text)


def standard_loader(
    folder: Path, context: DistributedContext, batch_size: int, end_of_text: int | None = None
) -> TrainLoader:
    """This rank's share of steps of SEQUENCES sequences."""
    return loader(folder, context.rank, BatchPlan(SEQUENCES, batch_size, context.world_size), end_of_text)


def whole(tensor: torch.Tensor | None) -> np.ndarray:
    """A tensor of which this rank may hold a part. All ranks must call."""
    assert tensor is not None
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy().copy()


def step_gradients(
    context: DistributedContext,
    folder: Path,
    name: str,
    runtime: RuntimeConfig,
    batch_size: int,
    dtype: torch.dtype,
    masked: bool = False,
    thin: bool = False,
    ragged: bool = False,
) -> dict[str, Any]:
    """One step's gradients (in a file), loss and norm, with at most `batch_size` sequences in a forward pass."""
    end_of_text = END_OF_TEXT if masked else None
    base_model = thin_model() if thin else small_model(end_of_text=end_of_text, runtime=runtime)
    model = wrap(base_model.to(dtype), context, runtime)
    optimizer = AdamWConfig().build(base_model)  # its learning rate is 0
    batches = standard_loader(folder, context, batch_size, end_of_text).micro_batches(5)
    if ragged:
        for batch in batches:
            drop_targets(batch)
    rank_targets = sum(int((batch.targets_BT != IGNORE_INDEX).sum()) for batch in batches)
    num_targets = int(context.all_reduce_sum(torch.tensor([rank_targets])))
    result = train_step(model, optimizer, batches, settings_of(runtime, context, num_targets, 1e9))
    gradients = {canonical_name(parameter): whole(p.grad) for parameter, p in base_model.named_parameters()}
    if context.is_rank0:
        np.savez(folder / f"gradients-{name}.npz", **gradients)  # type: ignore[arg-type]
    loss = float(context.all_reduce_sum(result.loss_sum.double())) / num_targets
    return {"loss": loss, "norm": float(result.grad_norm)}


def drop_targets(batch: Batch) -> None:
    """Leave sequences with very different numbers of targets."""
    batch.targets_BT[batch.targets_BT % 8 < batch.targets_BT[:, :1] % 8] = IGNORE_INDEX


def gradients(context: DistributedContext, folder: Path) -> Any:
    """Every strategy and accumulation, in fp32 and fp64; sharded ones with each way to reduce and to gather."""
    by_name = {}
    for strategy in strategies(context.world_size):
        variants: dict[str, dict[str, Any]] = {"": {}}
        if strategy in ("fsdp", "hsdp"):
            variants |= {"-each": {"sync_each_micro_step": True}, "-unsharded": {"reshard_after_forward": False}}
        for variant, settings in variants.items():
            for size in (8, 3, 1):
                for dtype in (torch.float32, torch.float64):
                    name = f"{strategy}{variant}-{size}-{dtype}"
                    runtime = runtime_of(context, strategy, **settings)
                    by_name[name] = step_gradients(context, folder, name, runtime, size, dtype)
    return by_name


def special_gradients(context: DistributedContext, folder: Path) -> Any:
    """Empty shards, unequal numbers of targets, bf16, and gradients reduced in bf16."""
    by_name = {}
    for strategy in strategies(context.world_size):
        fp32, bf16 = runtime_of(context, strategy), runtime_of(context, strategy, "bf16")
        reduced_in_bf16 = runtime_of(context, strategy, reduce_dtype="bf16")
        for kind, runtime, dtype, settings in (
            ("thin", fp32, torch.float64, {"thin": True}),
            ("ragged", fp32, torch.float64, {"ragged": True}),
            ("bf16", bf16, torch.float32, {}),
            ("reduced", reduced_in_bf16, torch.float32, {}),
        ):
            name = f"{kind}-{strategy}"
            by_name[name] = step_gradients(context, folder, name, runtime, 3, dtype, **settings)
    return by_name


def documents(context: DistributedContext, folder: Path) -> Any:
    """The gradient with attention within documents, in fp64."""
    by_strategy = {}
    for strategy in strategies(context.world_size):
        runtime = runtime_of(context, strategy)
        name = f"documents-{strategy}"
        by_strategy[strategy] = step_gradients(context, folder, name, runtime, 3, torch.float64, masked=True)
    return by_strategy


def recomputation(context: DistributedContext, folder: Path) -> Any:
    """The gradient with activation checkpointing, with documents masked and not; on 2 ranks compiled as well."""
    by_name = {}
    for strategy in strategies(context.world_size):
        for compiled in (False, True) if context.world_size == 2 else (False,):
            for kind in ("none", "full", "selective") if compiled else ("full", "selective"):
                for masked in (False, True):
                    torch._dynamo.reset()  # one code object would otherwise exceed its number of variants
                    name = f"recomputation-{strategy}-{kind}-{compiled}-{masked}"
                    runtime = runtime_of(context, strategy, compiled=compiled, activation_checkpointing=kind)
                    by_name[name] = step_gradients(context, folder, name, runtime, 3, torch.float32, masked)
    return by_name


def compiled_graphs(context: DistributedContext, folder: Path) -> Any:
    """Graphs that compiled training of a two-layer model captures, by strategy, at a size that DDP would split."""
    by_strategy = {}
    for strategy in strategies(context.world_size) if context.world_size == 2 else ():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runtime = runtime_of(context, strategy, compiled=True)
        base_model = small_model(n_embd=768, n_head=12, runtime=runtime)
        model = wrap(base_model, context, runtime)
        optimizer = AdamWConfig().build(base_model)
        share = standard_loader(folder, context, 8)
        for step in range(2):
            settings = settings_of(runtime, context, TOKENS, CLIP)
            train_step(model, optimizer, share.micro_batches(step), settings)
        by_strategy[strategy] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return by_strategy


def curves(context: DistributedContext, folder: Path) -> Any:
    """Loss and gradient norm of 20 steps of AdamW with clipping, for every strategy, accumulation and dtype."""
    by_name = {}
    for strategy in strategies(context.world_size):
        for size, dtype, precision in (
            (8, torch.float32, "fp32"),
            (8, torch.float64, "fp32"),
            (3, torch.float64, "fp32"),
            (1, torch.float32, "fp32"),
            (8, torch.float32, "bf16"),
        ):
            runtime = runtime_of(context, strategy, precision)
            base_model = small_model(runtime=runtime).to(dtype)
            model = wrap(base_model, context, runtime)
            optimizer = AdamWConfig().build(base_model)
            set_learning_rate(optimizer, LEARNING_RATE)
            share = standard_loader(folder, context, size)
            rows = []
            for step in range(20):
                settings = settings_of(runtime, context, TOKENS, CLIP)
                result = train_step(model, optimizer, share.micro_batches(step), settings)
                loss = float(context.all_reduce_sum(result.loss_sum.double())) / TOKENS
                rows.append([loss, float(result.grad_norm)])
            by_name[f"{strategy}-{size}-{dtype}-{precision}"] = rows
    return by_name


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = value


def reductions(context: DistributedContext, folder: Path) -> Any:
    """All-reduces in each of three updates of three micro-steps or so, and DDP's number of buckets."""
    runtime = runtime_of(context, "ddp")
    base_model = small_model(n_embd=144)  # more than the first bucket's 1 MiB
    model = wrap(base_model, context, runtime)
    assert isinstance(model, DistributedDataParallel)
    num_calls = [0]

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and refuses their names as text
        num_calls[0] += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    model.register_comm_hook(None, hook)
    plan = BatchPlan(3 * context.world_size, 1, context.world_size)
    share = loader(folder, context.rank, plan)
    optimizer = AdamWConfig().build(base_model)  # its learning rate is 0
    warm_up(model, share.micro_batches(0), runtime)
    per_update = []
    for step in range(3):
        num_calls[0] = 0
        settings = settings_of(runtime, context, plan.sequences * SEQ_LEN, 1.0)
        train_step(model, optimizer, share.micro_batches(step), settings)
        per_update.append(num_calls[0])
    sizes = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return {"per_update": per_update, "buckets": len(str(sizes).split(",")), "micro_steps": plan.micro_steps}


def collectives(context: DistributedContext, folder: Path) -> Any:
    """Collectives of one FSDP update of four micro-steps, by name, for each way to reduce and to gather."""
    by_setting = {}
    for sync_each in (False, True):
        for reshard in (False, True):
            runtime = runtime_of(context, "fsdp", sync_each_micro_step=sync_each, reshard_after_forward=reshard)
            base_model = small_model()
            model = wrap(base_model, context, runtime)
            optimizer = AdamWConfig().build(base_model)  # its learning rate is 0
            plan = BatchPlan(4 * context.world_size, 1, context.world_size)
            share = loader(folder, context.rank, plan)
            warm_up(model, share.micro_batches(0), runtime)
            step_settings = settings_of(runtime, context, plan.sequences * SEQ_LEN, 1.0)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                train_step(model, optimizer, share.micro_batches(0), step_settings)
            counts = {event.key: event.count for event in profiled.key_averages() if event.key.startswith("c10d::")}
            by_setting[f"{sync_each}-{reshard}"] = counts
    return by_setting


def memory(context: DistributedContext, folder: Path) -> Any:
    """Bytes this rank holds between steps, and a hash of the initial weights made from a meta-device model."""
    by_strategy = {}
    for strategy in strategies(context.world_size):
        with torch.device("meta"):
            base_model = small_model()
        runtime = runtime_of(context, strategy)
        model = wrap(base_model, context, runtime)
        digest = hashlib.sha256(b"".join(whole(p).tobytes() for p in base_model.parameters())).hexdigest()
        optimizer = AdamWConfig().build(base_model)
        batches = standard_loader(folder, context, 8).micro_batches(0)
        train_step(model, optimizer, batches, settings_of(runtime, context, TOKENS, 1.0))

        def num_bytes(tensor: torch.Tensor | None) -> int:
            assert tensor is not None
            return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

        parameters = list(base_model.parameters())
        moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
        by_strategy[strategy] = {
            "initial": digest,
            "weights": sum(map(num_bytes, parameters)),
            "gradients": sum(num_bytes(p.grad) for p in parameters),
            "moments": sum(map(num_bytes, moments)),
        }
    return by_strategy


def evaluation(context: DistributedContext, folder: Path) -> Any:
    """Result on a ragged stream, for batch sizes that fit and do not."""
    by_strategy: dict[str, Any] = {}
    for strategy in strategies(context.world_size):
        runtime = runtime_of(context, strategy)
        model = small_model(257)
        wrap(model, context, runtime)
        tokens = stream(folder, 1003, 257)
        tokenizer = load_tokenizer("bytes")

        def result_of(batch_size: int, max_tokens: int | None = None) -> Any:
            inputs = model, tokens, tokenizer, SEQ_LEN, batch_size, runtime, context, max_tokens  # noqa: B023
            return evaluate(EvalInputs(*inputs))

        results = [result_of(size).results() for size in (1, 5, 64)]
        limited = result_of(5, max_tokens=100)
        by_strategy[strategy] = {"scores": results, "limited": limited.num_tokens, "training": model.training}
    return by_strategy


def nan_gradient(context: DistributedContext, folder: Path) -> Any:
    """A gradient that is NaN on the last rank alone: weights before and after that update, then after a finite one.

    Once with the optimizer of a run, which decides on the device, and once with torch's SGD, which has no such rule.
    """
    by_name = {}
    for strategy in strategies(context.world_size):
        for optimizer_name in ("adamw", "sgd"):
            runtime = runtime_of(context, strategy)
            base_model = small_model()
            model = wrap(base_model, context, runtime)
            optimizer = AdamWConfig().build(base_model)
            if optimizer_name == "sgd":
                optimizer = torch.optim.SGD(base_model.parameters(), momentum=0.9)
            set_learning_rate(optimizer, 1e-2)
            share = standard_loader(folder, context, 8)
            weights = []
            for step in range(3):
                is_bad = step == 1 and context.rank == context.world_size - 1
                handle = base_model.final_norm.register_forward_hook(_multiply_by_nan) if is_bad else None
                settings = settings_of(runtime, context, TOKENS, 1.0)
                train_step(model, optimizer, share.micro_batches(step), settings)
                if handle is not None:
                    handle.remove()
                weights.append(float(sum(whole(p).astype(np.float64).sum() for p in base_model.parameters())))
            by_name[f"{strategy}-{optimizer_name}"] = dict(zip(("before", "after", "later"), weights, strict=True))
    return by_name


def _multiply_by_nan(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * float("nan")


def checkpoints(context: DistributedContext, folder: Path) -> Any:
    """After a step under one strategy, save, load under another, and take a second step: the weights' sum of sizes."""
    by_name = {}
    saver.FILE_BYTES = 2000  # so that even these models take several files
    for first in strategies(context.world_size):
        for second in strategies(context.world_size):
            output_dir = folder / f"saved-{first}-{second}"
            for strategy, step in ((first, 0), (second, 1)):
                runtime = runtime_of(context, strategy)
                base_model = small_model()
                model = wrap(base_model, context, runtime)
                optimizer = AdamWConfig().build(base_model)
                state = TrainState(
                    ModelState(model),
                    OptimizerState(model, optimizer),
                    RunFacts({}, {}, 1, SEQUENCES, {}, "", "", ""),
                    Progress.start(context.device),
                )
                if step == 1:
                    path = output_dir / "checkpoints/step-00000001"
                    saver.restore(
                        Checkpoint(path, 1, {"run": {}, "progress": state.progress.state_dict()}), state, context
                    )
                set_learning_rate(optimizer, LEARNING_RATE)
                batches = standard_loader(folder, context, 8).micro_batches(step)
                train_step(model, optimizer, batches, settings_of(runtime, context, TOKENS, CLIP))
                if step == 0:
                    with saver.Saver(output_dir, 2, 0, context) as background:
                        background.save(1, state)
            absolute = sum(np.abs(whole(p).astype(np.float64)).sum() for p in base_model.parameters())
            by_name[f"{first}-{second}"] = float(absolute)
            save_weights(output_dir, base_model, context)
            context.all_gather_object(None)
            weights = load_file(output_dir / WEIGHTS_FILE)
            by_name[f"{first}-{second} exported"] = float(sum(w.double().abs().sum() for w in weights.values()))
    return by_name


def agreement(context: DistributedContext, folder: Path) -> Any:
    """What each rank raises when one fails or differs."""
    raised = []

    def fail() -> None:
        if context.rank == context.world_size - 1:
            raise DataError("no tokens here")

    def differ() -> None:
        context.assert_same_on_ranks({"seed": context.rank, "same": 1})

    for attempt in (lambda: context.rank0_first(fail), differ):
        try:
            attempt()
            raised.append("nothing")
        except (DataError, ConfigError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    gathered = context.all_gather_object({"rank": context.rank, "text": "x" * context.rank})
    return {"raised": raised, "gathered": gathered}


def dropout(context: DistributedContext, folder: Path) -> Any:
    """The first random numbers of two steps."""
    numbers = []
    for step in (1, 2, 1):
        seed_dropout(0, step, context.rank)
        numbers.append(torch.rand(4).tolist())
    return numbers


def mesh(context: DistributedContext, folder: Path) -> Any:
    """Data-parallel rank and size for every shard size that divides the ranks."""
    sizes = [size for size in range(1, context.world_size + 1) if context.world_size % size == 0]
    meshes = [context.with_mesh(size) for size in sizes]
    return [[with_mesh.dp_rank, with_mesh.dp_size] for with_mesh in meshes]


CASES: list[Callable[[DistributedContext, Path], Any]] = [
    gradients,
    special_gradients,
    documents,
    recomputation,
    compiled_graphs,
    curves,
    reductions,
    collectives,
    memory,
    evaluation,
    nan_gradient,
    checkpoints,
    agreement,
    dropout,
    mesh,
]


def results(ranks: int) -> tuple[dict[str, list[Any]], Path]:
    """What each case returned, a list by rank, and the folder of its files."""
    folder, failure = started(ranks)
    assert failure is None, failure
    by_rank = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {case.__name__: [rank_results[case.__name__] for rank_results in by_rank] for case in CASES}, folder


@functools.cache
def started(ranks: int) -> tuple[Path, str | None]:
    """Run all cases once for each number of ranks; the folder of their results, and what went wrong if anything did."""
    scratch = tempfile.TemporaryDirectory(prefix=f"distgpt-{ranks}-ranks-")
    atexit.register(scratch.cleanup)
    folder = Path(scratch.name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launcher, "-m", "tests.ranks", str(folder)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return folder, None if done.returncode == 0 else done.stderr


def main() -> None:
    """Run every case on this rank."""
    folder = Path(sys.argv[1])
    cross_entropy.MIN_CHUNKED_LOGITS = 0  # so that even these use the chunked cross-entropy
    context = init_distributed("cpu")
    results_by_case = {case.__name__: case(context, folder) for case in CASES}
    (folder / f"rank-{context.rank}.json").write_text(json.dumps(results_by_case))
    context.close()
    exit_process(0)


if __name__ == "__main__":
    main()
