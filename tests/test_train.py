"""Whole runs through the front door: the same on any number of ranks, killed and continued, finished and refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from safetensors.torch import load_file

from distgpt import checkpoint, durable, saver, train, trained
from distgpt import config as configs
from distgpt.data import ShuffledReader
from distgpt.errors import CheckpointError, ConfigError, DataError, NumericsError
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer
from distgpt.plan import BatchPlan
from distgpt.shards import open_tokens
from distgpt.tokenizer import load_tokenizer
from tests.conftest import Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN, Started
from tests.test_exercise import ALONE


def hashes(output_dir: Path, step: int) -> dict[str, str]:
    """The hash of every tensor of a checkpoint: weights, moments and step counts. (Headers have no fixed order.)"""
    found = {}
    for path in (output_dir / "checkpoints" / f"step-{step:08}").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert sum(name.endswith("exp_avg_sq") for name in found) == sum(name.startswith("model.") for name in found) > 0
    return found


def edited(config_file: Path, **lines: str) -> Path:
    """The config with whole lines replaced."""
    text = config_file.read_text().splitlines()
    kept = [line for line in text if line.split(":")[0] not in lines]
    config_file.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in lines.items())]) + "\n")
    return config_file


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, list[tuple[int, float, float]]]:
    """The curve of one config on 1, 2, 3 and 4 ranks, and accumulated, in fp32."""
    from tests.conftest import TINY

    found = {}
    layouts: list[tuple[str, int, tuple[str, ...]]] = [
        ("1", 1, ()),
        ("2", 2, ()),
        ("3", 3, ()),
        ("4", 4, ("batch_size=1",)),
        ("3 fsdp", 3, ("parallel.strategy=fsdp", "activation_checkpointing=selective")),
        ("4 hsdp", 4, ("parallel.strategy=hsdp", "parallel.shard_ranks=2", "batch_size=1")),
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
        found[name] = training_curve(folder / "run")
        found[f"{name} val"] = [
            (r["step"], r["val-loss"], 0.0) for r in read_metrics(folder / "run") if "val-loss" in r
        ]
    return found


@pytest.mark.parametrize("ranks", ["2", "3", "4", "3 fsdp", "4 hsdp"])
def test_any_number_of_ranks_gives_the_same_curve(
    curves: dict[str, list[tuple[int, float, float]]], ranks: str
) -> None:
    assert [step for step, _, _ in curves["1"]] == list(range(1, 41))
    for kind, columns in (("", 3), (" val", 2)):
        ours, alone = np.array(curves[ranks + kind]), np.array(curves["1" + kind])
        np.testing.assert_array_equal(ours[:, 0], alone[:, 0])
        np.testing.assert_allclose(ours[:, 1], alone[:, 1], atol=1e-5)
        if columns == 3:
            np.testing.assert_allclose(ours[:, 2], alone[:, 2], atol=1e-4)


def test_the_loss_logged_is_the_loss_recomputed_from_scratch(config_file: Path, tmp_path: Path, run: Run) -> None:
    """Logged on 3 ranks, sharded; recomputed in one process from the checkpoint before, by plain cross-entropy."""
    done = run("train", config_file, *PLAIN, "parallel.strategy=fsdp", "batch_size=2", "global_batch_size=8", ranks=3)
    assert done.returncode == 0, done.stderr
    found, _ = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.step == 12
    found = checkpoint.Checkpoint(found.path.with_name("step-00000008"), 8, {})
    config, tokenizer = configs.load(config_file), load_tokenizer("bytes")
    model = trained.build_model(config, tokenizer).to_empty(device="cpu")
    saver.restore(found, model, build_optimizer(model, config.optimizer), ALONE)
    stream = open_tokens(str(config.data))["train"]
    (batch,) = ShuffledReader(stream, 257, 32, config.seed, BatchPlan(8, 8, 1), 0).at(8)
    loss = F.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten())
    logged = {step: loss for step, loss, _ in training_curve(tmp_path / "run")}
    assert logged[9] == pytest.approx(loss.item(), rel=1e-6)


def test_masked_documents_reach_the_model_through_the_config(config_file: Path, tmp_path: Path, run: Run) -> None:
    """The first loss of a run on 2 ranks, recomputed from each document alone by a model that masks none."""
    tokens = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.uint16)
    lines = np.where(tokens == ord("\n"), 256, tokens)  # each a document
    np.savez(tmp_path / "lines.npz", train=lines, val=lines[:200])
    arguments = (f"data={tmp_path / 'lines.npz'}", "mask_documents=true", "num_training_steps=2")
    done = run("train", config_file, *PLAIN, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    config = configs.load(config_file, arguments[:1])
    model = DecoderLM(257, 32, 4, 32, 2, seed=config.seed)
    stream = open_tokens(tmp_path / "lines.npz")["train"]
    (batch,) = ShuffledReader(stream, 257, 32, config.seed, BatchPlan(8, 8, 1), 0).at(0)
    total = 0.0
    for ids_T, targets_T in zip(batch.ids_BT, batch.targets_BT, strict=True):
        starts = [0, *(t for t in range(1, 32) if ids_T[t] == 256)]
        for first, end in zip(starts, [*starts[1:], 32], strict=True):
            total += F.cross_entropy(model(ids_T[None, first:end])[0], targets_T[first:end], reduction="sum").item()
    whole = F.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten()).item()
    logged = training_curve(tmp_path / "run")[0][1]
    assert logged == pytest.approx(total / 256, rel=1e-6) and abs(whole - logged) > 1e-5


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


def test_a_checkpoint_from_before_there_were_layouts_goes_on(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    found, _ = checkpoint.newest(tmp_path / "run")
    assert found is not None
    for key in ("skipped", "platform", "val_loss"):
        del found.state[key]
    del found.state["execution"]["layout"]
    for key in ("parallel", "activation_checkpointing", "mask_documents", "max_minutes", "hang_minutes"):
        del found.state["config"][key]
    (found.path / "state.json").write_text(json.dumps(found.state))
    files = {p.name: checkpoint.describe(p) for p in found.path.iterdir() if p.name != "manifest.json"}
    (found.path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=2))
    start(config_file, "num_training_steps=14")
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 15))


def test_the_run_learns(curves: dict[str, list[tuple[int, float, float]]]) -> None:
    losses = [loss for _, loss, _ in curves["1"]]
    assert losses[0] == pytest.approx(np.log(257), rel=0.05)
    assert losses[-1] < losses[0] - 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (3, "auto"), (3, "fsdp")])
def test_killed_and_started_again_it_ends_bit_for_bit_the_same(
    config_file: Path, tmp_path: Path, ranks: int, strategy: str
) -> None:
    """On default settings: bf16 where the processor has it, compiled (forced: so short a run would not be)."""
    edited(config_file, num_training_steps="120", log_every="1", checkpoint="{every: 10, keep: 2}")
    common = ["tiny.yaml", "compile=on", "p_dropout=0.1", f"parallel.strategy={strategy}"]
    whole = [*common, f"output_dir={tmp_path / 'a'}"]
    assert subprocess.run(command("train", whole, ranks), cwd=tmp_path, env=environment(), check=False).returncode == 0
    broken = [*common, f"output_dir={tmp_path / 'run'}"]
    killed = Started(tmp_path, ranks, *broken[1:])
    killed.wait_for_steps(25)
    killed.end()
    assert not (tmp_path / "run" / "eval.json").exists()
    done = subprocess.run(
        command("train", broken, ranks), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout and "going on after step" in done.stdout
    assert training_curve(tmp_path / "a") == training_curve(tmp_path / "run")
    assert hashes(tmp_path / "a", 120) == hashes(tmp_path / "run", 120)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_other_numbers_of_ranks_and_strategies_continue_the_same_run(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    assert (
        run("train", config_file, *PLAIN, "num_training_steps=16", f"output_dir={tmp_path / 'whole'}").returncode == 0
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
        assert (f"going on after step {steps - 4}" in done.stdout) == (steps > 4)
        for step, path in list(checkpoint.on_disk(tmp_path / "run")):
            if step > steps:
                durable.remove(path)
    whole = training_curve(tmp_path / "whole")
    np.testing.assert_allclose(np.array(training_curve(tmp_path / "run")), np.array(whole), atol=1e-4)


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
    assert configs.load(run_dir / "config.yaml").model_config.n_embd == 32


def test_a_finished_run_shows_its_results_and_changes_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    before = contents(tmp_path)
    capsys.readouterr()
    start(config_file)
    assert f'"val-loss": {json.loads(before["run/eval.json"])["val-loss"]}' in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_more_steps_go_on_and_say_so(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(config_file)
    capsys.readouterr()
    start(config_file, "num_training_steps=16")
    printed = capsys.readouterr().out
    assert "going on after step 12" in printed and "num_training_steps is now 16 (was 12)" in printed
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 17))


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
def test_another_run_in_the_same_folder_is_refused(
    config_file: Path, tmp_path: Path, override: str, expected: str
) -> None:
    start(config_file)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        start(config_file, override)
    assert contents(tmp_path) == before


def test_other_data_is_refused(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    np.savez(tmp_path / "other.npz", train=np.arange(5000) % 200, val=np.arange(50))
    with pytest.raises(DataError, match=r"other\.npz: got tokens"):
        start(config_file, f"data={tmp_path / 'other.npz'}")


def test_what_moves_no_result_may_change(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    start(config_file, "num_training_steps=14", "batch_size=4", "global_batch_size=8", "log_every=2", "eval.every=3")
    assert [step for step, _, _ in training_curve(tmp_path / "run")][-2:] == [12, 14]


def test_another_run_begins_with_a_finished_runs_weights(
    config_file: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    finished = tmp_path / "run"
    val_loss = json.loads((finished / "eval.json").read_text())["val-loss"]
    capsys.readouterr()
    arguments = ["num_training_steps=1", "num_warmup_steps=1", "seed=5", "--from", str(finished)]  # the rate is 0
    start(config_file, f"output_dir={tmp_path / 'tuned'}", *arguments)
    assert f"from    {finished}: beginning with its weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned" / "eval.json").read_text())["val-loss"] == val_loss
    sharded = (f"output_dir={tmp_path / 'sharded'}", "parallel.strategy=fsdp", *arguments)
    assert run("train", config_file, *PLAIN, *sharded, ranks=3).returncode == 0
    assert (tmp_path / "sharded" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model_config\.n_embd: got 64, but .*run has 32; use its"):
        start(config_file, f"output_dir={tmp_path / 'other'}", "model_config.n_embd=64", *arguments)
    with pytest.raises(CheckpointError, match="holds no trained model"):
        start(config_file, f"output_dir={tmp_path / 'other'}", "--from", str(tmp_path))
    start(
        config_file, f"output_dir={tmp_path / 'tuned'}", *arguments[1:], "num_training_steps=3"
    )  # goes on from its own
    assert [step for step, _, _ in training_curve(tmp_path / "tuned")] == [1, 2, 3]


@pytest.mark.slow
def test_another_run_begins_with_a_checkpoints_weights_which_also_score_and_write(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    """The checkpoint is saved on 3 ranks, sharded, by a run that goes on."""
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


def test_fresh_starts_over_and_touches_only_its_own(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    curve = training_curve(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    start(config_file, "--fresh", "seed=1")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert len(training_curve(tmp_path / "run")) == len(curve) and training_curve(tmp_path / "run") != curve


def test_evaluating_saving_and_logging_change_no_weight(config_file: Path, tmp_path: Path) -> None:
    start(config_file, f"output_dir={tmp_path / 'often'}", "p_dropout=0.2", "eval.every=1", "checkpoint.every=1")
    start(config_file, f"output_dir={tmp_path / 'never'}", "p_dropout=0.2", "eval.every=99", "log_every=99")
    assert hashes(tmp_path / "often", 12) == hashes(tmp_path / "never", 12)


def test_a_damaged_checkpoint_is_passed_over(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file)
    curve = training_curve(tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints" / "step-00000012").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    start(config_file)
    printed = capsys.readouterr().out
    assert "going on after step 8" in printed and f"passing over {shard}: damaged" in printed
    assert training_curve(tmp_path / "run") == curve


def test_nothing_is_started_over_when_no_checkpoint_is_sound(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    for _, path in checkpoint.on_disk(tmp_path / "run"):
        (path / "manifest.json").write_text("{")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        start(config_file)
    assert contents(tmp_path) == before


def test_gradients_that_are_no_numbers_end_the_run_and_spoil_nothing(config_file: Path, tmp_path: Path) -> None:
    # Decay of lr x 10 = 100 a step multiplies the weights by -99 until they overflow.
    message = r"step \d+: its gradient was not finite, nor any to step \d+ .*; it read sequences \d+, "
    with pytest.raises(NumericsError, match=message) as raised:
        start(config_file, "max_lr=10", "optimizer.weight_decay=10", "num_training_steps=400", "checkpoint.every=1")
    first = int(str(raised.value).split(":")[0].removeprefix("step "))
    rows = [row for row in read_metrics(tmp_path / "run") if "skipped" in row]
    assert [row["skipped"] for row in rows[-9:]] == list(range(1, 10)) and rows[-9]["step"] == first
    newest, rejected = checkpoint.newest(tmp_path / "run")
    assert newest is not None and not rejected
    weights = next(newest.path.glob("*.safetensors"))
    assert all(np.isfinite(tensor.numpy()).all() for tensor in load_file(weights).values())


def test_a_run_that_cannot_write_is_refused_before_it_begins(config_file: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    done = run("train", config_file, f"output_dir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 6
    assert done.stderr.startswith("distgpt: error: output_dir: ") and done.stderr.count("\n") == 1


def test_missing_data_ends_with_exit_code_3(config_file: Path, run: Run, tmp_path: Path) -> None:
    done = run("train", config_file, "data=nowhere.npz")
    assert done.returncode == 3
    assert done.stderr.startswith("distgpt: error: nowhere.npz: cannot read") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_under_torchrun_one_rank_speaks(config_file: Path, run: Run, tmp_path: Path) -> None:
    done = run("train", config_file, "data=nowhere.npz", ranks=2)
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("distgpt: error: nowhere.npz: cannot read") == 1
    assert (
        'Traceback (most recent call last):\n  File "<frozen runpy>"' not in done.stderr.split("torch/distributed")[0]
    )


def test_a_reader_that_leaves_does_not_stop_the_run(config_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train", [config_file]), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.slow
def test_no_run_crashes_on_its_way_out(config_file: Path, run: Run) -> None:
    for attempt in range(20):
        done = run("train", config_file, "num_training_steps=2", "num_warmup_steps=0", "--fresh", ranks=3)
        assert done.returncode == 0, f"run {attempt}: {done.stderr[-2000:]}"


def test_a_folder_of_somebody_else_keeps_its_files(config_file: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "run"
    for name in ("tokenizer/precious", "checkpoints/mine/weights", "notes"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("theirs")
    start(config_file, "--fresh")
    for name in ("tokenizer/precious", "checkpoints/mine/weights", "notes"):
        assert (theirs / name).read_text() == "theirs"


def test_a_stray_folder_named_like_a_later_checkpoint_costs_no_sound_one(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    (tmp_path / "run" / "checkpoints" / "step-99999999").mkdir()
    start(config_file, "num_training_steps=16", "checkpoint.keep=2")
    newest, rejected = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.step == 16 and not rejected


def test_a_run_without_a_reader_from_the_start_trains_all_the_same(config_file: Path, tmp_path: Path) -> None:
    for redirection in (">/dev/full", ">&-"):
        line = " ".join(command("train", [config_file, "--fresh"])) + f" {redirection}"
        assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment(), check=False).returncode == 0
        assert (tmp_path / "run" / "eval.json").exists()


def test_a_lost_or_damaged_result_is_made_again(config_file: Path, tmp_path: Path) -> None:
    start(config_file)
    results = (tmp_path / "run" / "eval.json").read_text()
    (tmp_path / "run" / "eval.json").write_text("{g")
    start(config_file)
    assert (tmp_path / "run" / "eval.json").read_text() == results
    (tmp_path / "run" / "model.safetensors").unlink()
    start(config_file)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_memory_that_is_not_there_costs_no_earlier_run(config_file: Path, tmp_path: Path) -> None:
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
    for record in ("run/status.json", "run/.lock"):  # whose the folder is, and how far the last run came
        before.pop(record), after.pop(record, None)
    assert after == before
