"""Everything that can be found wrong before torch is loaded: config, tokenizer, tokens, output folder, resume.

`python -m distgpt.check CONFIG [key=value ...]` does just that, in a second.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt import checkpoint, trained
from distgpt import config as configs
from distgpt.checkpoint import Checkpoint
from distgpt.config import Config
from distgpt.corpus import ORDER_VERSION, Tokens, open_corpus
from distgpt.errors import CheckpointError, ConfigError, DataError, MachineError, file_name, leave, run_command
from distgpt.tokenizer import Tokenizer, load_tokenizer

MAY_CHANGE = {
    "output_dir",
    "device",
    "batch_size",
    "grad_accumulation_steps",
    "global_batch_size",
    "num_training_steps",
    "precision",
    "compile",
    "activation_checkpointing",
    "parallel",
    "log_every",
    "eval",
    "checkpoint",
    "profile",
    "max_minutes",
    "hang_minutes",
    "wandb",
    "data",
}
"""Keys that may change when a run goes on. Of the batch keys and `data`, what they come to may not."""


BYTES_SAVED = 12
"""Of a parameter, in a checkpoint: its value and two moments."""


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    tokenizer: Tokenizer
    tokens: Tokens
    resume: Checkpoint | None
    results: dict[str, Any] | None
    """eval.json of a run that is finished already."""
    source: Path | None
    """Folder of a finished run, or of a checkpoint, whose weights a new run begins with."""
    notes: list[str]
    """What the user should know before the run begins, a line each."""


def newest(config: Config, fresh: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, unless the run is to start afresh, and why newer ones are passed over."""
    return (None, []) if fresh else checkpoint.newest(Path(config.output_dir))


def check(
    config: Config,
    fresh: bool,
    source: Path | None = None,
    found: tuple[Checkpoint | None, list[str]] | None = None,
) -> Start:
    """Check all that a run needs and find where it begins. `fresh` ignores what is in the output folder.

    A run that has a checkpoint goes on from it; only a new one begins with the weights of `source`.
    `found` is what `newest` has found already: hashing takes a while.

    Raises a UserError; writes nothing but the sample corpus where it is needed (or a compressed .npz, unpacked).
    """
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir)
    tokenizer = load_tokenizer(config.tokenizer_encoding)
    resume, rejected = newest(config, fresh) if found is None else found
    notes = list(rejected)
    if resume is None and notes:
        raise CheckpointError(
            "\n".join(notes) + f"\n{output_dir}: no checkpoint is sound; restore one, or start over with --fresh"
        )
    if resume is None and not fresh and any((output_dir / name).exists() for name in (trained.WEIGHTS, "eval.json")):
        raise ConfigError(
            f"output_dir: {output_dir} holds a trained model and no checkpoint to go on from; "
            "choose another output_dir, or start over with --fresh, which deletes that model"
        )
    tokens = open_corpus(config, tokenizer)
    if tokens.note:
        notes.append(tokens.note)
    notes.extend(room_for_checkpoints(config, tokenizer))
    notes.extend(
        f"{name}.every is {every}, more than the {config.num_training_steps} steps of the run: only at its end"
        for name, every in (("eval", config.eval.every), ("checkpoint", config.checkpoint.every))
        if every > config.num_training_steps
    )
    if resume is None:
        if source is not None:
            check_source(source, config, tokenizer)
        return Start(tokenizer, tokens, None, None, source, notes)
    refuse_changes(config, tokenizer, tokens, resume)
    notes.extend(
        f"{key} is now {new} (was {old})" for key, (new, old) in changes(config, resume).items() if key != "output_dir"
    )
    return Start(tokenizer, tokens, resume, finished_results(output_dir, resume.step, config), None, notes)


def check_source(source: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError unless `source` holds a model of this shape, ConfigError if its tokens are others."""
    theirs, their_tokenizer = trained.check(source)
    if their_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer_encoding: got tokens of {tokenizer.fingerprint}, but {source} was trained on tokens of "
            f"{their_tokenizer.fingerprint}; use its encoding"
        )
    mine, old = dataclasses.asdict(config.model_config), dataclasses.asdict(theirs.model_config)
    if different := [key for key in mine if mine[key] != old[key]]:
        lines = [f"model_config.{key}: got {mine[key]}, but {source} has {old[key]}; use its" for key in different]
        raise CheckpointError("\n".join(lines))


def check_output_dir(output_dir: Path) -> None:
    """Raise MachineError if the output folder could not be written to."""
    existing = output_dir
    try:
        existing = existing_part(output_dir)
        if not existing.is_dir():
            what = "a link to nothing" if existing.is_symlink() else "a file"
            raise MachineError(f"output_dir: {existing} is {what}, expected a folder; choose another output_dir")
        tempfile.TemporaryFile(dir=existing).close()
    except (OSError, RecursionError) as error:
        reason = getattr(error, "strerror", "too many folders")
        raise MachineError(f"output_dir: cannot write in {str(existing)[:200]}: {reason}; choose another") from None


def existing_part(path: Path) -> Path:
    """The path itself or, if there is nothing yet, the nearest folder above it."""
    return next(part for part in (path, *path.absolute().parents) if part.exists() or part.is_symlink())


def room_for_checkpoints(config: Config, tokenizer: Tokenizer) -> list[str]:
    """A note where the disk has no room for all checkpoints; raises MachineError where it has none for one."""
    one = BYTES_SAVED * config.model_config.sizes(tokenizer.n_vocab).parameters
    most = config.checkpoint.keep + 2  # the best, and the one being written
    folder = existing_part(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    if free < one:
        raise MachineError(
            f"output_dir: {folder} has {free / 1e6:,.0f} MB free, expected {one / 1e6:,.0f} MB or more for a "
            "checkpoint; make room or choose another"
        )
    return (
        [
            f"{folder} has {free / 1e6:,.0f} MB free, and up to {most} checkpoints of {one / 1e6:,.0f} MB are to be "
            "there at a time"
        ]
        if free < most * one
        else []
    )


def changes(config: Config, found: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """The new and the old value of each key (`section.key`) that differs from the run being continued."""
    new, old = configs.flat(config), configs.flat(configs.from_dict(found.state["config"]))
    return {key: (new[key], old[key]) for key in new if new[key] != old[key]}


def refuse_changes(config: Config, tokenizer: Tokenizer, tokens: Tokens, found: Checkpoint) -> None:
    """Raise ConfigError (DataError for tokens), a line each, for what would make the continued run another run."""
    remedy = f"go on with the old value, choose another output_dir, or start over with --fresh ({found.path})"
    lines = [
        f"{key}: got {new}, but the run in {config.output_dir} was started with {old}; {remedy}"
        for key, (new, old) in changes(config, found).items()
        if key.partition(".")[0] not in MAY_CHANGE
    ]
    facts = {
        "global_batch_size": (config.sequences_per_step, found.state["sequences_per_step"]),
        "tokenizer_encoding": (f"tokens of {tokenizer.fingerprint}", f"tokens of {found.state['tokenizer']}"),
        "order of sequences": (f"version {ORDER_VERSION}", f"version {found.state['order_version']}"),
    }
    lines += [
        f"{key}: got {mine}, but the run in {config.output_dir} was started with {theirs}; {remedy}"
        for key, (mine, theirs) in facts.items()
        if mine != theirs
    ]
    if config.num_training_steps < found.step:
        lines.append(
            f"num_training_steps: got {config.num_training_steps}, but the run in {config.output_dir} has made "
            f"{found.step} steps; {remedy}"
        )
    if lines:
        raise ConfigError("\n".join(lines))
    if tokens.fingerprint != found.state["tokens"]:
        raise DataError(
            f"{tokens.path}: got tokens {tokens.fingerprint}, but the run in {config.output_dir} was started with "
            f"{found.state['tokens']}; {remedy}"
        )


def finished_results(output_dir: Path, step: int, config: Config) -> dict[str, Any] | None:
    """The results of a run that has made all its steps and been scored; None for one that has more to do."""
    if step < config.num_training_steps or not (output_dir / trained.WEIGHTS).is_file():
        return None
    try:
        results = checkpoint.read_json(output_dir / "eval.json")
    except CheckpointError:
        return None  # scoring again is cheap
    return results if results.get("step") == step else None


def main(arguments: Sequence[str]) -> None:
    """Check a config, its tokens and its output folder without starting the run."""
    parser = configs.config_parser("python -m distgpt.check", str(main.__doc__))
    parser.add_argument("--fresh", action="store_true", help="ignore an earlier run in output_dir")
    parser.add_argument(
        "--from", dest="source", type=file_name, metavar="RUN", help="a run or checkpoint to begin with"
    )
    parser.add_argument("--for-launcher", action="store_true", help="print the device and the output folder only")
    options = parser.parse_intermixed_args(arguments)
    config = configs.load(options.config, options.overrides)
    start = check(config, options.fresh, options.source and Path(options.source))
    if options.for_launcher:
        print(f"{config.device}\n{config.output_dir}")
    else:
        print(f"{options.config}: sound; {len(start.tokens.train):,} training tokens in {start.tokens.path}")


if __name__ == "__main__":
    leave(run_command(main))
