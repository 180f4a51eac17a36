"""A trained model: writing it as `model.safetensors`, and building it from that or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgpt import checkpoint
from distgpt import config as configs
from distgpt.durable import replacing
from distgpt.errors import CheckpointError, ConfigError
from distgpt.tokenizer import Tokenizer, load_saved

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distgpt.model import DecoderLM
    from distgpt.world import World

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer"


def save(output_dir: Path, model: DecoderLM, world: World) -> None:
    """Write `model.safetensors`, the weights without padding rows.

    Every rank calls, and sends its share of the weights to rank 0, which writes.
    """
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=world.grouped)
    padded: dict[str, Any] = {**get_model_state_dict(model, options=whole)}

    def write() -> None:
        if not world.is_first:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.without_padding(padded).items()}
        with replacing(output_dir / WEIGHTS) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial)
            partial.chmod(mode)  # safetensors lets nobody but the owner read

    world.together(write)


def load(path: Path) -> tuple[DecoderLM, Tokenizer, configs.Config]:
    """The model (on the CPU, in evaluation mode), tokenizer and config of a finished run or of a checkpoint.

    Raises CheckpointError.
    """
    import torch

    config, tokenizer = check(path)
    model = build_model(config, tokenizer).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, values in weights(path, model):
            parameter.copy_(values)
    model.eval()
    return model, tokenizer, config


def check(path: Path) -> tuple[configs.Config, Tokenizer]:
    """Config and tokenizer of the model in the output_dir of a finished run, or in the folder of a checkpoint.

    Raises CheckpointError unless there is one.
    """
    if found := checkpoint.at(path):
        return configs.from_dict(found.state["config"]), load_saved(path.resolve().parent.parent / TOKENIZER)
    if not (path / WEIGHTS).is_file():
        _, saved = max(checkpoint.on_disk(path), default=(0, None))
        known = f"{path} holds an unfinished run: run the same training command again to finish it, or name {saved}"
        unknown = f"{path} holds no trained model: give the output_dir of a finished run, such as outputs/GPT-tiny"
        raise CheckpointError(known if saved else unknown)
    try:
        config = configs.load(path / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error}; restore {path / 'config.yaml'} or train again") from None
    return config, load_saved(path / TOKENIZER)


def weights(path: Path, model: DecoderLM) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each of the model's parameters with the values that a finished run or a checkpoint has for it, one at a time.

    Raises CheckpointError naming the first tensors that do not fit.
    """
    return saved_weights(path, model) if checkpoint.at(path) else finished_weights(path, model)


def saved_weights(path: Path, model: DecoderLM) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """`weights` of a verified checkpoint of a model of this shape."""
    import torch

    from distgpt.saver import read

    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape)
        read(path, {f"model.{name}": values}, alone=True)
        yield parameter, values


def finished_weights(output_dir: Path, model: DecoderLM) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """`weights` of a finished run; padding rows are 0."""
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
