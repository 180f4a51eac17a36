"""What a resume may change: keys that affect no result, and the length of the run where its learning rate agrees."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from distgpt.checkpoint.store import Checkpoint
from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.data.dataset import open_dataset
from distgpt.data.sampler import ORDER_VERSION
from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import ConfigError
from distgpt.resilience.preflight import RunInputs, changed_keys, run_preflight


def saved_at(step: int, config: Config, *lacking: str) -> Checkpoint:
    """A checkpoint as a run of this config would leave it, without the keys that its version did not have."""
    tokenizer = load_tokenizer(config.tokenizer_encoding)
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in lacking}
    run = {
        "config": values,
        "order_version": ORDER_VERSION,
        "sequences_per_step": config.sequences_per_step,
        "tokens": open_dataset(config, tokenizer).fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    return Checkpoint(Path(config.output_dir) / "checkpoints" / f"step-{step:08d}", step, {"run": run})


def resume(config_file: Path, step: int, before: tuple[str, ...], now: tuple[str, ...]) -> RunInputs:
    """Resume at `step`, with other overrides, a run that was started with the overrides `before`."""
    checkpoint = saved_at(step, load_config(config_file, before))
    return run_preflight(load_config(config_file, now), False, found=(checkpoint, []))


@pytest.mark.parametrize(
    ("before", "now", "step", "message"),
    [
        (
            ("num_training_steps=2000",),
            ("num_training_steps=4000",),
            2000,
            "num_training_steps: got 4000, but the run in {run} was started with 2000: its learning rate after step "
            "2,000 would jump from 1.0e-04 to 5.5e-04; set lr_decay_steps=2000 to keep the schedule it had, "
            "choose another output_dir, or start over with --fresh",
        ),
        (
            ("num_training_steps=2000",),
            ("num_training_steps=2000", "lr_decay_steps=1000"),
            1500,
            "lr_decay_steps: got 1000, but the run in {run} was started with 2000: ",
        ),
        (
            ("num_training_steps=2000", "lr_decay_steps=1000"),
            ("num_training_steps=2000",),
            900,
            "lr_decay_steps: got 2000, but the run in {run} was started with 1000: ",
        ),
        (
            ("num_training_steps=100", "lr_schedule=wsd"),
            ("num_training_steps=100", "lr_schedule=wsd", "lr_decay_fraction=0.5"),
            60,
            "lr_decay_fraction: got 0.5, but the run in {run} was started with 0.2: its learning rate after step 60 "
            "would jump from 1.0e-03 to 8.2e-04; set lr_decay_fraction=0.2 to keep the schedule it had, ",
        ),
        (
            ("num_training_steps=100", "lr_schedule=wsd"),
            ("num_training_steps=110", "lr_schedule=wsd", "lr_decay_fraction=0.5"),
            90,
            "set lr_decay_steps=100 lr_decay_fraction=0.2 to keep the schedule it had, ",
        ),
        (  # early in a cosine the difference is small, but the schedule is another one
            ("num_training_steps=1000000",),
            ("num_training_steps=1000001",),
            10,
            "its learning rate after step 10 would jump from 0.000999999",
        ),
    ],
)
def test_a_jump_of_the_learning_rate_is_refused_with_both_values_and_the_key(
    config_file: Path, tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...], step: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.format(run=tmp_path / "run"))) as raised:
        resume(config_file, step, before, now)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        (("num_training_steps=20",), ("num_training_steps=40", "lr_decay_steps=20"), 20),
        (("num_training_steps=20", "lr_decay_steps=10"), ("num_training_steps=40", "lr_decay_steps=10"), 20),
        (("lr_schedule=constant", "num_training_steps=20"), ("lr_schedule=constant", "num_training_steps=40"), 15),
        (("lr_schedule=wsd", "num_training_steps=20"), ("lr_schedule=wsd", "num_training_steps=40"), 10),
        (("num_training_steps=20",), ("num_training_steps=40",), 1),  # in the warm-up
        (("num_training_steps=40",), ("num_training_steps=20",), 20),  # no update follows
    ],
)
def test_a_run_is_extended_where_its_learning_rate_stays_the_same(
    config_file: Path, before: tuple[str, ...], now: tuple[str, ...], step: int
) -> None:
    inputs = resume(config_file, step, before, now)
    assert inputs.resume is not None
    new, old = now[-1].partition("=")[2], before[-1].partition("=")[2]
    assert new == old or any(f" is now {new} (was " in note for note in inputs.notes), inputs.notes


@pytest.mark.parametrize(("num_training_steps", "is_refused"), [(20, False), (40, True)], ids=["same length", "longer"])
def test_a_checkpoint_without_schedule_keys_counts_as_decaying_until_its_last_step(
    config_file: Path, num_training_steps: int, is_refused: bool
) -> None:
    old = load_config(config_file, ["num_training_steps=20"])
    checkpoint = saved_at(15, old, "lr_schedule", "lr_decay_steps", "lr_decay_fraction", "tensorboard")
    assert changed_keys(old, checkpoint) == {}
    new = load_config(config_file, [f"num_training_steps={num_training_steps}"])
    if is_refused:
        with pytest.raises(ConfigError, match=r"set lr_decay_steps=20 to keep the schedule it had"):
            run_preflight(new, False, found=(checkpoint, []))
    else:
        run_preflight(new, False, found=(checkpoint, []))


def test_changes_that_affect_results_are_refused_one_line_each(config_file: Path) -> None:
    now = ("seed=1", "p_dropout=0.1", "model_config.n_layer=3", "batch_size=4", "log_every=2")
    with pytest.raises(ConfigError) as raised:
        resume(config_file, 4, (), now)
    keys = [line.partition(":")[0] for line in str(raised.value).split("\n")]
    assert sorted(keys) == ["global_batch_size", "model_config.n_layer", "p_dropout", "seed"]
    assert "p_dropout: got 0.1, but the run in " in str(raised.value)


def test_changes_that_affect_no_result_are_noted_by_dotted_key(config_file: Path) -> None:
    now = ("batch_size=4", "grad_accumulation_steps=2", "parallel.grad_sync=each", "eval.every=7")
    config = load_config(config_file, now)
    checkpoint = saved_at(4, load_config(config_file))
    assert changed_keys(config, checkpoint) == {
        "batch_size": (4, 8),
        "grad_accumulation_steps": (2, 1),
        "parallel.grad_sync": ("each", "auto"),
        "eval.every": (7, 5),
    }
    notes = run_preflight(config, False, found=(checkpoint, [])).notes
    assert "eval.every is now 7 (was 5)" in notes and "parallel.grad_sync is now each (was auto)" in notes


def test_fewer_steps_than_were_made_are_refused(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^num_training_steps: got 9, but the run in \S+ has made 12 steps; resume"):
        resume(config_file, 12, (), ("num_training_steps=9",))
