"""Cases that run on real gloo ranks, all of them in one start of torchrun for each number of ranks.

`results(ranks)` starts `torchrun -m tests.ranks` once and returns what each case returned on each rank.
A case is a function of (world, folder); what it returns goes through JSON, arrays go into files in `folder`.
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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from distgpt import loss as losses
from distgpt import saver, trained
from distgpt import world as worlds
from distgpt.checkpoint import Checkpoint
from distgpt.config import OptimizerConfig
from distgpt.data import Batch, ShuffledReader
from distgpt.errors import ConfigError, DataError, leave
from distgpt.evaluate import evaluate
from distgpt.loss import IGNORED
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, set_learning_rate
from distgpt.parallel import Execution, parallelize
from distgpt.plan import BatchPlan, Layout
from distgpt.shards import TokenArray, open_tokens
from distgpt.step import seed_dropout, train_step, warm_up
from distgpt.tokenizer import load_tokenizer
from distgpt.world import World
from tests.conftest import REPO, environment

N_VOCAB, SEQ_LEN, SEQUENCES = 101, 16, 8
TOKENS = SEQUENCES * SEQ_LEN
END_OF_TEXT = 7
LEARNING_RATE, CLIP = 3e-3, 0.5


def strategies(ranks: int) -> list[str]:
    """What so many ranks can run; torchrun gives even one rank a process group."""
    return ["none", "ddp", "fsdp"] if ranks == 1 else ["ddp", "fsdp"] + ["hsdp"] * (ranks == 4)


def execution(world: World, strategy: str, precision: str = "fp32", compiled: bool = False, **more: Any) -> Execution:
    """A strategy on all ranks; hsdp in two copies."""
    shard_ranks = {"fsdp": world.size, "hsdp": world.size // 2}.get(strategy, 1)
    layout = Layout(strategy, world.size, shard_ranks, **more)
    return Execution(precision, compiled, "cpu", layout)


def small_model(n_vocab: int = N_VOCAB, n_embd: int = 21, end_of_text: int | None = None, n_head: int = 3) -> DecoderLM:
    """By default an odd width, and a vocabulary whose padded rows 3 ranks do not divide."""
    return DecoderLM(n_vocab, n_embd, n_head, n_positions=SEQ_LEN, n_layer=2, seed=3, end_of_text=end_of_text)


def thin_model() -> DecoderLM:
    """So thin that of 4 ranks the last holds nothing of most parameters."""
    return small_model(n_embd=5, n_head=1)


def stream(folder: Path, length: int, n_vocab: int = N_VOCAB) -> TokenArray:
    """Random tokens in a file, the same on every rank; one in eight ends a text."""
    path = folder / f"stream-{length}-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.npy"
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, n_vocab, length)
    np.save(path, np.where(generator.random(length) < 1 / 8, END_OF_TEXT, tokens).astype(np.uint16))
    return open_tokens(path)["tokens"]


def reader(folder: Path, world: World, batch_size: int, end_of_text: int | None = None) -> ShuffledReader:
    """This rank's share of steps of SEQUENCES sequences."""
    plan = BatchPlan(SEQUENCES, batch_size, world.size)
    return ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank, end_of_text)


def whole(tensor: torch.Tensor | None) -> np.ndarray:
    """A tensor of which this rank may hold a part. Every rank calls."""
    assert tensor is not None
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy().copy()


def step_gradients(
    world: World,
    folder: Path,
    name: str,
    how: Execution,
    batch_size: int,
    dtype: torch.dtype,
    masked: bool = False,
    thin: bool = False,
    ragged: bool = False,
) -> dict[str, Any]:
    """One step's gradients (in a file), loss and norm, with at most `batch_size` sequences in a forward pass."""
    end_of_text = END_OF_TEXT if masked else None
    model = thin_model() if thin else small_model(end_of_text=end_of_text)
    running = parallelize(model.to(dtype), world, how)
    optimizer = build_optimizer(model, OptimizerConfig())  # of learning rate 0
    batches = reader(folder, world, batch_size, end_of_text).at(5)
    if ragged:
        for batch in batches:
            drop_targets(batch)
    tokens = int(world.sum(torch.tensor([sum(int((b.targets_BT != IGNORED).sum()) for b in batches)])))
    result = train_step(running, optimizer, batches, tokens, 1e9, world)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    if world.is_first:
        np.savez(folder / f"gradients-{name}.npz", **gradients)  # type: ignore[arg-type]
    return {"loss": float(world.sum(result.loss_sum.double())) / tokens, "norm": float(result.grad_norm)}


def drop_targets(batch: Batch) -> None:
    """Leave sequences with very different numbers of targets."""
    batch.targets_BT[batch.targets_BT % 8 < batch.targets_BT[:, :1] % 8] = IGNORED


def gradients(world: World, folder: Path) -> Any:
    """Every strategy and accumulation, in fp32 and fp64; sharded ones in both ways to exchange and to gather."""
    found = {}
    for strategy in strategies(world.size):
        ways: dict[str, dict[str, Any]] = {"": {}}
        if strategy in ("fsdp", "hsdp"):
            ways |= {"-each": {"reduce_each": True}, "-kept": {"reshard_after_forward": False}}
        for way, settings in ways.items():
            for size in (8, 3, 1):
                for dtype in (torch.float32, torch.float64):
                    name = f"{strategy}{way}-{size}-{dtype}"
                    how = execution(world, strategy, **settings)
                    found[name] = step_gradients(world, folder, name, how, size, dtype)
    return found


def special_gradients(world: World, folder: Path) -> Any:
    """Empty shards, unequal numbers of targets, bf16, and gradients exchanged in bf16."""
    found = {}
    for strategy in strategies(world.size):
        plain, bf16 = execution(world, strategy), execution(world, strategy, "bf16")
        exchanged = execution(world, strategy, reduce_dtype="bf16")
        for name, how, size, dtype, settings in (
            ("thin", plain, 3, torch.float64, {"thin": True}),
            ("ragged", plain, 3, torch.float64, {"ragged": True}),
            ("bf16", bf16, 3, torch.float32, {}),
            ("exchanged", exchanged, 3, torch.float32, {}),
        ):
            found[f"{name}-{strategy}"] = step_gradients(
                world, folder, f"{name}-{strategy}", how, size, dtype, **settings
            )
    return found


def documents(world: World, folder: Path) -> Any:
    """The gradient with documents masked, in fp64."""
    return {
        strategy: step_gradients(
            world, folder, f"documents-{strategy}", execution(world, strategy), 3, torch.float64, masked=True
        )
        for strategy in strategies(world.size)
    }


def recomputation(world: World, folder: Path) -> Any:
    """The gradient with layers recomputed, compiled and not, documents masked and not; on 2 ranks compiled as well."""
    found = {}
    for strategy in strategies(world.size):
        for compiled in (False, True) if world.size == 2 else (False,):
            for kind in ("none", "full", "selective") if compiled else ("full", "selective"):
                for masked in (False, True):
                    torch._dynamo.reset()  # else one code object gathers more variants than it may have
                    name = f"recomputation-{strategy}-{kind}-{compiled}-{masked}"
                    how = execution(world, strategy, compiled=compiled, activation_checkpointing=kind)
                    found[name] = step_gradients(world, folder, name, how, 3, torch.float32, masked)
    return found


def curves(world: World, folder: Path) -> Any:
    """Loss and gradient norm of 20 steps of AdamW with clipping, for every strategy, accumulation and dtype."""
    found = {}
    for strategy in strategies(world.size):
        for size, dtype, precision in (
            (8, torch.float32, "fp32"),
            (8, torch.float64, "fp32"),
            (3, torch.float64, "fp32"),
            (1, torch.float32, "fp32"),
            (8, torch.float32, "bf16"),
        ):
            model = small_model().to(dtype)
            running = parallelize(model, world, execution(world, strategy, precision))
            optimizer = build_optimizer(model, OptimizerConfig())
            set_learning_rate(optimizer, LEARNING_RATE)
            share = reader(folder, world, size)
            rows = []
            for step in range(20):
                result = train_step(running, optimizer, share.at(step), TOKENS, CLIP, world)
                rows.append([float(world.sum(result.loss_sum.double())) / TOKENS, float(result.grad_norm)])
            found[f"{strategy}-{size}-{dtype}-{precision}"] = rows
    return found


def reductions(world: World, folder: Path) -> Any:
    """All-reduces in each of three updates of three micro-steps or so, and DDP's number of buckets."""
    model = small_model(n_embd=144)  # more than the first bucket's 1 MiB
    running = parallelize(model, world, execution(world, "ddp"))
    assert isinstance(running.module, DistributedDataParallel)
    counted = [0]

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and refuses their names as text
        counted[0] += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    running.module.register_comm_hook(None, hook)
    plan = BatchPlan(3 * world.size, 1, world.size)
    share = ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank)
    optimizer = build_optimizer(model, OptimizerConfig())  # of learning rate 0
    warm_up(running, share.at(0), world)
    per_update = []
    for step in range(3):
        counted[0] = 0
        train_step(running, optimizer, share.at(step), plan.sequences * SEQ_LEN, 1.0, world)
        per_update.append(counted[0])
    sizes = running.module._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return {"per_update": per_update, "buckets": len(str(sizes).split(",")), "micro_steps": plan.micro_steps}


def exchanges(world: World, folder: Path) -> Any:
    """Collectives of one FSDP update of four micro-steps, by name, for each way to exchange and to gather."""
    found = {}
    for reduce_each in (False, True):
        for reshard in (False, True):
            how = execution(world, "fsdp", reduce_each=reduce_each, reshard_after_forward=reshard)
            model = small_model()
            running = parallelize(model, world, how)
            optimizer = build_optimizer(model, OptimizerConfig())  # of learning rate 0
            plan = BatchPlan(4 * world.size, 1, world.size)
            share = ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank)
            warm_up(running, share.at(0), world)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                train_step(running, optimizer, share.at(0), plan.sequences * SEQ_LEN, 1.0, world)
            counts = {event.key: event.count for event in seen.key_averages() if event.key.startswith("c10d::")}
            found[f"{reduce_each}-{reshard}"] = counts
    return found


def held(world: World, folder: Path) -> Any:
    """Bytes this rank holds between steps, and a hash of the initial weights made from a meta-device model."""
    found = {}
    for strategy in strategies(world.size):
        with torch.device("meta"):
            model = small_model()
        running = parallelize(model, world, execution(world, strategy))
        digest = hashlib.sha256(b"".join(whole(p).tobytes() for p in model.parameters())).hexdigest()
        optimizer = build_optimizer(model, OptimizerConfig())
        train_step(running, optimizer, reader(folder, world, 8).at(0), TOKENS, 1.0, world)

        def nbytes(tensor: torch.Tensor | None) -> int:
            assert tensor is not None
            return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

        parameters = list(model.parameters())
        found[strategy] = {
            "initial": digest,
            "weights": sum(nbytes(p) for p in parameters),
            "gradients": sum(nbytes(p.grad) for p in parameters),
            "moments": sum(nbytes(v) for state in optimizer.state.values() for k, v in state.items() if k != "step"),
        }
    return found


def evaluation(world: World, folder: Path) -> Any:
    """Score of a ragged stream, for batch sizes that fit and do not."""
    found: dict[str, Any] = {}
    for strategy in strategies(world.size):
        model = small_model(257)
        parallelize(model, world, execution(world, strategy))
        held_out = stream(folder, 1003, 257)
        tokenizer = load_tokenizer("bytes")
        scores = [evaluate(model, held_out, tokenizer, SEQ_LEN, size, world).results() for size in (1, 5, 64)]
        limited = evaluate(model, held_out, tokenizer, SEQ_LEN, 5, world, max_tokens=100)
        found[strategy] = {"scores": scores, "limited": limited.tokens, "training": model.training}
    return found


def nan_gradient(world: World, folder: Path) -> Any:
    """A gradient that is NaN on the last rank alone: weights before and after the update, then after a sound one."""
    found = {}
    for strategy in strategies(world.size):
        model = small_model()
        running = parallelize(model, world, execution(world, strategy))
        optimizer = build_optimizer(model, OptimizerConfig())
        set_learning_rate(optimizer, 1e-2)
        share = reader(folder, world, 8)
        weights = []
        for step in range(3):
            spoil = step == 1 and world.rank == world.size - 1
            handle = model.final_norm.register_forward_hook(lambda *seen: seen[2] * float("nan")) if spoil else None
            train_step(running, optimizer, share.at(step), TOKENS, 1.0, world)
            if handle is not None:
                handle.remove()
            weights.append(float(sum(whole(p).astype(np.float64).sum() for p in model.parameters())))
        found[strategy] = dict(zip(("before", "after", "later"), weights, strict=True))
    return found


def saved(world: World, folder: Path) -> Any:
    """After a step under one strategy, save, load under another, and take a second step: the sum of weights' sizes."""
    found = {}
    saver.FILE_BYTES = 2000  # so that even these models take several files
    for first in strategies(world.size):
        for second in strategies(world.size):
            output_dir = folder / f"saved-{first}-{second}"
            for strategy, steps in ((first, (0,)), (second, (1,))):
                model = small_model()
                running = parallelize(model, world, execution(world, strategy))
                optimizer = build_optimizer(model, OptimizerConfig())
                if steps == (1,):
                    found_at = Checkpoint(output_dir / "checkpoints/step-00000001", 1, {})
                    saver.restore(found_at, model, optimizer, world)
                set_learning_rate(optimizer, LEARNING_RATE)
                for step in steps:
                    train_step(running, optimizer, reader(folder, world, 8).at(step), TOKENS, CLIP, world)
                if steps == (0,):
                    tensors = saver.tensors_of(model, optimizer)
                    saver.write(output_dir, 1, "test", tensors, {}, 2, world)
            absolute = sum(np.abs(whole(p).astype(np.float64)).sum() for p in model.parameters())
            found[f"{first}-{second}"] = float(absolute)
            trained.save(output_dir, model, world)
            world.gather(None)
            weights = load_file(output_dir / trained.WEIGHTS)
            found[f"{first}-{second} trained"] = float(sum(w.double().abs().sum() for w in weights.values()))
    return found


def agreement(world: World, folder: Path) -> Any:
    """What each rank hears when one fails or differs."""
    heard = []

    def fail() -> None:
        if world.rank == world.size - 1:
            raise DataError("no tokens here")

    for attempt in (fail, functools.partial(world.check_same, {"seed": world.rank, "same": 1})):
        try:
            world.first_rank_first(fail) if attempt is fail else attempt()  # type: ignore[unused-ignore]
            heard.append("nothing")
        except (DataError, ConfigError) as error:
            heard.append(f"{type(error).__name__}: {error}")
    return {"heard": heard, "gathered": world.gather({"rank": world.rank, "text": "x" * world.rank})}


def dropout(world: World, folder: Path) -> Any:
    """The first random numbers of two steps."""
    drawn = []
    for step in (1, 2, 1):
        seed_dropout(0, step, world.rank)
        drawn.append(torch.rand(4).tolist())
    return drawn


CASES: list[Callable[[World, Path], Any]] = [
    gradients,
    special_gradients,
    documents,
    recomputation,
    curves,
    reductions,
    exchanges,
    held,
    evaluation,
    nan_gradient,
    saved,
    agreement,
    dropout,
]


def results(ranks: int) -> tuple[dict[str, list[Any]], Path]:
    """What each case returned, a list by rank, and the folder of its files."""
    folder, failure = started(ranks)
    assert failure is None, failure
    by_rank = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {case.__name__: [found[case.__name__] for found in by_rank] for case in CASES}, folder


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
    losses.FEW_LOGITS = 0  # so that even these take the tiled loss
    world = worlds.start("cpu")
    found = {case.__name__: case(world, folder) for case in CASES}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
