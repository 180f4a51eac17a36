"""Every parallel layout computes the same: real strategies on real ranks against plain PyTorch in one process."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.data.dataloader import Batch
from distgpt.data.sampler import BatchPlan
from distgpt.distributed.context import DistributedContext
from distgpt.distributed.estimate import StepWorkload, comm_bytes, estimate_memory
from distgpt.distributed.layout import ParallelLayout
from distgpt.distributed.parallelize import canonical_name, parallelize
from distgpt.distributed.runtime import RuntimeConfig, resolve_runtime
from distgpt.errors import ConfigError
from distgpt.models.architectures import GPT2Config
from distgpt.models.cross_entropy import IGNORE_INDEX
from distgpt.models.gpt2 import DecoderLM
from distgpt.training.step import seed_dropout
from tests.ranks import (
    CLIP,
    END_OF_TEXT,
    LEARNING_RATE,
    N_VOCAB,
    SEQ_LEN,
    SEQUENCES,
    SINGLE_PROCESS,
    TOKENS,
    drop_targets,
    results,
    small_model,
    standard_loader,
    strategies,
    thin_model,
)

RANKS = [1, 2, 3, 4]
LAYOUTS = [(ranks, strategy) for ranks in RANKS for strategy in strategies(ranks)]
SHARDED = [(ranks, strategy) for ranks, strategy in LAYOUTS if strategy in ("fsdp", "hsdp")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def whole_batch(step: int) -> Batch:
    """All sequences of a step as one batch."""
    with tempfile.TemporaryDirectory() as folder:
        (batch,) = standard_loader(Path(folder), SINGLE_PROCESS, SEQUENCES).micro_batches(step)
    return batch


def reference_loss(model: DecoderLM, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of token losses, from all logits at once."""
    return F.cross_entropy(model(ids_BT).flatten(0, 1), targets_BT.flatten(), reduction="sum")


def gradient(model: DecoderLM, loss: Tensor) -> dict[str, np.ndarray]:
    loss.backward()
    parameters = model.named_parameters()
    return {canonical_name(name): p.grad.numpy() for name, p in parameters if p.grad is not None}


@functools.cache
def reference_gradient(dtype: torch.dtype) -> tuple[dict[str, np.ndarray], float]:
    """Gradient and loss of step 5 by plain autograd over the whole batch."""
    model, batch = small_model().to(dtype), whole_batch(5)
    loss = reference_loss(model, batch.ids_BT, batch.targets_BT) / TOKENS
    return gradient(model, loss), loss.item()


@functools.cache
def documents_separately(dtype: torch.dtype) -> tuple[dict[str, np.ndarray], float]:
    """The same where each document of each sequence is a batch of its own, for a model without document masks."""
    model, batch = small_model().to(dtype), whole_batch(5)
    loss = torch.zeros((), dtype=dtype)
    n_documents = 0
    for ids_T, targets_T in zip(batch.ids_BT, batch.targets_BT, strict=True):
        starts = [t for t in range(SEQ_LEN) if t == 0 or ids_T[t] == END_OF_TEXT]
        n_documents += len(starts)
        for start, end in zip(starts, [*starts[1:], SEQ_LEN], strict=True):
            loss = loss + reference_loss(model, ids_T[None, start:end], targets_T[None, start:end])
    assert n_documents > 2 * SEQUENCES
    loss = loss / TOKENS
    return gradient(model, loss), loss.item()


@functools.cache
def reference_training(dtype: torch.dtype, steps: int) -> tuple[np.ndarray, float]:
    """Loss and gradient norm of each step by a textbook loop with torch's plain AdamW; the weights' sum of sizes."""
    model = small_model().to(dtype)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), foreach=False)
    rows = []
    for step in range(steps):
        batch = whole_batch(step)
        optimizer.zero_grad()
        loss = reference_loss(model, batch.ids_BT, batch.targets_BT) / TOKENS
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rows.append([loss.item(), float(norm)])
    return np.array(rows), float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def reference_curve(dtype: torch.dtype) -> np.ndarray:
    return reference_training(dtype, 20)[0]


def assert_gradients(
    rows: list[dict[str, Any]], file: Path, expected: tuple[dict[str, np.ndarray], float], tolerance: float
) -> None:
    """Loss and norm on every rank, and every parameter's gradient, equal the expected ones."""
    gradients, loss = expected
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    for row in rows:
        assert row["loss"] == pytest.approx(loss, rel=tolerance)
        assert row["norm"] == pytest.approx(norm, rel=tolerance / 10)
    with np.load(file) as actual:
        assert set(actual) == set(gradients)
        for name, value in gradients.items():
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch_size", [8, 3, 1])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_every_layout_gives_the_gradient_of_one_batch(
    ranks: int, strategy: str, batch_size: int, dtype: torch.dtype
) -> None:
    by_rank, folder = results(ranks)
    for variant in ("", "-each", "-unsharded") if strategy in ("fsdp", "hsdp") else ("",):
        name = f"{strategy}{variant}-{batch_size}-{dtype}"
        rows = [row[name] for row in by_rank["gradients"]]
        assert_gradients(rows, folder / f"gradients-{name}.npz", reference_gradient(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_empty_shards_and_unequal_targets_change_no_gradient(ranks: int, strategy: str) -> None:
    by_rank, folder = results(ranks)
    for name, model in (("thin", thin_model()), ("ragged", small_model())):
        batch = whole_batch(5)
        if name == "ragged":
            drop_targets(batch)
            per_row = (batch.targets_BT != IGNORE_INDEX).sum(1)
            assert per_row.max() > 2 * per_row.min()
        tokens = int((batch.targets_BT != IGNORE_INDEX).sum())
        loss = reference_loss(model.double(), batch.ids_BT, batch.targets_BT) / tokens
        rows = [row[f"{name}-{strategy}"] for row in by_rank["special_gradients"]]
        assert_gradients(rows, folder / f"gradients-{name}-{strategy}.npz", (gradient(model, loss), loss.item()), 1e-10)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_the_bf16_gradient_is_close_to_the_fp32_one(ranks: int, strategy: str) -> None:
    _, folder = results(ranks)
    expected, _ = reference_gradient(torch.float32)
    with np.load(folder / f"gradients-bf16-{strategy}.npz") as actual:
        for name, value in expected.items():
            assert np.linalg.norm(actual[name] - value) < 0.02 * np.linalg.norm(value), name
        assert any(
            not np.allclose(actual[name], value, rtol=1e-5) for name, value in expected.items()
        )  # it really is bf16


@pytest.mark.parametrize(("ranks", "strategy"), [layout for layout in LAYOUTS if layout[0] > 1])
def test_gradients_reduced_in_bf16_are_the_fp32_ones_rounded(ranks: int, strategy: str) -> None:
    by_rank, folder = results(ranks)
    expected, loss = reference_gradient(torch.float32)
    assert all(r[f"reduced-{strategy}"]["loss"] == pytest.approx(loss, rel=1e-5) for r in by_rank["special_gradients"])
    with np.load(folder / f"gradients-reduced-{strategy}.npz") as actual:
        for name, value in expected.items():
            assert np.linalg.norm(actual[name] - value) < 2 * ranks * 2**-9 * np.linalg.norm(value), name
            assert not np.allclose(actual[name], value, rtol=1e-5), name  # they really are reduced in bf16


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_masked_documents_give_the_gradient_of_separate_documents(ranks: int, strategy: str) -> None:
    by_rank, folder = results(ranks)
    rows = [row[strategy] for row in by_rank["documents"]]
    file = folder / f"gradients-documents-{strategy}.npz"
    assert_gradients(rows, file, documents_separately(torch.float64), TOLERANCE[torch.float64])


@pytest.mark.parametrize("ranks", RANKS)
def test_activation_checkpointing_and_compilation_keep_the_gradient(ranks: int) -> None:
    by_rank, folder = results(ranks)
    names = list(by_rank["recomputation"][0])
    assert len(names) == len(strategies(ranks)) * (10 if ranks == 2 else 4)
    for name in names:
        expected = (documents_separately if name.endswith("True") else reference_gradient)(torch.float32)
        rows = [row[name] for row in by_rank["recomputation"]]
        assert_gradients(rows, folder / f"gradients-{name}.npz", expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_every_layout_gives_the_loss_curve_of_a_textbook_loop(ranks: int, strategy: str) -> None:
    by_rank, _ = results(ranks)
    assert (reference_curve(torch.float64)[:, 1] > CLIP).sum() > 10  # clipping is active
    for curves in by_rank["curves"]:
        for name, curve in curves.items():
            if name.startswith(f"{strategy}-") and name.endswith("fp32"):
                dtype = torch.float64 if "float64" in name else torch.float32
                # Adam enlarges rounding: in fp32 the norms drift apart (2e-5 by step 14) long before the losses do.
                columns = 1 if dtype == torch.float32 else 2
                actual, expected = np.array(curve)[:, :columns], reference_curve(dtype)[:, :columns]
                np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], err_msg=name)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_bf16_stays_close_to_fp32_on_every_layout(ranks: int, strategy: str) -> None:
    by_rank, _ = results(ranks)
    for curves in by_rank["curves"]:
        curve = np.array(curves[f"{strategy}-8-torch.float32-bf16"])[:, 0]
        expected = reference_curve(torch.float32)[:, 0]
        np.testing.assert_allclose(curve, expected, rtol=5e-3)
        assert not np.allclose(curve, expected, rtol=1e-6)  # it really is bf16


@pytest.mark.parametrize("ranks", RANKS)
def test_ddp_reduces_each_bucket_once_per_update(ranks: int) -> None:
    by_rank, _ = results(ranks)
    for counts in by_rank["reductions"]:
        assert counts["micro_steps"] == 3
        assert counts["buckets"] > 1
        assert counts["per_update"] == [counts["buckets"]] * 3


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_fsdp_settings_determine_the_number_of_collectives(ranks: int) -> None:
    """Two blocks and the root are three FSDP units, of which the root stays gathered; an update has 4 micro-steps."""
    units, micro_steps, kept_gathered = 3, 4, 1
    by_rank, _ = results(ranks)
    for by_setting in by_rank["collectives"]:
        for sync_each in (False, True):
            for reshard in (False, True):
                counts = by_setting[f"{sync_each}-{reshard}"]
                gathers = micro_steps * (2 * units - kept_gathered) if reshard else units
                assert counts["c10d::_allgather_base_"] == gathers
                assert counts["c10d::_reduce_scatter_base_"] == units * (micro_steps if sync_each else 1)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_initial_weights_are_identical_and_a_rank_holds_its_share(ranks: int, strategy: str) -> None:
    expected = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in small_model().parameters())).hexdigest()
    shard_size = {"fsdp": ranks, "hsdp": ranks // 2}.get(strategy, 1)
    estimate = estimate_memory(workload(BatchPlan(SEQUENCES, 8, ranks)), ParallelLayout(strategy, ranks, shard_size))
    by_rank, _ = results(ranks)
    rows = [row[strategy] for row in by_rank["memory"]]
    assert {row["initial"] for row in rows} == {expected}
    assert max(row["weights"] for row in rows) == estimate["weights"]  # the estimate is exact, to the byte
    assert max(row["moments"] for row in rows) == estimate["optimizer state"]
    assert max(row["gradients"] for row in rows) == estimate["weights"]


def workload(batch: BatchPlan) -> StepWorkload:
    """A step of `small_model` in fp32."""
    model = GPT2Config(n_embd=21, n_head=3, n_positions=SEQ_LEN, n_layer=2)
    return StepWorkload(model, N_VOCAB, batch, SEQ_LEN, "fp32")


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_a_nan_gradient_on_one_rank_changes_no_weight_under_any_optimizer(ranks: int, strategy: str) -> None:
    by_rank, _ = results(ranks)
    for row in by_rank["nan_gradient"]:
        for optimizer in ("adamw", "sgd"):
            weights = row[f"{strategy}-{optimizer}"]
            assert weights["after"] == weights["before"]
            assert np.isfinite(weights["later"]) and weights["later"] != weights["before"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_block_is_one_graph(strategy: str) -> None:
    """One graph of a block serves both; another is the cross-entropy's."""
    by_rank, _ = results(2)
    assert [row[strategy] for row in by_rank["compiled_graphs"]] == [2, 2]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_mesh_numbers_data_parallel_ranks_in_order(ranks: int) -> None:
    by_rank, _ = results(ranks)
    for rank, by_shard_size in enumerate(by_rank["mesh"]):
        assert by_shard_size and all(pair == [rank, ranks] for pair in by_shard_size)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_of_any_strategy_resumes_under_any_other(ranks: int) -> None:
    """Two steps with a save, and a load into a new model, between them."""
    _, expected = reference_training(torch.float32, 2)
    by_rank, _ = results(ranks)
    for row in by_rank["checkpoints"]:
        sums = list(row.values())
        assert len(sums) == 2 * len(strategies(ranks)) ** 2
        assert sums == pytest.approx([expected] * len(sums), rel=1e-6)
        for name in list(row)[::2]:
            assert row[f"{name} exported"] == pytest.approx(row[name], rel=1e-12)


def config(tmp_path: Path, *overrides: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: out\nmodel_config: {n_embd: 64, n_head: 4, n_positions: 64, n_layer: 2}\nbatch_size: 8\n"
        "seq_len: 64\nnum_warmup_steps: 0\nnum_training_steps: 10\nmin_lr: 0\nmax_lr: 1e-3\n"
    )
    return load_config(file, overrides)


class FakeRanks(DistributedContext):
    """What a rank of several with a given memory would see; nothing is communicated."""

    is_distributed = True
    memory_bytes = 0

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.world_size


def fake_ranks(world_size: int, local_world_size: int, memory_bytes: int = 0) -> FakeRanks:
    """Rank 0 of so many."""
    context = FakeRanks(
        rank=0,
        world_size=world_size,
        local_world_size=local_world_size,
        device=torch.device("cpu"),
        num_threads=1,
    )
    object.__setattr__(context, "memory_bytes", memory_bytes)
    return context


def layout(tmp_path: Path, memory_gb: float, *overrides: str, world_size: int = 4) -> ParallelLayout:
    """The layout that ranks with so much memory resolve."""
    context = fake_ranks(world_size, 2, int(memory_gb * 1e9))
    return resolve_runtime(config(tmp_path, "compile=off", "precision=fp32", *overrides), 50257, context).layout


def test_auto_shards_only_when_memory_requires_it(tmp_path: Path) -> None:
    assert layout(tmp_path, 100, world_size=1) == ParallelLayout("none", 1)
    assert layout(tmp_path, 100) == ParallelLayout("ddp", 4)
    assert layout(tmp_path, 0.1) == ParallelLayout("fsdp", 4, 4, sync_each_micro_step=True)
    assert layout(tmp_path, 0.1, "parallel.strategy=ddp") == ParallelLayout("ddp", 4)


def test_the_config_determines_the_layout(tmp_path: Path) -> None:
    fsdp = "parallel.strategy=fsdp"
    assert layout(tmp_path, 100, fsdp) == ParallelLayout("fsdp", 4, 4)
    assert layout(tmp_path, 100, fsdp, "parallel.grad_sync=each") == ParallelLayout(
        "fsdp", 4, 4, sync_each_micro_step=True
    )
    assert layout(tmp_path, 0.1, fsdp, "parallel.grad_sync=last") == ParallelLayout("fsdp", 4, 4)
    gathered = ParallelLayout("fsdp", 4, 4, reshard_after_forward=False)
    assert layout(tmp_path, 100, fsdp, "parallel.reshard_after_forward=false") == gathered
    recomputed = ParallelLayout("fsdp", 4, 4, activation_checkpointing="full")
    assert layout(tmp_path, 100, fsdp, "activation_checkpointing=full") == recomputed
    hsdp = "parallel.strategy=hsdp"
    assert layout(tmp_path, 100, hsdp) == ParallelLayout("hsdp", 4, 2)  # the ranks of one node
    assert layout(tmp_path, 100, hsdp, "parallel.shard_size=4") == ParallelLayout("hsdp", 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.strategy=none",), "got none with 4 ranks, expected ddp, fsdp or hsdp"),
        (("parallel.strategy=hsdp", "parallel.shard_size=3"), "got 3 with 4 ranks, expected a divisor of 4"),
        (("parallel.strategy=hsdp", "parallel.shard_size=8"), "got 8 with 4 ranks, expected a divisor of 4"),
        (("parallel.shard_size=2",), "got 2 with parallel.strategy = auto, expected strategy hsdp"),
    ],
)
def test_a_strategy_that_these_ranks_cannot_run_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(tmp_path, 100, *overrides)


def test_sharding_without_torchrun_is_refused_also_on_resume(tmp_path: Path) -> None:
    message = "got fsdp without torchrun, expected auto or none"
    with pytest.raises(ConfigError, match=message):
        resolve_runtime(config(tmp_path, "compile=off", "parallel.strategy=fsdp"), 257, SINGLE_PROCESS)
    with pytest.raises(ConfigError, match=message):
        previous = RuntimeConfig("fp32", False, "cpu", ParallelLayout("fsdp", 1))
        resolve_runtime(config(tmp_path, "compile=off"), 257, SINGLE_PROCESS, previous)


def dropout_gradient(runtime: RuntimeConfig, n_embd: int = 21, masked: bool = False) -> dict[str, np.ndarray]:
    """Of one batch with dropout on, always drawn from the same seed; in fp64 unless the precision is bf16."""
    torch._dynamo.reset()
    end_of_text = END_OF_TEXT if masked else None
    base_model = small_model(n_embd=n_embd, end_of_text=end_of_text, runtime=runtime, p_dropout=0.3)
    model = parallelize(base_model if runtime.precision == "bf16" else base_model.double(), SINGLE_PROCESS, runtime)
    seed_dropout(0, 1, 0)
    batch = whole_batch(5)
    with runtime.autocast():
        loss = model(batch.ids_BT, targets=batch.targets_BT)
    return gradient(base_model, loss)


@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_and_compilation_keep_dropout(masked: bool) -> None:
    expected = dropout_gradient(RuntimeConfig("fp32", False, "cpu"), masked=masked)
    for compiled, kind in ((False, "full"), (False, "selective"), (True, "none" if masked else "selective")):
        runtime = RuntimeConfig("fp32", compiled, "cpu", ParallelLayout(activation_checkpointing=kind))
        for name, value in dropout_gradient(runtime, masked=masked).items():
            np.testing.assert_allclose(value, expected[name], 0, 1e-12 * np.abs(expected[name]).max(), err_msg=name)


def test_compiled_bf16_is_close_to_eager_bf16() -> None:
    """With heads wide enough for attention by matmuls."""
    expected = dropout_gradient(RuntimeConfig("bf16", False, "cpu"), n_embd=96)
    for name, value in dropout_gradient(RuntimeConfig("bf16", True, "cpu"), n_embd=96).items():
        assert np.linalg.norm(value - expected[name]) < 0.02 * np.linalg.norm(expected[name]), name


def test_a_resumed_run_uses_what_it_had_resolved(tmp_path: Path) -> None:
    previous = RuntimeConfig("bf16", True, "cpu", ParallelLayout("ddp", world_size=4))
    assert resolve_runtime(config(tmp_path), 50257, fake_ranks(4, 4), previous) == previous
    on_one_rank = resolve_runtime(config(tmp_path), 50257, fake_ranks(1, 1), previous)
    assert (on_one_rank.precision, on_one_rank.compile, on_one_rank.layout.strategy) == ("bf16", True, "none")


def test_estimated_communication_is_what_ring_algorithms_send() -> None:
    step = workload(BatchPlan(8, 1, 2))
    whole, root = 4 * step.sharded_numel(), 4 * step.non_block_numel
    micro_steps = 4
    ddp = functools.partial(ParallelLayout, "ddp", 2)
    fsdp = functools.partial(ParallelLayout, "fsdp", 2, 2)
    assert comm_bytes(step, ddp()) == whole
    assert comm_bytes(step, ddp(reduce_dtype="bf16")) == whole / 2
    assert comm_bytes(step, fsdp(reduce_dtype="bf16")) == (micro_steps * (2 * whole - root) + whole / 2) / 2
    assert comm_bytes(step, fsdp()) == (micro_steps * (2 * whole - root) + whole) / 2
    assert comm_bytes(step, fsdp(reshard_after_forward=False)) == (whole + whole) / 2
    assert comm_bytes(step, fsdp(sync_each_micro_step=True)) == (micro_steps * (2 * whole - root) + 4 * whole) / 2
