"""Loss and perplexity on held-out tokens, every rank sharing the work.

`python -m distgpt.evaluate outputs/GPT-tiny [--data FILE]` scores a trained model on any token file or text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from distgpt import trained
from distgpt import world as worlds
from distgpt.config import Config
from distgpt.corpus import open_corpus
from distgpt.data import held_out_batches
from distgpt.errors import DataError, Parser, file_name, leave, run_command
from distgpt.loss import IGNORED
from distgpt.metrics import Score
from distgpt.model import DecoderLM
from distgpt.parallel import Execution, decide_precision, parallelize
from distgpt.shards import TokenArray, open_tokens, smallest_dtype
from distgpt.tokenizer import Tokenizer
from distgpt.world import World


@torch.no_grad()
def evaluate(
    model: DecoderLM,
    tokens: TokenArray,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    world: World,
    progress: Callable[[], None] = lambda: None,
    max_tokens: int | None = None,
) -> Score:
    """Score `model` on each target of a stream once, in windows of `seq_len`. Every rank calls and gets the total.

    `progress` is called after each batch, equally often on every rank.
    """
    training = model.training
    model.eval()
    sizes_V = torch.from_numpy(tokenizer.bytes_per_token())
    loss_sum = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    share = world.rank, world.size, max_tokens, model.end_of_text
    batches = held_out_batches(tokens, tokenizer.n_vocab, seq_len, batch_size, *share)
    for batch in batches:
        on_device = batch.to(world.device)
        loss_sum += model(on_device.ids_BT, targets_BT=on_device.targets_BT, documents=on_device.documents).item()
        real = batch.targets_BT[batch.targets_BT != IGNORED]
        counts += torch.stack([torch.tensor(real.numel()), sizes_V[real].sum()])
        progress()
    model.train(training)
    targets, text_bytes = world.sum(counts).tolist()
    return Score(float(world.sum(loss_sum)) / targets, targets, text_bytes)


def open_held_out(source: str | None, config: Config, tokenizer: Tokenizer) -> tuple[TokenArray, str]:
    """The tokens to score and their name: a token file's `val` (or first array), a text, or by default the run's."""
    if source is None:
        tokens = open_corpus(config, tokenizer)
        return tokens.val, f"{tokens.path} (val)"
    path = Path(source)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: got a folder or device, expected a token file or a text file; name one")
        with path.open("rb") as file:
            is_tokens = file.read(6).startswith((b"PK", b"\x93NUMPY"))
        if is_tokens:
            arrays = open_tokens(path)
            name = "val" if "val" in arrays else next(iter(arrays), "val")
            if name not in arrays:
                raise DataError(f"{path}: holds no arrays, expected val; make it with numpy.savez")
            held_out = arrays[name]
        else:
            ids = tokenizer.encode(path.read_text(encoding="utf-8"))
            with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                np.save(file, np.array(ids, dtype=smallest_dtype(tokenizer.n_vocab)))
                file.flush()
                held_out = open_tokens(file.name)["tokens"]
            name = "text"
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; give a token file or a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither a token file nor UTF-8 text (byte {error.start}); give one of them") from None
    if len(held_out) < 2:
        raise DataError(f"{path}: {name} has {len(held_out)} tokens, expected at least 2; give a longer one")
    held_out.verify()
    return held_out, f"{path} ({name})"


def main(arguments: Sequence[str]) -> None:
    """Score a trained model on held-out tokens or text."""
    parser = Parser(prog="python -m distgpt.evaluate", description=main.__doc__)
    parser.add_argument(
        "run",
        type=file_name,
        metavar="RUN",
        help="a finished run, such as outputs/GPT-tiny, or a checkpoint",
    )
    text = ".npz, .npy or text file (default: the run's validation tokens)"
    parser.add_argument("--data", type=file_name, metavar="FILE", help=text)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: the run's)")
    options = parser.parse_args(arguments)
    model, tokenizer, config = trained.load(Path(options.run))
    world = worlds.start(options.device or config.device)
    held_out, name = world.first_rank_first(lambda: open_held_out(options.data, config, tokenizer))
    parallelize(model, world, Execution(decide_precision(config, world), False, world.device.type))
    score = evaluate(model, held_out, tokenizer, config.seq_len, config.batch_size, world)
    if world.is_first:
        print(json.dumps({"data": name} | score.results(), indent=2))
    world.close()


if __name__ == "__main__":
    leave(run_command(main))
