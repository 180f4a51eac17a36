"""Save, find, verify, load, prune: a checkpoint is complete under its name, or absent.

A checkpoint is a folder `checkpoints/step-00000250` of safetensors files (torch.distributed.checkpoint, so that any
number of ranks loads it), `state.json` for what is no tensor, and `manifest.json` with every file's size and sha256.
It is written under another name, flushed to disk, sealed with the manifest, and renamed. No pickle is ever read.
Finding and verifying need no torch; it is imported where tensors are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgpt import config as configs
from distgpt.errors import CheckpointError, ConfigError, MachineError
from distgpt.tokenizer import Tokenizer, load_saved

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from distgpt.model import DecoderLM
    from distgpt.world import World

FORMAT = 1
FILE_BYTES = 2**28
"""Tensors that share a file of a checkpoint, before they are shared among the ranks."""
MANIFEST, STATE = "manifest.json", "state.json"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Updates made before it was saved."""
    state: dict[str, Any]
    """What is no tensor: the config and everything else that must be the same when the run goes on."""


def newest(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    rejected: list[str] = []
    for step, path in sorted(on_disk(output_dir), reverse=True):
        try:
            return Checkpoint(path, step, verify(path)), rejected
        except CheckpointError as error:
            rejected.append(f"passing over {error}")
    return None, rejected


def on_disk(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """Every folder that is named like a checkpoint, with its step."""
    folder = output_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield int(match[1]), path


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest; return its state. Raises CheckpointError."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')}, expected {FORMAT}; use the distgpt that wrote it"
        )
    listed, found = manifest.get("files"), describe_files(path)
    if not isinstance(listed, dict) or STATE not in listed:
        raise CheckpointError(f"{path / MANIFEST}: damaged; restore or delete {path}")
    for name in sorted(listed.keys() | found.keys()):
        got, expected = found.get(name), listed.get(name)
        if got != expected:
            raise CheckpointError(f"{path / name}: damaged (got {got}, expected {expected}); restore or delete {path}")
    return read_json(path / STATE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); restore or delete {path.parent}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected a JSON object; delete {path.parent}")
    return value


def describe_files(folder: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of every file in a checkpoint's folder but the manifest. Raises CheckpointError."""
    described = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path}: not a file of a checkpoint; delete it or {folder}")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                described[path.name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
        except OSError as error:
            raise CheckpointError(f"{path}: unreadable ({error.strerror}); restore or delete {folder}") from None
    return described


def save(
    output_dir: Path,
    step: int,
    model: DecoderLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    world: World,
) -> None:
    """Save a checkpoint, then delete all but the newest `keep`. Every rank calls; each writes its share."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

    target = output_dir / "checkpoints" / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.gather(None)  # no rank writes before the folder is there
    tensors, _ = split_state(model, optimizer)
    writer = HuggingFaceStorageWriter(str(partial), file_numbers(tensors), save_distributed=True)  # flushes each file
    try:
        with one_process_is_fine():
            save_tensors(tensors, storage_writer=writer, no_dist=not world.grouped)
    except CheckpointException as error:
        reason = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise MachineError(f"{target}: not saved ({reason}); the last is intact: make room and start again") from None
    world.gather(None)  # no rank's file is missing from the manifest
    if world.is_first:
        (partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        manifest = {"format": FORMAT, "files": describe_files(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (partial / STATE, partial / MANIFEST, partial):
            sync(path)
        remove(target)
        partial.rename(target)
        sync(target.parent)
        prune(output_dir, step, keep)
    world.gather(None)  # no rank goes on as if it were saved before it is


def file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file of a checkpoint each tensor goes to, from 1: a file is put together in memory before it is written."""
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        filled += tensor.numel() * tensor.element_size()
        numbers[name] = 1 + filled // FILE_BYTES
    return numbers


def prune(output_dir: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` up to `step`; later ones were passed over as damaged."""
    found = sorted(on_disk(output_dir), reverse=True)
    for _, path in [c for c in found if c[0] > step] + [c for c in found if c[0] <= step][keep:]:
        remove(path)
    for path in (output_dir / "checkpoints").glob(".step-*"):  # what an interrupted save or deletion left
        shutil.rmtree(path, ignore_errors=True)


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint, and nothing else."""
    prune(output_dir, step=-1, keep=0)


def load(checkpoint: Checkpoint, model: DecoderLM, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put a checkpoint's tensors into the model and its optimizer. Every rank calls, with any number of ranks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    tensors, scalars = split_state(model, optimizer)
    reader = HuggingFaceStorageReader(str(checkpoint.path))
    with one_process_is_fine():
        load_tensors(tensors, storage_reader=reader, no_dist=not world.grouped)
    whole = tensors | scalars
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, value in whole.items():
        owner, _, rest = name.partition(".")
        parts[owner][rest] = value
    set_model_state_dict(model, parts["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=options)


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def split_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model and optimizer as flat tensors, and the optimizer's settings, which the config gives and no file holds."""
    import torch
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    state |= {f"optimizer.{name}": value for name, value in optimizer_state.items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def save_trained(output_dir: Path, model: DecoderLM, tokenizer: Tokenizer, world: World) -> None:
    """Write what using the model needs: `model.safetensors` (without padding rows) and the tokenizer.

    Every rank calls, and sends its share of the weights to rank 0, which writes.
    """
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=world.grouped)
    weights: dict[str, Any] = {**get_model_state_dict(model, options=whole)}
    if world.is_first:
        whole_weights = {name: tensor.cpu().contiguous() for name, tensor in model.without_padding(weights).items()}
        with replacing(output_dir / WEIGHTS) as partial:
            save_file(whole_weights, partial)
        tokenizer.save(output_dir / TOKENIZER)


def load_trained(output_dir: Path) -> tuple[DecoderLM, Tokenizer, configs.Config]:
    """A finished run's model (on the CPU, in evaluation mode), tokenizer and config. Raises CheckpointError."""
    import torch

    check_trained(output_dir)
    try:
        config = configs.load(output_dir / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error}; restore {output_dir / 'config.yaml'} or train again") from None
    tokenizer = load_saved(output_dir / TOKENIZER)
    model = build_model(config, tokenizer).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, values in trained_weights(output_dir, model):
            parameter.copy_(values)
    model.eval()
    return model, tokenizer, config


def check_trained(output_dir: Path) -> None:
    """Raise CheckpointError unless a folder holds a finished run's model."""
    if not (output_dir / WEIGHTS).is_file():
        known = f"{output_dir} holds an unfinished run: run the same training command again to finish it"
        unknown = (
            f"{output_dir} holds no trained model: give the output_dir of a finished run, such as outputs/GPT-tiny"
        )
        raise CheckpointError(known if any(on_disk(output_dir)) else unknown)


def trained_weights(output_dir: Path, model: DecoderLM) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each of the model's parameters with a finished run's weights for it, padding rows 0, one at a time.

    Raises CheckpointError naming the first tensors that do not fit.
    """
    from safetensors import SafetensorError, safe_open
    from torch.nn import functional as F

    path = output_dir / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            found = {name: (*part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            expected = {name: (*shape, "F32") for name, shape in model.shapes_without_padding().items()}
            wrong = [
                f"{name}: {found.get(name, 'absent')}, expected {expected.get(name, 'no such tensor')}"
                for name in sorted(found.keys() | expected.keys())
                if found.get(name) != expected.get(name)
            ]
            if wrong:
                raise CheckpointError(f"{path}: {'; '.join(wrong[:3])}; give the config it was trained with")
            for name, parameter in model.named_parameters():
                values = file.get_tensor(name)
                if not values.isfinite().all():
                    raise CheckpointError(f"{path}: {name} holds NaN or infinity; train again or restore it")
                yield parameter, F.pad(values, (0, 0, 0, len(parameter) - len(values))) if values.ndim > 1 else values
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: does not load ({error}); train again or restore it") from None


def build_model(config: configs.Config, tokenizer: Tokenizer) -> DecoderLM:
    """The config's model on the meta device: without weights."""
    import torch

    from distgpt.model import DecoderLM

    sizes = config.model_config
    with torch.device("meta"):
        return DecoderLM(
            tokenizer.n_vocab,
            sizes.n_embd,
            sizes.n_head,
            sizes.n_positions,
            sizes.n_layer,
            config.p_dropout,
            config.seed,
            tokenizer.end_of_text if config.mask_documents else None,
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another name to write to, then puts it in place: `path` holds the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def replace_durably(path: Path, raw: bytes) -> None:
    """Write a file so that its name holds the old content or the new, never a part."""
    with replacing(path) as partial:
        partial.write_bytes(raw)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries (creations and renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder; its name goes first, so that no half of it is ever taken for the whole."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
