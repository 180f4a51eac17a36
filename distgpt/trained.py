"""A finished run's model: writing it as `model.safetensors` with its tokenizer, and building it from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgpt import config as configs
from distgpt.checkpoint import on_disk
from distgpt.durable import replacing
from distgpt.errors import CheckpointError, ConfigError
from distgpt.tokenizer import Tokenizer, load_saved

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distgpt.model import DecoderLM
    from distgpt.world import World

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer"


def save(output_dir: Path, model: DecoderLM, tokenizer: Tokenizer, world: World) -> None:
    """Write what using the model needs: `model.safetensors` (without padding rows) and the tokenizer.

    Every rank calls, and sends its share of the weights to rank 0, which writes.
    """
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=world.grouped)
    padded: dict[str, Any] = {**get_model_state_dict(model, options=whole)}
    if world.is_first:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.without_padding(padded).items()}
        with replacing(output_dir / WEIGHTS) as partial:
            save_file(tensors, partial)
        tokenizer.save(output_dir / TOKENIZER)


def load(output_dir: Path) -> tuple[DecoderLM, Tokenizer, configs.Config]:
    """A finished run's model (on the CPU, in evaluation mode), tokenizer and config. Raises CheckpointError."""
    import torch

    check(output_dir)
    try:
        config = configs.load(output_dir / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error}; restore {output_dir / 'config.yaml'} or train again") from None
    tokenizer = load_saved(output_dir / TOKENIZER)
    model = build_model(config, tokenizer).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, values in weights(output_dir, model):
            parameter.copy_(values)
    model.eval()
    return model, tokenizer, config


def check(output_dir: Path) -> None:
    """Raise CheckpointError unless a folder holds a finished run's model."""
    if not (output_dir / WEIGHTS).is_file():
        known = f"{output_dir} holds an unfinished run: run the same training command again to finish it"
        unknown = (
            f"{output_dir} holds no trained model: give the output_dir of a finished run, such as outputs/GPT-tiny"
        )
        raise CheckpointError(known if any(on_disk(output_dir)) else unknown)


def weights(output_dir: Path, model: DecoderLM) -> Iterator[tuple[nn.Parameter, Tensor]]:
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
