"""Whole runs from the command line: equal on any number of ranks, killed and resumed, finished, refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from distgpt import atomic_io, train
from distgpt.checkpoint import store
from distgpt.checkpoint.weights import build_model, iter_weights
from distgpt.config.loader import load_config
from distgpt.data.dataloader import Batch, TrainLoader
from distgpt.data.dataset import TokenWindows
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.data.token_files import open_token_file
from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import CheckpointError, ConfigError, DataError, NumericsError
from distgpt.models.gpt2 import DecoderLM
from tests.conftest import Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN, Started


def hashes(output_dir: Path, step: int) -> dict[str, str]:
    """The hash of every tensor of a checkpoint: weights, moments and step counts. (Headers have no fixed order.)"""
    by_name = {}
    for path in (output_dir / "checkpoints" / f"step-{step:08}").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            by_name[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert (
        sum(name.endswith("exp_avg_sq") for name in by_name) == sum(name.startswith("model.") for name in by_name) > 0
    )
    return by_name


def edited(config_file: Path, **lines: str) -> Path:
    """The config with whole lines replaced."""
    text = config_file.read_text().splitlines()
    others = [line for line in text if line.split(":")[0] not in lines]
    config_file.write_text("\n".join([*others, *(f"{key}: {value}" for key, value in lines.items())]) + "\n")
    return config_file


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, list[tuple[int, float, float]]]:
    """The curve of one config on 1, 2, 3 and 4 ranks, and accumulated, in fp32."""
    from tests.conftest import TINY

    by_layout = {}
    layouts: list[tuple[str, int, tuple[str, ...]]] = [
        ("1", 1, ()),
        ("2", 2, ()),
        ("3", 3, ()),
        ("4", 4, ("batch_size=1",)),
        ("3 fsdp", 3, ("parallel.strategy=fsdp", "activation_checkpointing=selective")),
        ("4 hsdp", 4, ("parallel.strategy=hsdp", "parallel.shard_size=2", "batch_size=1")),
    ]
    for name, ranks, extra in layouts:
        folder = tmp_path_factory.mktemp(f"ranks-{name}")
        (folder / "c.yaml").write_text(TINY.format(folder=folder, corpus=corpus))
        arguments = ["c.yaml", *PLAIN, "global_batch_size=8", "num_training_steps=40", *extra]
        done = subprocess.run(
            command("train", arguments, ranks),
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        by_layout[name] = training_curve(folder / "run")
        by_layout[f"{name} val"] = [
            (r["step"], r["val-loss"], 0.0) for r in read_metrics(folder / "run") if "val-loss" in r
        ]
    return by_layout


@pytest.mark.parametrize("ranks", ["2", "3", "4", "3 fsdp", "4 hsdp"])
def test_any_number_of_ranks_gives_the_same_loss_curve(
    curves: dict[str, list[tuple[int, float, float]]], ranks: str
) -> None:
    assert [step for step, _, _ in curves["1"]] == list(range(1, 41))
    for kind, columns in (("", 3), (" val", 2)):
        actual, expected = np.array(curves[ranks + kind]), np.array(curves["1" + kind])
        np.testing.assert_array_equal(actual[:, 0], expected[:, 0])
        np.testing.assert_allclose(actual[:, 1], expected[:, 1], atol=1e-5)
        if columns == 3:
            np.testing.assert_allclose(actual[:, 2], expected[:, 2], atol=1e-4)


def whole_batch(path: Path, seed: int, step: int) -> Batch:
    """All sequences of a step, read from a token file of the tiny config by one rank."""
    tokens = open_token_file(path)["train"]
    windows = TokenWindows(tokens, 32, 257)
    (batch,) = TrainLoader(windows, Sampler(len(windows), seed, BatchPlan(8, 8, 1), 0)).micro_batches(step)
    return batch


def test_the_logged_loss_equals_one_recomputed_from_a_checkpoint(config_file: Path, tmp_path: Path, run: Run) -> None:
    """Logged on 3 ranks, sharded; recomputed in one process from the checkpoint before, by torch's cross-entropy."""
    done = run("train", config_file, *PLAIN, "parallel.strategy=fsdp", "batch_size=2", "global_batch_size=8", ranks=3)
    assert done.returncode == 0, done.stderr
    config, tokenizer = load_config(config_file), load_tokenizer("bytes")
    model = build_model(config, tokenizer).to_empty(device="cpu")
    path = tmp_path / "run" / "checkpoints" / "step-00000008"
    with torch.no_grad():
        for name, values in iter_weights(path, model):
            model.get_parameter(name).copy_(values)
    batch = whole_batch(Path(str(config.data)), config.seed, 8)
    loss = F.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten())
    logged = {step: loss for step, loss, _ in training_curve(tmp_path / "run")}
    assert logged[9] == pytest.approx(loss.item(), rel=1e-6)


def test_the_config_key_masks_documents(config_file: Path, tmp_path: Path, run: Run) -> None:
    """The first loss of a run on 2 ranks, recomputed from separate documents by a model without document masks."""
    tokens = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.uint16)
    lines = np.where(tokens == ord("\n"), 256, tokens)  # each line is a document
    np.savez(tmp_path / "lines.npz", train=lines, val=lines[:200])
    arguments = (f"data={tmp_path / 'lines.npz'}", "mask_documents=true", "num_training_steps=2")
    done = run("train", config_file, *PLAIN, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    config = load_config(config_file, arguments[:1])
    model = DecoderLM(257, 32, 4, 32, 2, seed=config.seed)
    batch = whole_batch(tmp_path / "lines.npz", config.seed, 0)
    total = 0.0
    for ids_T, targets_T in zip(batch.ids_BT, batch.targets_BT, strict=True):
        starts = [0, *(t for t in range(1, 32) if ids_T[t] == 256)]
        for first, end in zip(starts, [*starts[1:], 32], strict=True):
            total += F.cross_entropy(model(ids_T[None, first:end])[0], targets_T[first:end], reduction="sum").item()
    unmasked = F.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten()).item()
    logged = training_curve(tmp_path / "run")[0][1]
    assert logged == pytest.approx(total / 256, rel=1e-6) and abs(unmasked - logged) > 1e-5


def test_dropout_differs_between_ranks(config_file: Path, tmp_path: Path, run: Run) -> None:
    """Two ranks read one constant token, so that without dropout, or with the same, one rank's loss is both's."""
    np.savez(tmp_path / "same.npz", train=np.full(5000, 7), val=np.full(50, 7))
    common = (f"data={tmp_path / 'same.npz'}", "num_training_steps=1", "num_warmup_steps=0")
    losses = {}
    for ranks, p_dropout, G in ((1, 0.5, 1), (2, 0.5, 2), (1, 0.0, 1), (2, 0.0, 2)):
        output_dir = tmp_path / f"{ranks}-{p_dropout}"
        arguments = (*PLAIN, *common, f"global_batch_size={G}", f"p_dropout={p_dropout}", f"output_dir={output_dir}")
        assert run("train", config_file, *arguments, ranks=ranks).returncode == 0
        losses[ranks, p_dropout] = training_curve(output_dir)[0][1]
    assert losses[2, 0.0] == pytest.approx(losses[1, 0.0], rel=1e-6)
    assert losses[2, 0.5] != pytest.approx(losses[1, 0.5], rel=1e-6)


def test_a_checkpoint_from_before_there_were_layouts_resumes(config_file: Path, tmp_path: Path) -> None:
    """Of format 1, as the first versions wrote it."""
    start(config_file)
    checkpoint, _ = store.latest_valid(tmp_path / "run")
    assert checkpoint is not None
    facts = checkpoint.state["run"]
    config, runtime = facts["config"], facts["runtime"]
    for key in ("parallel", "activation_checkpointing", "mask_documents", "max_minutes", "hang_minutes"):
        del config[key]
    state = {
        "config": config,
        "execution": {key: runtime[key] for key in ("precision", "compile", "device")},
        **{key: facts[key] for key in ("order_version", "sequences_per_step", "tokens", "tokenizer")},
        "wandb_run_id": facts["run_id"],
    }
    (checkpoint.path / "state.json").write_text(json.dumps(state))
    files = {p.name: store.file_digest(p) for p in checkpoint.path.iterdir() if p.name != "manifest.json"}
    (checkpoint.path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=2))
    start(config_file, "num_training_steps=14", "lr_decay_steps=12")
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 15))


def test_the_run_learns(curves: dict[str, list[tuple[int, float, float]]]) -> None:
    losses = [loss for _, loss, _ in curves["1"]]
    assert losses[0] == pytest.approx(np.log(257), rel=0.05)
    assert losses[-1] < losses[0] - 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (3, "auto"), (3, "fsdp")])
def test_resume_is_bit_identical_after_sigkill(config_file: Path, tmp_path: Path, ranks: int, strategy: str) -> None:
    """On default settings: bf16 where the processor has it, compiled (forced: so short a run would not be)."""
    edited(config_file, num_training_steps="120", log_every="1", checkpoint="{every: 10, keep: 2}")
    common = ["tiny.yaml", "compile=on", "p_dropout=0.1", f"parallel.strategy={strategy}"]
    uninterrupted = [*common, f"output_dir={tmp_path / 'a'}"]
    assert (
        subprocess.run(command("train", uninterrupted, ranks), cwd=tmp_path, env=environment(), check=False).returncode
        == 0
    )
    interrupted = [*common, f"output_dir={tmp_path / 'run'}"]
    killed = Started(tmp_path, ranks, *interrupted[1:])
    killed.wait_for_steps(25)
    killed.end()
    assert not (tmp_path / "run" / "eval.json").exists()
    done = subprocess.run(
        command("train", interrupted, ranks),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resume  " in done.stdout and ": after step " in done.stdout
    assert training_curve(tmp_path / "a") == training_curve(tmp_path / "run")
    assert hashes(tmp_path / "a", 120) == hashes(tmp_path / "run", 120)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_a_run_resumes_on_other_numbers_of_ranks_and_strategies(config_file: Path, tmp_path: Path, run: Run) -> None:
    assert (
        run(
            "train", config_file, *PLAIN, "num_training_steps=16", f"output_dir={tmp_path / 'uninterrupted'}"
        ).returncode
        == 0
    )
    for steps, ranks, strategy in ((4, 1, "none"), (8, 3, "fsdp"), (12, 2, "ddp"), (16, 1, "auto")):
        done = run(
            "train",
            config_file,
            *PLAIN,
            "num_training_steps=16",
            "checkpoint.keep=9",
            f"parallel.strategy={strategy}",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
        assert (f": after step {steps - 4}" in done.stdout) == (steps > 4)
        for step, path in list(store.list_checkpoints(tmp_path / "run")):
            if step > steps:
                atomic_io.remove_dir(path)
    expected = training_curve(tmp_path / "uninterrupted")
    np.testing.assert_allclose(np.array(training_curve(tmp_path / "run")), np.array(expected), atol=1e-4)


def start(config_file: Path, *overrides: str) -> None:
    """Train in this process."""
    train.main([str(config_file), *PLAIN, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_run_leaves_behind(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    run_dir = tmp_path / "run"
    assert {p.name for p in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "eval.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer",
        ".lock",
        "status.json",
    }
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    results = json.loads((run_dir / "eval.json").read_text())
    assert results["tokens"] == 1002 and results["step"] == 12
    assert results["val-perplexity"] == pytest.approx(np.exp(results["val-loss"]))
    assert results["val-bits-per-byte"] == pytest.approx(results["val-loss"] / np.log(2))  # a token is a byte
    rows = read_metrics(run_dir)
    assert [r["step"] for r in rows if "peak-bytes" in r] == [0, 12]
    assert all(10**8 < n_bytes < 10**10 for r in rows for n_bytes in r.get("peak-bytes", []))
    first = rows[1]
    assert list(first) == [
        "step",
        "train-loss",
        "learning-rate",
        "grad-norm",
        "tokens-per-second",
        "tflops",
        "mfu",
        "tokens",
        "skipped",
    ]
    assert (first["step"], first["learning-rate"], first["tokens"], first["mfu"]) == (1, 0.0, 256, None)
    assert [r["step"] for r in rows if "val-loss" in r] == [5, 10, 12]
    assert load_config(run_dir / "config.yaml").model_config.n_embd == 32


def test_a_finished_run_shows_its_results_and_changes_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    before = contents(tmp_path)
    capsys.readouterr()
    start(config_file)
    assert f'"val-loss": {json.loads(before["run/eval.json"])["val-loss"]}' in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_finished_run_is_extended_on_the_schedule_it_had(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    capsys.readouterr()
    start(config_file, "num_training_steps=16", "lr_decay_steps=12")
    printed = capsys.readouterr().out
    assert ": after step 12" in printed and "num_training_steps is now 16 (was 12)" in printed
    rows = [row for row in read_metrics(tmp_path / "run") if "train-loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["learning-rate"] for row in rows[12:]] == [1e-4] * 4  # min_lr


def test_extending_a_run_never_stretches_its_schedule_silently(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    before = contents(tmp_path)
    message = r"num_training_steps: got 24, .* from 1\.0e-04 to 6\.1e-04; set lr_decay_steps=12 "
    with pytest.raises(ConfigError, match=message):
        start(config_file, "num_training_steps=24")
    assert contents(tmp_path) == before


def test_a_run_in_its_flat_part_is_extended_without_another_key(config_file: Path, tmp_path: Path) -> None:
    start(config_file, "lr_schedule=constant")
    start(config_file, "lr_schedule=constant", "num_training_steps=14")
    rows = [row for row in read_metrics(tmp_path / "run") if "train-loss" in row]
    assert [row["learning-rate"] for row in rows[2:]] == [1e-3] * 12


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model_config.n_layer=1", "model_config.n_layer: got 1, but the run in"),
        ("mask_documents=true", "mask_documents: got True, but the run in"),
        ("seed=1", "seed: got 1, but the run in"),
        ("max_lr=2e-3", "max_lr: got 0.002"),
        ("batch_size=4", "global_batch_size: got 4, but the run in"),
        ("num_training_steps=5", "num_training_steps: got 5, but the run in"),
    ],
)
def test_a_different_run_in_the_same_folder_is_refused(
    config_file: Path, tmp_path: Path, override: str, expected: str
) -> None:
    start(config_file)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        start(config_file, override)
    assert contents(tmp_path) == before


def test_resuming_on_other_data_is_refused(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    np.savez(tmp_path / "other.npz", train=np.arange(5000) % 200, val=np.arange(50))
    with pytest.raises(DataError, match=r"other\.npz: got tokens"):
        start(config_file, f"data={tmp_path / 'other.npz'}")


def test_keys_that_affect_no_result_may_change(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    mutable = ("batch_size=4", "global_batch_size=8", "log_every=2", "eval.every=3")
    start(config_file, "num_training_steps=14", "lr_decay_steps=12", *mutable)
    assert [step for step, _, _ in training_curve(tmp_path / "run")][-2:] == [12, 14]


def test_a_run_starts_from_a_finished_runs_weights(
    config_file: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    finished = tmp_path / "run"
    val_loss = json.loads((finished / "eval.json").read_text())["val-loss"]
    capsys.readouterr()
    arguments = ["num_training_steps=1", "num_warmup_steps=1", "seed=5", "--from", str(finished)]  # the rate is 0
    start(config_file, f"output_dir={tmp_path / 'tuned'}", *arguments)
    assert f"from    {finished}: starting from its weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned" / "eval.json").read_text())["val-loss"] == val_loss
    sharded = (f"output_dir={tmp_path / 'sharded'}", "parallel.strategy=fsdp", *arguments)
    assert run("train", config_file, *PLAIN, *sharded, ranks=3).returncode == 0
    assert (tmp_path / "sharded" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model_config\.n_embd: got 64, but .*run has 32; use the same"):
        start(config_file, f"output_dir={tmp_path / 'other'}", "model_config.n_embd=64", *arguments)
    with pytest.raises(CheckpointError, match="holds no trained model"):
        start(config_file, f"output_dir={tmp_path / 'other'}", "--from", str(tmp_path))
    more = ("num_training_steps=3", "lr_decay_steps=1")
    start(config_file, f"output_dir={tmp_path / 'tuned'}", *arguments[1:], *more)  # resumes from its own checkpoint
    assert [step for step, _, _ in training_curve(tmp_path / "tuned")] == [1, 2, 3]


@pytest.mark.slow
def test_a_checkpoints_weights_start_a_run_and_evaluate_and_generate(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    """The checkpoint is saved on 3 ranks, sharded, by a run that continued."""
    assert run("train", config_file, *PLAIN, "parallel.strategy=fsdp", ranks=3).returncode == 0
    source = tmp_path / "run" / "checkpoints" / "step-00000008"
    done = run("evaluate", source)
    val_loss = json.loads(done.stdout)["val-loss"]
    assert val_loss != json.loads((tmp_path / "run" / "eval.json").read_text())["val-loss"]
    tuned = ("num_training_steps=1", "num_warmup_steps=1", f"output_dir={tmp_path / 'tuned'}")  # the rate is 0
    assert run("train", config_file, *PLAIN, *tuned, "--from", source, ranks=2).returncode == 0
    assert json.loads((tmp_path / "tuned" / "eval.json").read_text())["val-loss"] == pytest.approx(val_loss, rel=1e-6)
    assert run("generate", source, "--prompt", "x", "--max-new-tokens", "3").returncode == 0
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused = run("train", config_file, *PLAIN, f"output_dir={tmp_path / 'other'}", "--from", source)
    assert refused.returncode == 4 and f"{shard}: damaged" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_fresh_starts_over_and_deletes_only_what_a_run_wrote(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    curve = training_curve(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("kept")
    start(config_file, "--fresh", "seed=1")
    assert (tmp_path / "run" / "notes.txt").read_text() == "kept"
    assert len(training_curve(tmp_path / "run")) == len(curve) and training_curve(tmp_path / "run") != curve


def test_evaluating_saving_and_logging_change_no_weight(config_file: Path, tmp_path: Path) -> None:
    start(config_file, f"output_dir={tmp_path / 'often'}", "p_dropout=0.2", "eval.every=1", "checkpoint.every=1")
    start(config_file, f"output_dir={tmp_path / 'never'}", "p_dropout=0.2", "eval.every=99", "log_every=99")
    assert hashes(tmp_path / "often", 12) == hashes(tmp_path / "never", 12)


def test_a_damaged_checkpoint_is_skipped(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(config_file)
    curve = training_curve(tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints" / "step-00000012").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    start(config_file)
    printed = capsys.readouterr().out
    assert ": after step 8" in printed and f"skipping {shard}: damaged" in printed
    assert training_curve(tmp_path / "run") == curve


def test_a_run_without_a_valid_checkpoint_is_not_started_over(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    for _, path in store.list_checkpoints(tmp_path / "run"):
        (path / "manifest.json").write_text("{")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint is valid"):
        start(config_file)
    assert contents(tmp_path) == before


def test_non_finite_gradients_end_the_run_and_change_no_weight(config_file: Path, tmp_path: Path) -> None:
    # Decay of lr x 10 = 100 a step multiplies the weights by -99 until they overflow.
    message = r"step \d+: the gradients of this step .* to step \d+ were not finite .*; step \d+ read sequences \d+, "
    with pytest.raises(NumericsError, match=message) as raised:
        start(config_file, "max_lr=10", "optimizer.weight_decay=10", "num_training_steps=400", "checkpoint.every=1")
    first = int(str(raised.value).split(":")[0].removeprefix("step "))
    rows = [row for row in read_metrics(tmp_path / "run") if "skipped" in row]
    assert [row["skipped"] for row in rows[-9:]] == list(range(1, 10)) and rows[-9]["step"] == first
    latest, rejected = store.latest_valid(tmp_path / "run")
    assert latest is not None and not rejected
    weights = next(latest.path.glob("*.safetensors"))
    assert all(np.isfinite(tensor.numpy()).all() for tensor in load_file(weights).values())


def test_an_unwritable_output_dir_is_refused_at_the_start(config_file: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    done = run("train", config_file, f"output_dir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 6
    assert done.stderr.startswith("distgpt: error: output_dir: ") and done.stderr.count("\n") == 1


def test_missing_data_ends_with_exit_code_3(config_file: Path, run: Run, tmp_path: Path) -> None:
    done = run("train", config_file, "data=nowhere.npz")
    assert done.returncode == 3
    assert done.stderr.startswith("distgpt: error: nowhere.npz: cannot read") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_under_torchrun_one_rank_prints_the_error(config_file: Path, run: Run, tmp_path: Path) -> None:
    done = run("train", config_file, "data=nowhere.npz", ranks=2)
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("distgpt: error: nowhere.npz: cannot read") == 1
    assert (
        'Traceback (most recent call last):\n  File "<frozen runpy>"' not in done.stderr.split("torch/distributed")[0]
    )


def test_a_closed_pipe_does_not_stop_the_run(config_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train", [config_file]), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.slow
def test_no_run_crashes_at_exit(config_file: Path, run: Run) -> None:
    for attempt in range(20):
        done = run("train", config_file, "num_training_steps=2", "num_warmup_steps=0", "--fresh", ranks=3)
        assert done.returncode == 0, f"run {attempt}: {done.stderr[-2000:]}"


def test_files_that_no_run_wrote_are_kept(config_file: Path, tmp_path: Path) -> None:
    names = ("tokenizer/precious", "checkpoints/mine/weights", "notes")
    for name in names:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a run's")
    start(config_file, "--fresh")
    for name in names:
        assert (tmp_path / "run" / name).read_text() == "not a run's"


def test_a_stray_folder_named_like_a_checkpoint_costs_no_valid_one(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    (tmp_path / "run" / "checkpoints" / "step-99999999").mkdir()
    start(config_file, "num_training_steps=16", "lr_decay_steps=12", "checkpoint.keep=2")
    latest, rejected = store.latest_valid(tmp_path / "run")
    assert latest is not None and latest.step == 16 and not rejected


def test_a_run_without_standard_output_trains(config_file: Path, tmp_path: Path) -> None:
    for redirection in (">/dev/full", ">&-"):
        line = " ".join(command("train", [config_file, "--fresh"])) + f" {redirection}"
        assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment(), check=False).returncode == 0
        assert (tmp_path / "run" / "eval.json").exists()


def test_a_lost_or_damaged_result_is_recreated(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    results = (tmp_path / "run" / "eval.json").read_text()
    (tmp_path / "run" / "eval.json").write_text("{g")
    start(config_file)
    assert (tmp_path / "run" / "eval.json").read_text() == results
    (tmp_path / "run" / "model.safetensors").unlink()
    start(config_file)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_running_out_of_memory_costs_no_earlier_run(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    before = contents(tmp_path)
    sizes = "model_config.n_embd=8192 model_config.n_head=64 model_config.n_layer=2"  # 6.4 GB, and room on disk
    line = "ulimit -v 5000000; " + " ".join(command("train", [config_file, "--fresh"])) + f" {sizes}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 6 and "Traceback" not in done.stderr
    after = contents(tmp_path)
    assert json.loads(after.pop("run/status.json"))["code"] == 6
    for record in ("run/status.json", "run/.lock"):  # these describe the last process
        before.pop(record), after.pop(record, None)
    assert after == before
