"""Everything that can be checked before torch is imported: config, tokenizer, tokens, output folder, resume."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt.checkpoint import store
from distgpt.checkpoint.store import Checkpoint
from distgpt.checkpoint.weights import WEIGHTS_FILE, read_run
from distgpt.config.loader import config_from_dict
from distgpt.config.schema import Config, flatten, mutable_keys
from distgpt.data.dataset import Dataset, open_dataset
from distgpt.data.sampler import ORDER_VERSION
from distgpt.data.tokenizer import Tokenizer, load_tokenizer
from distgpt.errors import CheckpointError, ConfigError, DataError, RuntimeEnvironmentError
from distgpt.optim.schedules import learning_rate

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""The weight and two moments, in fp32."""


@dataclass(frozen=True)
class RunInputs:
    """What a run starts with."""

    tokenizer: Tokenizer
    dataset: Dataset
    resume: Checkpoint | None
    """The checkpoint to resume from."""
    results: dict[str, Any] | None
    """The content of eval.json, if the run is already finished."""
    source: Path | None
    """Folder of the finished run or checkpoint whose weights a new run starts with."""
    notes: list[str]
    """What the user should know before the run starts, one line each."""


def find_latest_checkpoint(config: Config, fresh: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from (None if `fresh`), and one message for each newer one that is damaged."""
    return (None, []) if fresh else store.latest_valid(Path(config.output_dir))


def run_preflight(
    config: Config,
    fresh: bool,
    source: Path | None = None,
    found: tuple[Checkpoint | None, list[str]] | None = None,
) -> RunInputs:
    """Check everything that a run needs, and find where it starts. `fresh` ignores what is in the output folder.

    A run that has a checkpoint resumes from it; only a new run starts with the weights of `source`. `found` is the
    result of `find_latest_checkpoint`, which hashes files, if the caller has it already.

    Raises a UserError. Writes nothing except the sample corpus or an unpacked .npz, where they are needed.
    """
    output_dir = Path(config.output_dir)
    _check_output_dir(output_dir)
    tokenizer = load_tokenizer(config.tokenizer_encoding)
    resume, skipped = find_latest_checkpoint(config, fresh) if found is None else found
    if resume is None and skipped:
        raise CheckpointError(
            "\n".join(skipped) + f"\n{output_dir}: no checkpoint is valid; restore one, or start over with --fresh"
        )
    if resume is None and not fresh and any((output_dir / name).exists() for name in (WEIGHTS_FILE, "eval.json")):
        raise ConfigError(
            f"output_dir: {output_dir} has a trained model but no checkpoint to resume from; "
            "choose another output_dir, or start over with --fresh, which deletes that model"
        )
    dataset = open_dataset(config, tokenizer)
    notes = skipped + ([dataset.note] if dataset.note else []) + _check_disk_space(config, tokenizer)
    notes += [
        f"{name}.every is {every}, more than the {config.num_training_steps} steps of the run: only at its end"
        for name, every in (("eval", config.eval.every), ("checkpoint", config.checkpoint.every))
        if every > config.num_training_steps
    ]
    if resume is None:
        if source is not None:
            _check_source(source, config, tokenizer)
        return RunInputs(tokenizer, dataset, None, None, source, notes)
    _refuse_changes(config, tokenizer, dataset, resume)
    changes = changed_keys(config, resume)
    notes += [f"{key} is now {new} (was {old})" for key, (new, old) in changes.items() if key != "output_dir"]
    return RunInputs(tokenizer, dataset, resume, _finished_results(output_dir, resume.step, config), None, notes)


def changed_keys(config: Config, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """(new value, old value) by dotted key, for every key that differs from the run that wrote the checkpoint."""
    new, old = flatten(config), flatten(_saved_config(checkpoint))
    return {key: (new.get(key), old.get(key)) for key in new | old if new.get(key) != old.get(key)}


def _saved_config(checkpoint: Checkpoint) -> Config:
    """The config that the checkpoint was saved with."""
    return config_from_dict(checkpoint.state["run"]["config"])


def _check_source(source: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError unless `source` has a model of the same shape, ConfigError if its tokenizer differs."""
    source_config, source_tokenizer = read_run(source)
    if source_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer_encoding: got the tokenizer {tokenizer.fingerprint}, but {source} was trained with "
            f"{source_tokenizer.fingerprint}; use its encoding"
        )
    new, old = dataclasses.asdict(config.model_config), dataclasses.asdict(source_config.model_config)
    different = [key for key in new | old if new.get(key) != old.get(key)]
    if different:
        raise CheckpointError(
            "\n".join(
                f"model_config.{key}: got {new.get(key)}, but {source} has {old.get(key)}; use the same"
                for key in different
            )
        )


def _check_output_dir(output_dir: Path) -> None:
    """Raise RuntimeEnvironmentError if the output folder cannot be written to."""
    existing = output_dir
    try:
        existing = _nearest_existing(output_dir)
        if not existing.is_dir():
            kind = "a broken link" if existing.is_symlink() else "a file"
            raise RuntimeEnvironmentError(
                f"output_dir: {existing} is {kind}, expected a folder; choose another output_dir"
            )
        tempfile.TemporaryFile(dir=existing).close()
    except (OSError, RecursionError) as error:
        reason = getattr(error, "strerror", "too many folders")
        raise RuntimeEnvironmentError(
            f"output_dir: cannot write to {str(existing)[:200]}: {reason}; choose another output_dir"
        ) from None


def _nearest_existing(path: Path) -> Path:
    """The path itself or, if it does not exist, its nearest parent that does."""
    return next(part for part in (path, *path.absolute().parents) if part.exists() or part.is_symlink())


def _check_disk_space(config: Config, tokenizer: Tokenizer) -> list[str]:
    """A note if the disk has no space for all checkpoints; RuntimeEnvironmentError if it has none for one."""
    checkpoint_bytes = CHECKPOINT_BYTES_PER_PARAMETER * config.model_config.num_parameters(tokenizer.n_vocab)
    max_checkpoints = config.checkpoint.keep + 2  # the best one, and the one being written
    folder = _nearest_existing(Path(config.output_dir))
    free_bytes = shutil.disk_usage(folder).free
    free = f"{folder} has {free_bytes / 1e6:,.0f} MB free"
    if free_bytes < checkpoint_bytes:
        raise RuntimeEnvironmentError(
            f"output_dir: {free}, expected {checkpoint_bytes / 1e6:,.0f} MB or more for a checkpoint; "
            "free some space or choose another output_dir"
        )
    if free_bytes < max_checkpoints * checkpoint_bytes:
        return [f"{free}; up to {max_checkpoints} checkpoints of {checkpoint_bytes / 1e6:,.0f} MB exist at a time"]
    return []


def _refuse_changes(config: Config, tokenizer: Tokenizer, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Raise ConfigError (DataError for tokens), one line each, for changes that would make the resumed run another."""
    saved, mutable = checkpoint.state["run"], mutable_keys()
    started = f"the run in {config.output_dir} was started with"
    remedy = f"resume with the old value, choose another output_dir, or start over with --fresh ({checkpoint.path})"
    changes = [(key, new, old) for key, (new, old) in changed_keys(config, checkpoint).items() if key not in mutable]
    changes += [
        ("global_batch_size", config.sequences_per_step, saved["sequences_per_step"]),
        ("tokenizer_encoding", f"the tokenizer {tokenizer.fingerprint}", f"the tokenizer {saved['tokenizer']}"),
        ("order of sequences", f"version {ORDER_VERSION}", f"version {saved['order_version']}"),
    ]
    lines = [f"{key}: got {new}, but {started} {old}; {remedy}" for key, new, old in changes if new != old]
    if config.num_training_steps < checkpoint.step:
        lines.append(
            f"num_training_steps: got {config.num_training_steps}, but the run in {config.output_dir} has made "
            f"{checkpoint.step} steps; {remedy}"
        )
    lines += _learning_rate_jump(config, checkpoint)
    if lines:
        raise ConfigError("\n".join(lines))
    if dataset.fingerprint != saved["tokens"]:
        raise DataError(f"{dataset.path}: got tokens {dataset.fingerprint}, but {started} {saved['tokens']}; {remedy}")


def _learning_rate_jump(config: Config, checkpoint: Checkpoint) -> list[str]:
    """A line if the next learning rate would differ from the one that the checkpoint's run would have used.

    Only keys that may change are considered; the others are refused already.
    """
    saved, step = _saved_config(checkpoint), checkpoint.step
    old = saved.schedule
    new = dataclasses.replace(
        old, num_decay_steps=config.schedule.num_decay_steps, decay_fraction=config.schedule.decay_fraction
    )
    old_rate, new_rate = learning_rate(step, old), learning_rate(step, new)
    if old_rate == new_rate or step >= config.num_training_steps:
        return []
    changed: dict[str, tuple[float, float]] = {}
    if new.num_decay_steps != old.num_decay_steps:
        is_implied = config.lr_decay_steps is None and saved.lr_decay_steps is None
        changed["num_training_steps" if is_implied else "lr_decay_steps"] = new.num_decay_steps, old.num_decay_steps
    if new.decay_fraction != old.decay_fraction:
        changed["lr_decay_fraction"] = new.decay_fraction, old.decay_fraction
    settings = [f"{key.replace('num_training', 'lr_decay')}={value}" for key, (_, value) in changed.items()]
    key, (new_value, old_value) = next(iter(changed.items()))
    rates = f"{old_rate:.1e}", f"{new_rate:.1e}"
    before, after = rates if rates[0] != rates[1] else (old_rate, new_rate)
    return [
        f"{key}: got {new_value}, but the run in {config.output_dir} was started with {old_value}: its learning rate "
        f"after step {step:,} would jump from {before} to {after}; set {' '.join(settings)} to keep the schedule it "
        "had, choose another output_dir, or start over with --fresh"
    ]


def _finished_results(output_dir: Path, step: int, config: Config) -> dict[str, Any] | None:
    """The results of a run that has made all its steps and was evaluated; None for a run that has more to do."""
    if step < config.num_training_steps or not (output_dir / WEIGHTS_FILE).is_file():
        return None
    try:
        results = store.read_json(output_dir / "eval.json")
    except CheckpointError:
        return None  # evaluating again is cheap
    return results if results.get("step") == step else None
