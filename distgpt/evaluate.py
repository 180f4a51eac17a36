"""How well a model predicts held-out tokens; all ranks share the work.

`python -m distgpt.evaluate outputs/GPT-tiny [--data FILE]` scores a trained model on any token file or text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distgpt.checkpoint.weights import load_model, read_run
from distgpt.config.schema import Config
from distgpt.data.dataloader import validation_batches
from distgpt.data.dataset import open_dataset
from distgpt.data.token_files import TokenArray, find_format, open_token_file, smallest_dtype
from distgpt.data.tokenizer import Tokenizer
from distgpt.distributed.context import DistributedContext, init_distributed
from distgpt.distributed.parallelize import parallelize
from distgpt.distributed.runtime import RuntimeConfig, resolve_precision
from distgpt.errors import ArgumentParser, DataError, exit_process, path_argument, run_command
from distgpt.models.cross_entropy import IGNORE_INDEX
from distgpt.models.language_model import LanguageModel
from distgpt.training.metrics import EvalResult


@dataclass(frozen=True)
class EvalInputs:
    """What an evaluation works on."""

    model: LanguageModel
    tokens: TokenArray
    """The held-out stream."""
    tokenizer: Tokenizer
    seq_len: int
    batch_size: int
    runtime: RuntimeConfig
    context: DistributedContext
    max_tokens: int | None = None
    """Score only the first `max_tokens` targets; None: all."""
    after_batch: Callable[[], None] = lambda: None
    """Called after each batch, equally often on every rank."""


@torch.no_grad()
def evaluate(inputs: EvalInputs) -> EvalResult:
    """Score each target of the stream once, in windows of `seq_len`. All ranks must call; each gets the total."""
    model, context = inputs.model, inputs.context
    was_training = model.training
    model.eval()
    bytes_per_token_V = torch.from_numpy(inputs.tokenizer.bytes_per_token())
    loss_sum = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)  # targets, and the bytes of text that they encode
    batches = validation_batches(
        inputs.tokens,
        inputs.tokenizer.n_vocab,
        inputs.seq_len,
        inputs.batch_size,
        context.dp_rank,
        context.dp_size,
        inputs.max_tokens,
        model.end_of_text,
    )
    for batch in batches:
        on_device = batch.to(context.device)
        with inputs.runtime.autocast():
            loss = model(on_device.ids_BT, targets=on_device.targets_BT, documents=on_device.documents)
        loss_sum += loss.item()
        targets = batch.targets_BT[batch.targets_BT != IGNORE_INDEX]
        counts += torch.stack([torch.tensor(targets.numel()), bytes_per_token_V[targets].sum()])
        inputs.after_batch()
    model.train(was_training)
    num_targets, num_bytes = context.all_reduce_sum(counts).tolist()
    return EvalResult(float(context.all_reduce_sum(loss_sum)) / num_targets, num_targets, num_bytes)


EVALUATIONS: dict[str, Callable[[EvalInputs], Mapping[str, float]]] = {}
"""Evaluations besides the validation loss, by name: every `eval.every` steps of training, and at its end. Each is a
function that every rank calls and that returns named numbers, the same on every rank, which are logged."""


def run_evaluations(inputs: EvalInputs) -> tuple[EvalResult, dict[str, float]]:
    """The validation result, and the numbers of all EVALUATIONS. All ranks must call."""
    result = evaluate(inputs)
    numbers: dict[str, float] = {}
    for evaluation in EVALUATIONS.values():
        numbers |= evaluation(inputs)
    return result, numbers


def _open_held_out(source: str | None, config: Config, tokenizer: Tokenizer) -> tuple[TokenArray, str]:
    """The tokens to score and their name: a token file's `val` (or first array), a text, or by default the run's."""
    if source is None:
        dataset = open_dataset(config, tokenizer, for_training=False)
        return dataset.val, f"{dataset.path} (val)"
    path = Path(source)
    try:
        tokens, name = _open_tokens_or_text(path, tokenizer)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; give a token file or a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither a token file nor UTF-8 text (byte {error.start}); give one of them") from None
    if len(tokens) < 2:
        raise DataError(f"{path}: {name} has {len(tokens)} tokens, expected at least 2; give a longer one")
    tokens.check_crc()
    return tokens, f"{path} ({name})"


def _open_tokens_or_text(path: Path, tokenizer: Tokenizer) -> tuple[TokenArray, str]:
    """The tokens in a file, or of the text in it, and what to call them."""
    is_token_file = find_format(path) is not None
    if not is_token_file and path.exists() and not path.is_file():
        raise DataError(f"{path}: got a folder or device, expected a token file or a text file; name one")
    if is_token_file:
        arrays = open_token_file(path)
        name = "val" if "val" in arrays else next(iter(arrays), "val")
        if name not in arrays:
            raise DataError(f"{path}: holds no arrays, expected val; create it with numpy.savez")
        return arrays[name], name
    ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile(suffix=".npy") as temporary:  # stays open, so readable, once its name is deleted
        np.save(temporary, np.array(ids, dtype=smallest_dtype(tokenizer.n_vocab)))
        temporary.flush()
        return open_token_file(temporary.name)["tokens"], "text"


def main(arguments: Sequence[str]) -> None:
    """Score a trained model on held-out tokens or text."""
    parser = ArgumentParser(prog="python -m distgpt.evaluate", description=main.__doc__)
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN",
        help="a finished run, such as outputs/GPT-tiny, or a checkpoint",
    )
    data_help = "token file (.npz, .npy or .bin) or text file (default: the run's validation tokens)"
    parser.add_argument("--data", type=path_argument, metavar="FILE", help=data_help)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: the run's)")
    options = parser.parse_args(arguments)
    path = Path(options.run)
    config, tokenizer = read_run(path)
    context = init_distributed(options.device or config.device)
    runtime = RuntimeConfig(resolve_precision(config, context), compile=False, device=context.device.type)
    model, _, _ = load_model(path, runtime.kernels(config))
    tokens, name = context.rank0_first(lambda: _open_held_out(options.data, config, tokenizer))
    parallelize(model, context, runtime)
    result = evaluate(EvalInputs(model, tokens, tokenizer, config.seq_len, config.batch_size, runtime, context))
    if context.is_rank0:
        print(json.dumps({"data": name} | result.results(), indent=2))
    context.close()


if __name__ == "__main__":
    exit_process(run_command(main))
