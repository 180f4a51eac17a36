"""The same run on any layout: the real strategies on real ranks against plain PyTorch in one process."""

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

from distgpt import config as configs
from distgpt import world as worlds
from distgpt.data import Batch
from distgpt.errors import ConfigError
from distgpt.loss import IGNORED
from distgpt.model import DecoderLM
from distgpt.parallel import Execution, decide, parallelize
from distgpt.plan import BatchPlan, Layout, Sizes, Work, memory, traffic
from distgpt.step import seed_dropout
from tests.ranks import (
    CLIP,
    END_OF_TEXT,
    LEARNING_RATE,
    N_VOCAB,
    SEQ_LEN,
    SEQUENCES,
    TOKENS,
    drop_targets,
    reader,
    results,
    small_model,
    strategies,
    thin_model,
)
from tests.test_exercise import ALONE

RANKS = [1, 2, 3, 4]
LAYOUTS = [(ranks, strategy) for ranks in RANKS for strategy in strategies(ranks)]
SHARDED = [(ranks, strategy) for ranks, strategy in LAYOUTS if strategy in ("fsdp", "hsdp")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def whole_batch(step: int) -> Batch:
    """All sequences of a step as one batch."""
    with tempfile.TemporaryDirectory() as folder:
        (batch,) = reader(Path(folder), ALONE, SEQUENCES).at(step)
    return batch


def plain_loss(model: DecoderLM, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of token losses from whole logits."""
    return F.cross_entropy(model(ids_BT).flatten(0, 1), targets_BT.flatten(), reduction="sum")


def gradient(model: DecoderLM, loss: Tensor) -> dict[str, np.ndarray]:
    loss.backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def plain_gradient(dtype: torch.dtype) -> tuple[dict[str, np.ndarray], float]:
    """Gradient and loss of step 5 by plain autograd over the whole batch."""
    model, batch = small_model().to(dtype), whole_batch(5)
    loss = plain_loss(model, batch.ids_BT, batch.targets_BT) / TOKENS
    return gradient(model, loss), loss.item()


@functools.cache
def documents_apart(dtype: torch.dtype) -> tuple[dict[str, np.ndarray], float]:
    """The same where each document of each sequence is run alone, by a model that knows nothing of documents."""
    model, batch = small_model().to(dtype), whole_batch(5)
    loss = torch.zeros((), dtype=dtype)
    n_documents = 0
    for ids_T, targets_T in zip(batch.ids_BT, batch.targets_BT, strict=True):
        starts = [t for t in range(SEQ_LEN) if t == 0 or ids_T[t] == END_OF_TEXT]
        n_documents += len(starts)
        for start, end in zip(starts, [*starts[1:], SEQ_LEN], strict=True):
            loss = loss + plain_loss(model, ids_T[None, start:end], targets_T[None, start:end])
    assert n_documents > 2 * SEQUENCES
    loss = loss / TOKENS
    return gradient(model, loss), loss.item()


@functools.cache
def plain_training(dtype: torch.dtype, steps: int) -> tuple[np.ndarray, float]:
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
        loss = plain_loss(model, batch.ids_BT, batch.targets_BT) / TOKENS
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rows.append([loss.item(), float(norm)])
    return np.array(rows), float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def plain_curve(dtype: torch.dtype) -> np.ndarray:
    return plain_training(dtype, 20)[0]


def assert_gradients(
    found: list[dict[str, Any]], file: Path, expected: tuple[dict[str, np.ndarray], float], tolerance: float
) -> None:
    """Loss and norm on every rank, and every parameter's gradient, are what they should be."""
    gradients, loss = expected
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    for row in found:
        assert row["loss"] == pytest.approx(loss, rel=tolerance)
        assert row["norm"] == pytest.approx(norm, rel=tolerance / 10)
    with np.load(file) as got:
        assert set(got) == set(gradients)
        for name, value in gradients.items():
            np.testing.assert_allclose(got[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch_size", [8, 3, 1])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_every_layout_gives_the_gradient_of_one_plain_batch(
    ranks: int, strategy: str, batch_size: int, dtype: torch.dtype
) -> None:
    found, folder = results(ranks)
    for way in ("", "-each", "-kept") if strategy in ("fsdp", "hsdp") else ("",):
        name = f"{strategy}{way}-{batch_size}-{dtype}"
        rows = [row[name] for row in found["gradients"]]
        assert_gradients(rows, folder / f"gradients-{name}.npz", plain_gradient(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_empty_shards_and_unequal_targets_change_no_gradient(ranks: int, strategy: str) -> None:
    found, folder = results(ranks)
    for name, model in (("thin", thin_model()), ("ragged", small_model())):
        batch = whole_batch(5)
        if name == "ragged":
            drop_targets(batch)
            per_row = (batch.targets_BT != IGNORED).sum(1)
            assert per_row.max() > 2 * per_row.min()
        tokens = int((batch.targets_BT != IGNORED).sum())
        loss = plain_loss(model.double(), batch.ids_BT, batch.targets_BT) / tokens
        rows = [row[f"{name}-{strategy}"] for row in found["special_gradients"]]
        assert_gradients(rows, folder / f"gradients-{name}-{strategy}.npz", (gradient(model, loss), loss.item()), 1e-10)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_the_bf16_gradient_is_near_the_plain_one(ranks: int, strategy: str) -> None:
    _, folder = results(ranks)
    expected, _ = plain_gradient(torch.float32)
    with np.load(folder / f"gradients-bf16-{strategy}.npz") as got:
        for name, value in expected.items():
            assert np.linalg.norm(got[name] - value) < 0.02 * np.linalg.norm(value), name
        assert any(not np.allclose(got[name], value, rtol=1e-5) for name, value in expected.items())  # it is bf16


@pytest.mark.parametrize(("ranks", "strategy"), [layout for layout in LAYOUTS if layout[0] > 1])
def test_gradients_exchanged_in_bf16_are_the_plain_ones_rounded(ranks: int, strategy: str) -> None:
    found, folder = results(ranks)
    expected, loss = plain_gradient(torch.float32)
    assert all(r[f"exchanged-{strategy}"]["loss"] == pytest.approx(loss, rel=1e-5) for r in found["special_gradients"])
    with np.load(folder / f"gradients-exchanged-{strategy}.npz") as got:
        for name, value in expected.items():
            assert np.linalg.norm(got[name] - value) < 2 * ranks * 2**-9 * np.linalg.norm(value), name
            assert not np.allclose(got[name], value, rtol=1e-5), name  # it did travel in bf16


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_masked_documents_give_the_gradient_of_each_run_alone(ranks: int, strategy: str) -> None:
    found, folder = results(ranks)
    rows = [row[strategy] for row in found["documents"]]
    file = folder / f"gradients-documents-{strategy}.npz"
    assert_gradients(rows, file, documents_apart(torch.float64), TOLERANCE[torch.float64])


@pytest.mark.parametrize("ranks", RANKS)
def test_neither_recomputation_nor_compilation_changes_the_gradient(ranks: int) -> None:
    found, folder = results(ranks)
    names = list(found["recomputation"][0])
    assert len(names) == len(strategies(ranks)) * (10 if ranks == 2 else 4)
    for name in names:
        expected = (documents_apart if name.endswith("True") else plain_gradient)(torch.float32)
        rows = [row[name] for row in found["recomputation"]]
        assert_gradients(rows, folder / f"gradients-{name}.npz", expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_every_layout_gives_the_curve_of_a_textbook_loop(ranks: int, strategy: str) -> None:
    found, _ = results(ranks)
    assert (plain_curve(torch.float64)[:, 1] > CLIP).sum() > 10  # clipping is at work
    for curves in found["curves"]:
        for name, curve in curves.items():
            if name.startswith(f"{strategy}-") and name.endswith("fp32"):
                dtype = torch.float64 if "float64" in name else torch.float32
                # Adam enlarges rounding: in fp32 the norms drift apart (2e-5 by step 14) long before the losses do.
                columns = 1 if dtype == torch.float32 else 2
                ours, plain = np.array(curve)[:, :columns], plain_curve(dtype)[:, :columns]
                np.testing.assert_allclose(ours, plain, rtol=TOLERANCE[dtype], err_msg=name)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_bf16_stays_near_fp32_on_every_layout(ranks: int, strategy: str) -> None:
    found, _ = results(ranks)
    for curves in found["curves"]:
        curve = np.array(curves[f"{strategy}-8-torch.float32-bf16"])[:, 0]
        expected = plain_curve(torch.float32)[:, 0]
        np.testing.assert_allclose(curve, expected, rtol=5e-3)
        assert not np.allclose(curve, expected, rtol=1e-6)  # it is bf16


@pytest.mark.parametrize("ranks", RANKS)
def test_one_all_reduce_per_bucket_and_update_however_many_micro_steps(ranks: int) -> None:
    found, _ = results(ranks)
    for counted in found["reductions"]:
        assert counted["micro_steps"] == 3
        assert counted["buckets"] > 1
        assert counted["per_update"] == [counted["buckets"]] * 3


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_fsdp_exchanges_what_its_settings_say(ranks: int) -> None:
    """Two layers and what is outside them are three units; an update has four micro-steps."""
    units, micro_steps, kept_whole = 3, 4, 1
    found, _ = results(ranks)
    for counted in found["exchanges"]:
        for reduce_each in (False, True):
            for reshard in (False, True):
                counts = counted[f"{reduce_each}-{reshard}"]
                gathers = micro_steps * (2 * units - kept_whole) if reshard else units
                assert counts["c10d::_allgather_base_"] == gathers
                assert counts["c10d::_reduce_scatter_base_"] == units * (micro_steps if reduce_each else 1)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_initial_weights_are_the_same_and_a_rank_holds_its_share(ranks: int, strategy: str) -> None:
    work = Work(Sizes(N_VOCAB, 21, 3, SEQ_LEN, 2), BatchPlan(SEQUENCES, 8, ranks), SEQ_LEN, bf16=False)
    whole = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in small_model().parameters())).hexdigest()
    shards = {"fsdp": ranks, "hsdp": ranks // 2}.get(strategy, 1)
    plan = memory(work, Layout(strategy, ranks, shards))
    found, _ = results(ranks)
    rows = [row[strategy] for row in found["held"]]
    assert {row["initial"] for row in rows} == {whole}
    for part in ("weights", "moments"):
        assert max(row[part] for row in rows) == plan[part]  # the plan on paper, to the byte
    assert max(row["gradients"] for row in rows) == plan["weights"]


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_a_nan_gradient_on_one_rank_leaves_all_weights_as_they_are(ranks: int, strategy: str) -> None:
    found, _ = results(ranks)
    for seen in (row[strategy] for row in found["nan_gradient"]):
        assert seen["after"] == seen["before"]
        assert np.isfinite(seen["later"]) and seen["later"] != seen["before"]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_of_any_strategy_goes_on_under_any_other(ranks: int) -> None:
    """Two steps with a save, and a load into a new model, between them."""
    _, expected = plain_training(torch.float32, 2)
    found, _ = results(ranks)
    for row in found["saved"]:
        sums = list(row.values())
        assert len(sums) == 2 * len(strategies(ranks)) ** 2
        assert sums == pytest.approx([expected] * len(sums), rel=1e-6)
        for name in list(row)[::2]:
            assert row[f"{name} trained"] == pytest.approx(row[name], rel=1e-12)


def config(tmp_path: Path, *overrides: str) -> configs.Config:
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: out\nmodel_config: {n_embd: 64, n_head: 4, n_positions: 64, n_layer: 2}\nbatch_size: 8\n"
        "seq_len: 64\nnum_warmup_steps: 0\nnum_training_steps: 10\nmin_lr: 0\nmax_lr: 1e-3\n"
    )
    return configs.load(file, overrides)


class Ranks(worlds.World):
    """What a rank of four with a little memory would see; nothing is communicated."""

    grouped = True
    memory_bytes = 0

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def layout(tmp_path: Path, memory_gb: float, *overrides: str, size: int = 4) -> Layout:
    world = Ranks(rank=0, size=size, local_size=2, device=torch.device("cpu"), threads=1)
    object.__setattr__(world, "memory_bytes", int(memory_gb * 1e9))
    return decide(config(tmp_path, "compile=off", "precision=fp32", *overrides), 50257, world).layout


def test_auto_spreads_the_model_only_when_it_must(tmp_path: Path) -> None:
    assert layout(tmp_path, 100, size=1) == Layout("none", 1)
    assert layout(tmp_path, 100) == Layout("ddp", 4)
    assert layout(tmp_path, 0.1) == Layout("fsdp", 4, 4, reduce_each=True)
    assert layout(tmp_path, 0.1, "parallel.strategy=ddp") == Layout("ddp", 4)


def test_the_config_decides_the_layout(tmp_path: Path) -> None:
    fsdp = "parallel.strategy=fsdp"
    assert layout(tmp_path, 100, fsdp) == Layout("fsdp", 4, 4)
    assert layout(tmp_path, 100, fsdp, "parallel.reduce_gradients=each") == Layout("fsdp", 4, 4, reduce_each=True)
    assert layout(tmp_path, 0.1, fsdp, "parallel.reduce_gradients=last") == Layout("fsdp", 4, 4)
    kept = Layout("fsdp", 4, 4, reshard_after_forward=False)
    assert layout(tmp_path, 100, fsdp, "parallel.reshard_after_forward=false") == kept
    recomputed = Layout("fsdp", 4, 4, activation_checkpointing="full")
    assert layout(tmp_path, 100, fsdp, "activation_checkpointing=full") == recomputed
    hsdp = "parallel.strategy=hsdp"
    assert layout(tmp_path, 100, hsdp) == Layout("hsdp", 4, 2)  # the ranks of one machine
    assert layout(tmp_path, 100, hsdp, "parallel.shard_ranks=4") == Layout("hsdp", 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.strategy=none",), "got none with 4 ranks, expected ddp, fsdp or hsdp"),
        (("parallel.strategy=hsdp", "parallel.shard_ranks=3"), "got 3 with 4 ranks, expected a divisor of 4"),
        (("parallel.strategy=hsdp", "parallel.shard_ranks=8"), "got 8 with 4 ranks, expected a divisor of 4"),
        (("parallel.shard_ranks=2",), "got 2 with parallel.strategy = auto, expected strategy hsdp"),
    ],
)
def test_a_strategy_that_the_ranks_do_not_suit_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(tmp_path, 100, *overrides)


def test_sharding_without_torchrun_is_refused_even_if_it_was_decided_before(tmp_path: Path) -> None:
    message = "got fsdp without torchrun, expected auto or none"
    with pytest.raises(ConfigError, match=message):
        decide(config(tmp_path, "compile=off", "parallel.strategy=fsdp"), 257, ALONE)
    with pytest.raises(ConfigError, match=message):
        decide(config(tmp_path, "compile=off"), 257, ALONE, Execution("fp32", False, "cpu", Layout("fsdp", 1)))


def dropout_gradient(how: Execution, n_embd: int = 21, masked: bool = False) -> dict[str, np.ndarray]:
    """Of one batch with dropout on, drawn from the same seed each time; in fp64 unless the execution is in bf16."""
    torch._dynamo.reset()
    end_of_text = END_OF_TEXT if masked else None
    model = DecoderLM(N_VOCAB, n_embd, 3, SEQ_LEN, 2, p_dropout=0.3, seed=3, end_of_text=end_of_text)
    running = parallelize(model if how.precision == "bf16" else model.double(), ALONE, how)
    seed_dropout(0, 1, 0)
    batch = whole_batch(5)
    return gradient(model, running(batch.ids_BT, targets_BT=batch.targets_BT))


@pytest.mark.parametrize("masked", [False, True])
def test_neither_recomputation_nor_compilation_changes_dropout(masked: bool) -> None:
    expected = dropout_gradient(Execution("fp32", False, "cpu"), masked=masked)
    for compiled, kind in ((False, "full"), (False, "selective"), (True, "none" if masked else "selective")):
        how = Execution("fp32", compiled, "cpu", Layout(activation_checkpointing=kind))
        for name, value in dropout_gradient(how, masked=masked).items():
            np.testing.assert_allclose(value, expected[name], 0, 1e-12 * np.abs(expected[name]).max(), err_msg=name)


def test_compiled_bf16_is_near_bf16() -> None:
    """With heads wide enough for attention by matmuls."""
    expected = dropout_gradient(Execution("bf16", False, "cpu"), n_embd=96)
    for name, value in dropout_gradient(Execution("bf16", True, "cpu"), n_embd=96).items():
        assert np.linalg.norm(value - expected[name]) < 0.02 * np.linalg.norm(expected[name]), name


def test_what_a_run_had_decided_is_used_again(tmp_path: Path) -> None:
    kept = Execution("bf16", True, "cpu", Layout("ddp", ranks=4))
    world = Ranks(rank=0, size=4, local_size=4, device=torch.device("cpu"), threads=1)
    assert decide(config(tmp_path), 50257, world, kept) == kept
    alone = Ranks(rank=0, size=1, local_size=1, device=torch.device("cpu"), threads=1)
    elsewhere = decide(config(tmp_path), 50257, alone, kept)
    assert (elsewhere.precision, elsewhere.compile, elsewhere.layout.strategy) == ("bf16", True, "none")


def test_traffic_on_paper_is_what_rings_send() -> None:
    sizes = Sizes(N_VOCAB, 21, 3, SEQ_LEN, 2)
    work = Work(sizes, BatchPlan(8, 1, 2), SEQ_LEN, bf16=False)
    whole = 4 * sizes.stored()
    assert traffic(work, Layout("ddp", 2)) == whole
    outer = 4 * sum(int(np.prod(shape)) for shape in sizes.outer_shapes)
    fsdp = functools.partial(Layout, "fsdp", 2, 2)
    micro_steps = 4
    assert traffic(work, Layout("ddp", 2, reduce_dtype="bf16")) == whole / 2
    assert traffic(work, fsdp(reduce_dtype="bf16")) == (micro_steps * (2 * whole - outer) + whole / 2) / 2
    assert traffic(work, fsdp()) == (micro_steps * (2 * whole - outer) + whole) / 2
    assert traffic(work, fsdp(reshard_after_forward=False)) == (whole + whole) / 2
    assert traffic(work, fsdp(reduce_each=True)) == (micro_steps * (2 * whole - outer) + 4 * whole) / 2
