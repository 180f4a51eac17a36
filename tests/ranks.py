"""Cases that run on real gloo ranks, all of them in one start of torchrun for each number of ranks.

`results(ranks)` starts `torchrun -m tests.ranks` once and returns what each case returned on each rank.
A case is a function of (world, folder); what it returns goes through JSON, arrays go into files in `folder`.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distgpt import world as worlds
from distgpt.config import BatchPlan, OptimizerConfig
from distgpt.data import ShuffledReader
from distgpt.errors import ConfigError, DataError, leave
from distgpt.evaluate import evaluate
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, set_learning_rate
from distgpt.parallel import Execution, parallelize
from distgpt.shards import TokenArray, open_tokens
from distgpt.step import seed_dropout, train_step, warm_up
from distgpt.tokenizer import load_tokenizer
from distgpt.world import World
from tests.conftest import REPO, environment

N_VOCAB, SEQ_LEN, SEQUENCES = 101, 16, 8
PLAIN = Execution("fp32", compile=False, device="cpu")


def small_model(n_vocab: int = N_VOCAB, n_embd: int = 21) -> DecoderLM:
    """By default an odd width and a vocabulary that no number of ranks divides."""
    return DecoderLM(n_vocab, n_embd, n_head=3, n_positions=SEQ_LEN, n_layer=2, seed=3)


def stream(folder: Path, length: int, n_vocab: int = N_VOCAB) -> TokenArray:
    """Random tokens in a file, the same on every rank."""
    path = folder / f"stream-{length}-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.npy"
    np.save(path, np.random.default_rng(0).integers(0, n_vocab, length).astype(np.uint16))
    return open_tokens(path)["tokens"]


def step_gradients(world: World, folder: Path, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """One step's gradients (in a file), loss and norm, with `batch_size` sequences in a forward pass."""
    model = small_model().to(dtype)
    running = parallelize(model, world, PLAIN)
    plan = BatchPlan(SEQUENCES, batch_size, world.size)
    reader = ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    result = train_step(running, optimizer, reader.at(5), SEQUENCES * SEQ_LEN, 1e9, world)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    np.savez(folder / f"gradients-{batch_size}-{dtype}-{world.rank}.npz", **gradients)  # type: ignore[arg-type]
    loss = float(world.sum(result.loss_sum.double())) / (SEQUENCES * SEQ_LEN)
    return {"loss": loss, "norm": float(result.grad_norm), "micro_steps": plan.micro_steps}


def gradients(world: World, folder: Path) -> Any:
    """Every accumulation, in fp32 and fp64."""
    cases = [(size, dtype) for size in (8, 3, 1) for dtype in (torch.float32, torch.float64)]
    return {f"{size}-{dtype}": step_gradients(world, folder, size, dtype) for size, dtype in cases}


def reductions(world: World, folder: Path) -> Any:
    """All-reduces in each of three updates of three micro-steps or so, and DDP's number of buckets."""
    model = small_model(n_embd=144)  # more than the first bucket's 1 MiB
    running = parallelize(model, world, PLAIN)
    if not isinstance(running, DistributedDataParallel):
        return None
    counted = [0]

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and refuses their names as text
        counted[0] += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    running.register_comm_hook(None, hook)
    plan = BatchPlan(3 * world.size, 1, world.size)
    reader = ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank)
    optimizer = torch.optim.SGD(running.parameters(), lr=0.0, fused=True)
    warm_up(running, reader.at(0), world)
    per_update = []
    for step in range(3):
        counted[0] = 0
        train_step(running, optimizer, reader.at(step), plan.sequences * SEQ_LEN, 1.0, world)
        per_update.append(counted[0])
    sizes = running._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return {"per_update": per_update, "buckets": len(str(sizes).split(",")), "micro_steps": plan.micro_steps}


def evaluation(world: World, folder: Path) -> Any:
    """Score of a ragged stream, for batch sizes that fit and do not."""
    model = small_model(257)
    parallelize(model, world, PLAIN)
    held_out = stream(folder, 1003, 257)
    tokenizer = load_tokenizer("bytes")
    scores = [evaluate(model, held_out, tokenizer, SEQ_LEN, size, world).results() for size in (1, 5, 64)]
    limited = evaluate(model, held_out, tokenizer, SEQ_LEN, 5, world, max_tokens=100)
    return {"scores": scores, "limited": limited.tokens, "training": model.training}


def nan_gradient(world: World, folder: Path) -> Any:
    """A gradient that is NaN on the last rank alone: weights before and after the update, then after a sound one."""
    model = small_model()
    running = parallelize(model, world, PLAIN)
    optimizer = build_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 1e-2)
    plan = BatchPlan(SEQUENCES, 8, world.size)
    reader = ShuffledReader(stream(folder, 999), N_VOCAB, SEQ_LEN, 0, plan, world.rank)

    def weights() -> float:
        return float(sum(p.double().sum() for p in model.parameters()))

    train_step(running, optimizer, reader.at(0), SEQUENCES * SEQ_LEN, 1.0, world)
    before = weights()
    parameter = model.final_norm.weight
    assert isinstance(parameter, nn.Parameter)
    handle = parameter.register_hook(lambda g: g * float("nan") if world.rank == world.size - 1 else g)
    train_step(running, optimizer, reader.at(1), SEQUENCES * SEQ_LEN, 1.0, world)
    after = weights()
    handle.remove()
    train_step(running, optimizer, reader.at(2), SEQUENCES * SEQ_LEN, 1.0, world)
    return {"before": before, "after": after, "later": weights()}


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


CASES: list[Callable[[World, Path], Any]] = [gradients, reductions, evaluation, nan_gradient, agreement, dropout]


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
    world = worlds.start("cpu")
    found = {case.__name__: case(world, folder) for case in CASES}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
