"""A checkpoint is whole or refused; what is damaged, strange or hostile is never loaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from distgpt import checkpoint, durable, saver, train, trained
from distgpt import config as configs
from distgpt.checkpoint import newest, verify
from distgpt.errors import CheckpointError, DataError
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer
from distgpt.tokenizer import load_tokenizer
from tests.conftest import REPO, training_curve
from tests.test_exercise import ALONE


@pytest.fixture
def output_dir(config_file: Path, tmp_path: Path) -> Path:
    """A finished run with checkpoints at steps 8 and 12."""
    train.main([str(config_file), "precision=fp32", "compile=off"])
    return tmp_path / "run"


@pytest.fixture
def whole(output_dir: Path) -> Path:
    """Its newest checkpoint."""
    return output_dir / "checkpoints" / "step-00000012"


def test_every_flipped_or_missing_byte_is_found(whole: Path) -> None:
    verify(whole)
    for path in sorted(whole.iterdir()):
        raw = path.read_bytes()
        for where in {0, 1, len(raw) // 3, len(raw) // 2, len(raw) - 2, len(raw) - 1}:
            damaged = bytearray(raw)
            damaged[where] ^= 0x10
            for content in (bytes(damaged), raw[:where]):
                path.write_bytes(content)
                with pytest.raises(CheckpointError, match=path.parent.name):
                    verify(whole)
        path.write_bytes(raw)
    verify(whole)


def test_a_file_that_is_not_in_the_manifest_is_refused(whole: Path) -> None:
    (whole / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.safetensors: damaged"):
        verify(whole)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "files": {}}',
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": 3}',
    ],
)
def test_a_manifest_that_is_none_is_refused(whole: Path, manifest: str) -> None:
    (whole / checkpoint.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError):
        verify(whole)


def test_strange_names_are_no_checkpoints(output_dir: Path) -> None:
    folder = output_dir / "checkpoints"
    for name in ("step-99", "step-00000099.bak", ".step-00000099.partial", "step-xxxxxxxx", "latest"):
        (folder / name).mkdir()
    (folder / "step-00000098").write_text("a file")
    found, rejected = newest(output_dir)
    assert found is not None and found.step == 12
    assert len(rejected) == 1 and "step-00000098" in rejected[0]


def test_the_newest_sound_one_is_chosen_and_others_named(output_dir: Path, whole: Path) -> None:
    (whole / checkpoint.STATE).write_text("{}")
    found, rejected = newest(output_dir)
    assert found is not None and found.step == 8
    assert len(rejected) == 1 and "state.json: damaged" in rejected[0]


def test_pruning_keeps_the_newest_sound_ones(output_dir: Path) -> None:
    folder = output_dir / "checkpoints"
    (folder / "step-00000004").mkdir()
    (folder / "step-00000099").mkdir()  # passed over as damaged when the run went on from 12
    (folder / ".step-00000050.partial").mkdir()
    checkpoint.prune(output_dir, 12, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


def test_no_pickle_is_ever_run(output_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.mkdir, (canary,)

    evil = pickle.dumps(Payload())
    (output_dir / trained.WEIGHTS).write_bytes(evil)
    with pytest.raises(CheckpointError, match="does not load"):
        trained.load(output_dir)
    for path in (output_dir / "checkpoints").rglob("*.*"):
        if path.is_file():
            path.write_bytes(evil)
    (output_dir / "checkpoints" / "step-00000012" / ".metadata").write_bytes(evil)
    assert newest(output_dir)[0] is None
    assert not canary.exists()


def test_a_trained_model_comes_back_without_its_padding(output_dir: Path) -> None:
    from safetensors.torch import load_file

    raw = load_file(output_dir / trained.WEIGHTS)
    assert raw["token_embedding.weight"].shape == (257, 32)
    assert all("module" not in name and "_orig" not in name for name in raw)
    model, tokenizer, config = trained.load(output_dir)
    assert tokenizer.n_vocab == 257 and config.seq_len == 32
    for name, tensor in model.without_padding(model.state_dict()).items():
        assert torch.equal(tensor, raw[name])
    assert (model.token_embedding.weight[257:] == 0).all()


def test_weights_of_another_shape_are_refused_by_name(output_dir: Path) -> None:
    other = DecoderLM(257, 16, 4, 32, 2)
    message = r"blocks\.0\.attention\.out\.bias: \(32, 'F32'\), expected \(16, 'F32'\)"
    with pytest.raises(CheckpointError, match=message):
        next(trained.weights(output_dir, other))


def test_a_folder_that_holds_no_model_says_what_it_holds(output_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trained model"):
        trained.load(tmp_path)
    (output_dir / trained.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="unfinished run"):
        trained.load(output_dir)


def test_a_model_without_checkpoints_is_not_overwritten(config_file: Path, output_dir: Path) -> None:
    from distgpt.errors import ConfigError

    durable.remove(output_dir / "checkpoints")
    before = (output_dir / trained.WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="holds a trained model and no checkpoint"):
        train.main([str(config_file)])
    assert (output_dir / trained.WEIGHTS).read_bytes() == before


def test_tokens_changed_under_the_same_name_are_found(config_file: Path, output_dir: Path, corpus: Path) -> None:
    import numpy as np

    own = config_file.with_name("own.npz")
    np.savez(own, train=np.arange(9000) % 99, val=np.arange(99))
    with pytest.raises(DataError, match=r"own\.npz: got tokens .* but the run in"):
        train.main([str(config_file), f"data={own}", "num_training_steps=20"])


def test_weights_that_are_no_numbers_are_refused(output_dir: Path) -> None:
    raw = bytearray((output_dir / trained.WEIGHTS).read_bytes())
    raw[-4000:] = b"\xff" * 4000
    (output_dir / trained.WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        trained.load(output_dir)


def test_a_newer_format_is_refused_with_both_versions_named(output_dir: Path, whole: Path) -> None:
    manifest = whole / checkpoint.MANIFEST
    value = json.loads(manifest.read_text()) | {"format": checkpoint.FORMAT + 1}
    manifest.write_text(checkpoint.to_json(value))
    expected = f"format {checkpoint.FORMAT + 1}, expected {checkpoint.FORMAT}; use the distgpt that wrote it"
    with pytest.raises(CheckpointError, match=re.escape(f"{whole}: {expected}")):
        verify(whole)
    found, rejected = newest(output_dir)
    assert found is not None and found.step == 8 and expected in rejected[0]


OLD = REPO / "tests" / "fixtures"
"""A run of 4 steps on tokens.npz, as `checkpoint-format-1` was written by the first distgpt that had a format."""

OLD_CONFIG = """
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
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder, relative to which that run would go on, that holds a copy of its checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(OLD / "tokens.npz", tmp_path)
    (tmp_path / "old.yaml").write_text(OLD_CONFIG)
    shutil.copytree(OLD / "checkpoint-format-1", tmp_path / "run" / "checkpoints" / "step-00000004")
    return tmp_path / "run"


def test_a_checkpoint_of_format_1_gives_the_tensors_that_were_saved(old: Path) -> None:
    found, rejected = newest(old)
    assert found is not None and found.step == 4 and not rejected
    config = configs.load(old.with_name("old.yaml"))
    model = trained.build_model(config, load_tokenizer("bytes")).to_empty(device="cpu")
    optimizer = build_optimizer(model, config.optimizer)
    saver.restore(found, model, optimizer, ALONE)
    got = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in saver.tensors_of(model, optimizer).items()
    }
    assert got == json.loads((OLD / "checkpoint-format-1.json").read_text())


def test_a_run_goes_on_from_a_checkpoint_of_format_1(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([str(old.with_name("old.yaml"))])
    assert "going on after step 4" in capsys.readouterr().out
    assert [step for step, _, _ in training_curve(old)] == [5, 6]
