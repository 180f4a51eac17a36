"""Saves a trained model as `model.safetensors`, and loads models from that file or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgpt import atomic_io
from distgpt.checkpoint import store
from distgpt.config.loader import config_from_dict, load_config
from distgpt.config.schema import Config
from distgpt.data.tokenizer import Tokenizer, load_saved_tokenizer
from distgpt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from distgpt.distributed.context import DistributedContext
    from distgpt.models.kernels import Kernels
    from distgpt.models.language_model import LanguageModel

WEIGHTS_FILE, TOKENIZER_DIR = "model.safetensors", "tokenizer"


def save_weights(output_dir: Path, model: LanguageModel, context: DistributedContext) -> None:
    """Write `model.safetensors`, without the padding rows of the vocabulary.

    `model` is the module inside DDP, or the one that FSDP sharded. All ranks must call, and rank 0 writes.
    """
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    full = StateDictOptions(full_state_dict=True, cpu_offload=context.is_distributed)
    state_dict: dict[str, Any] = {**get_model_state_dict(model, options=full)}

    def write() -> None:
        if not context.is_rank0:
            return
        unpadded = model.remove_vocab_padding(state_dict)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in unpadded.items()}
        with atomic_io.atomic_write(output_dir / WEIGHTS_FILE) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary)
            temporary.chmod(mode)  # safetensors makes the file readable by its owner only

    context.run_on_all_ranks(write)


def load_model(path: Path, kernels: Kernels | None = None) -> tuple[LanguageModel, Tokenizer, Config]:
    """The model (on the CPU, in evaluation mode), tokenizer and config of a finished run or of a checkpoint.

    `kernels` are those to build the model with. Raises CheckpointError.
    """
    import torch

    config, tokenizer = read_run(path)
    model = build_model(config, tokenizer, kernels).to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in iter_weights(path, model):
            parameters[name].copy_(values)
    model.eval()
    return model, tokenizer, config


def read_run(path: Path) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of the model in `path`, which is the output_dir of a finished run or a checkpoint's folder.

    Raises CheckpointError unless there is one.
    """
    if checkpoint := store.open_checkpoint(path):
        config = config_from_dict(checkpoint.state["run"]["config"])
        return config, load_saved_tokenizer(path.resolve().parent.parent / TOKENIZER_DIR)
    if not (path / WEIGHTS_FILE).is_file():
        _, latest = max(store.list_checkpoints(path), default=(0, None))
        if latest:
            raise CheckpointError(
                f"{path} holds an unfinished run; run the same training command again to finish it, or give {latest}"
            )
        raise CheckpointError(
            f"{path} holds no trained model; give the output_dir of a finished run, such as outputs/GPT-tiny"
        )
    try:
        config = load_config(path / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error}; restore {path / 'config.yaml'} or train again") from None
    return config, load_saved_tokenizer(path / TOKENIZER_DIR)


def iter_weights(path: Path, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, values) of each parameter, from a finished run or a checkpoint, yielded one at a time.

    Only names and shapes are taken from `model`. Raises CheckpointError naming the first tensors that do not fit.
    """
    if store.open_checkpoint(path):
        return _checkpoint_weights(path, model)
    return _finished_weights(path / WEIGHTS_FILE, model)


def _checkpoint_weights(path: Path, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The weights in a verified checkpoint of a model of the same shapes.

    They are read in groups of about the size of a checkpoint's file, since each read opens all files.
    """
    import torch

    from distgpt.checkpoint.saver import FILE_BYTES, read_tensors

    names = list(model.parameter_shapes)
    while names:
        group: dict[str, Tensor] = {}
        while names and sum(tensor.nbytes for tensor in group.values()) < FILE_BYTES:
            name = names.pop(0)
            group[name] = torch.empty(model.parameter_shapes[name])
        read_tensors(path, {f"model.{name}": values for name, values in group.items()}, alone=True)
        yield from group.items()


def _finished_weights(file_path: Path, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of a finished run, with the padding rows as zeros."""
    from safetensors import SafetensorError, safe_open
    from torch.nn import functional as F

    try:
        with safe_open(file_path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            stored = {name: (*part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            expected = {name: (*shape, "F32") for name, shape in model.unpadded_shapes().items()}
            mismatches = [
                f"{name}: {stored.get(name, 'absent')}, expected {expected.get(name, 'no such tensor')}"
                for name in sorted(stored.keys() | expected.keys())
                if stored.get(name) != expected.get(name)
            ]
            if mismatches:
                raise CheckpointError(f"{file_path}: {'; '.join(mismatches[:3])}; use the config it was trained with")
            for name, shape in model.parameter_shapes.items():
                values = file.get_tensor(name)
                if not values.isfinite().all():
                    raise CheckpointError(f"{file_path}: {name} holds NaN or infinity; train again or restore it")
                yield name, F.pad(values, (0, 0, 0, shape[0] - len(values))) if values.ndim > 1 else values
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file_path}: does not load ({error}); train again or restore it") from None


def build_model(config: Config, tokenizer: Tokenizer, kernels: Kernels | None = None) -> LanguageModel:
    """The config's model on the meta device, that is without weights."""
    import torch

    with torch.device("meta"):
        return config.model_config.build(
            tokenizer.n_vocab,
            p_dropout=config.p_dropout,
            seed=config.seed,
            end_of_text=tokenizer.end_of_text if config.mask_documents else None,
            kernels=kernels,
        )
