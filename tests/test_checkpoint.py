"""A checkpoint is complete or refused. Nothing damaged, misnamed or hostile is ever loaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt import atomic_io, train
from distgpt.checkpoint import saver, store, weights
from distgpt.checkpoint.store import latest_valid, verify
from distgpt.config.loader import load_config
from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import CheckpointError, ConfigError, DataError
from distgpt.models.gpt2 import DecoderLM
from tests.conftest import REPO, training_curve
from tests.test_saver import SINGLE_PROCESS, make_state


@pytest.fixture
def output_dir(config_file: Path, tmp_path: Path) -> Path:
    """A finished run with checkpoints at steps 8 and 12."""
    train.main([str(config_file), "precision=fp32", "compile=off"])
    return tmp_path / "run"


@pytest.fixture
def checkpoint_dir(output_dir: Path) -> Path:
    """The newest checkpoint of that run."""
    return output_dir / "checkpoints" / "step-00000012"


def test_every_flipped_or_missing_byte_is_detected(checkpoint_dir: Path) -> None:
    verify(checkpoint_dir)
    for path in sorted(checkpoint_dir.iterdir()):
        raw = path.read_bytes()
        for position in {0, 1, len(raw) // 3, len(raw) // 2, len(raw) - 2, len(raw) - 1}:
            damaged = bytearray(raw)
            damaged[position] ^= 0x10
            for content in (bytes(damaged), raw[:position]):
                path.write_bytes(content)
                with pytest.raises(CheckpointError, match=path.parent.name):
                    verify(checkpoint_dir)
        path.write_bytes(raw)
    verify(checkpoint_dir)


def test_file_missing_from_the_manifest_is_refused(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.safetensors: damaged"):
        verify(checkpoint_dir)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "files": {}}',
        '{"format": 2, "files": {}}',
        '{"format": 3, "files": {}}',
        '{"format": "2", "files": {}}',
        '{"format": 2, "files": 3}',
    ],
)
def test_invalid_manifest_is_refused(checkpoint_dir: Path, manifest: str) -> None:
    (checkpoint_dir / store.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError):
        verify(checkpoint_dir)


def test_misnamed_folders_are_not_checkpoints(output_dir: Path) -> None:
    folder = output_dir / "checkpoints"
    for name in ("step-99", "step-00000099.bak", ".step-00000099.partial", "step-xxxxxxxx", "latest"):
        (folder / name).mkdir()
    (folder / "step-00000098").write_text("a file")
    latest, skipped = latest_valid(output_dir)
    assert latest is not None and latest.step == 12
    assert len(skipped) == 1 and "step-00000098" in skipped[0]


def test_latest_valid_checkpoint_is_chosen_and_damaged_ones_are_named(output_dir: Path, checkpoint_dir: Path) -> None:
    (checkpoint_dir / store.STATE).write_text("{}")
    latest, skipped = latest_valid(output_dir)
    assert latest is not None and latest.step == 8
    assert len(skipped) == 1 and "state.json: damaged" in skipped[0]


def test_pruning_keeps_the_newest_valid_checkpoints(output_dir: Path) -> None:
    folder = output_dir / "checkpoints"
    (folder / "step-00000004").mkdir()
    (folder / "step-00000099").mkdir()  # skipped as damaged when the run resumed from step 12
    (folder / ".step-00000050.partial").mkdir()
    store.prune(output_dir, 12, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


def test_pickles_are_never_executed(output_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.mkdir, (canary,)

    malicious = pickle.dumps(Payload())
    (output_dir / weights.WEIGHTS_FILE).write_bytes(malicious)
    with pytest.raises(CheckpointError, match="does not load"):
        weights.load_model(output_dir)
    for path in (output_dir / "checkpoints").rglob("*.*"):
        if path.is_file():
            path.write_bytes(malicious)
    (output_dir / "checkpoints" / "step-00000012" / ".metadata").write_bytes(malicious)
    assert latest_valid(output_dir)[0] is None
    assert not canary.exists()


def test_trained_model_is_saved_without_vocabulary_padding_and_loads(output_dir: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(output_dir / weights.WEIGHTS_FILE)
    assert saved["token_embedding.weight"].shape == (257, 32)
    assert all("module" not in name and "_orig" not in name for name in saved)
    model, tokenizer, config = weights.load_model(output_dir)
    assert tokenizer.n_vocab == 257 and config.seq_len == 32
    for name, tensor in model.remove_vocab_padding(model.state_dict()).items():
        assert torch.equal(tensor, saved[name])
    assert (model.token_embedding.weight[257:] == 0).all()


def test_weights_of_other_shapes_are_refused_by_name(output_dir: Path) -> None:
    other = DecoderLM(257, 16, 4, 32, 2)
    message = r"blocks\.0\.attention\.out\.bias: \(32, 'F32'\), expected \(16, 'F32'\)"
    with pytest.raises(CheckpointError, match=message):
        next(weights.iter_weights(output_dir, other))


def test_error_for_a_folder_without_a_model_says_what_it_holds(output_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trained model"):
        weights.load_model(tmp_path)
    (output_dir / weights.WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"unfinished run.*step-00000012"):
        weights.load_model(output_dir)


def test_trained_model_without_checkpoints_is_not_overwritten(config_file: Path, output_dir: Path) -> None:
    atomic_io.remove_dir(output_dir / "checkpoints")
    before = (output_dir / weights.WEIGHTS_FILE).read_bytes()
    with pytest.raises(ConfigError, match="has a trained model but no checkpoint"):
        train.main([str(config_file)])
    assert (output_dir / weights.WEIGHTS_FILE).read_bytes() == before


def test_different_tokens_under_the_same_name_are_refused(config_file: Path, output_dir: Path) -> None:
    own = config_file.with_name("own.npz")
    np.savez(own, train=np.arange(9000) % 99, val=np.arange(99))
    with pytest.raises(DataError, match=r"own\.npz: got tokens .* but the run in"):
        train.main([str(config_file), f"data={own}", "num_training_steps=20", "lr_decay_steps=12"])


def test_weights_with_nan_are_refused(output_dir: Path) -> None:
    raw = bytearray((output_dir / weights.WEIGHTS_FILE).read_bytes())
    raw[-4000:] = b"\xff" * 4000
    (output_dir / weights.WEIGHTS_FILE).write_bytes(raw)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        weights.load_model(output_dir)


def test_newer_format_is_refused_with_both_versions_named(output_dir: Path, checkpoint_dir: Path) -> None:
    manifest = checkpoint_dir / store.MANIFEST
    value = json.loads(manifest.read_text()) | {"format": store.FORMAT + 1}
    manifest.write_text(store.to_json(value))
    expected = f"format {store.FORMAT + 1}, expected {store.FORMAT} or older; use the version of distgpt that wrote it"
    with pytest.raises(CheckpointError, match=re.escape(f"{checkpoint_dir}: {expected}")):
        verify(checkpoint_dir)
    latest, skipped = latest_valid(output_dir)
    assert latest is not None and latest.step == 8 and expected in skipped[0]


FIXTURES = REPO / "tests" / "fixtures"
"""tokens.npz and `checkpoint-format-1`: a run of 4 steps on them, saved by the first distgpt that had a format."""

FORMAT_1_CONFIG = """
output_dir: run
tokenizer_encoding: bytes
model_config: {n_embd: 8, n_head: 2, n_positions: 8, n_layer: 1}
data: tokens.npz
device: cpu
precision: fp32
compile: off
global_batch_size: 4
batch_size: 2
seq_len: 8
num_warmup_steps: 1
num_training_steps: 6
min_lr: 0.1
max_lr: 0.1
log_every: 1
wandb: disabled
"""


@pytest.fixture
def format_1_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with that checkpoint, in a working directory in which its run can be resumed."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "tokens.npz", tmp_path)
    (tmp_path / "old.yaml").write_text(FORMAT_1_CONFIG)
    shutil.copytree(FIXTURES / "checkpoint-format-1", tmp_path / "run" / "checkpoints" / "step-00000004")
    return tmp_path / "run"


def test_tensors_of_a_format_1_checkpoint_are_restored_exactly(format_1_run: Path) -> None:
    checkpoint, skipped = latest_valid(format_1_run)
    assert checkpoint is not None and checkpoint.step == 4 and not skipped
    config = load_config(format_1_run.with_name("old.yaml"))
    model = weights.build_model(config, load_tokenizer("bytes")).to_empty(device="cpu")
    state = make_state(model, config.optimizer.build(model))
    saver.restore(checkpoint, state, SINGLE_PROCESS)
    tensors, _ = saver.split_state(state.state_dict())
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert hashes == json.loads((FIXTURES / "checkpoint-format-1.json").read_text())


def test_state_of_a_format_1_checkpoint_is_converted() -> None:
    old = json.loads((FIXTURES / "checkpoint-format-1" / store.STATE).read_text())
    state = verify(FIXTURES / "checkpoint-format-1")
    assert state.keys() == {"run", "progress"}
    assert state["progress"] == {"skipped": [0.0, 0.0], "val_loss": None}
    runtime = state["run"].pop("runtime")
    assert runtime.pop("layout") == {
        "strategy": "none",
        "world_size": 1,
        "shard_size": 1,
        "reshard_after_forward": True,
        "sync_each_micro_step": False,
        "activation_checkpointing": "none",
    }
    assert runtime == {"precision": "fp32", "compile": False, "device": "cpu"}
    assert state["run"].pop("run_id") == old.pop("wandb_run_id")
    assert state["run"] == {key: value for key, value in old.items() if key not in ("execution", "skipped", "val_loss")}


def test_flipped_format_number_is_detected(checkpoint_dir: Path, tmp_path: Path) -> None:
    """The manifest has no hash of its own, and another known format would be read differently."""
    format_1_dir = tmp_path / "step-00000004"
    shutil.copytree(FIXTURES / "checkpoint-format-1", format_1_dir)
    for path, actual, flipped in ((checkpoint_dir, 2, 1), (format_1_dir, 1, 2)):
        manifest = path / store.MANIFEST
        manifest.write_text(manifest.read_text().replace(f'"format": {actual}', f'"format": {flipped}'))
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
            verify(path)


def test_run_resumes_from_a_format_1_checkpoint(format_1_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([str(format_1_run.with_name("old.yaml"))])
    assert "step 4" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resume"))
    assert [step for step, _, _ in training_curve(format_1_run)] == [5, 6]
