"""A trained model to text: prompts of any lengths in one left-padded batch, each as if it were alone.

`python -m distgpt.generate outputs/GPT-tiny --prompt "def main"` prints; `--prefixes FILE.jsonl` writes a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distgpt import trained
from distgpt import world as worlds
from distgpt.durable import replace
from distgpt.errors import ConfigError, DataError, Parser, file_name, leave, run_command
from distgpt.model import DecoderLM, KeyValueCache
from distgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only this many likeliest tokens can be chosen; None: all."""
    seed: int = 0


def next_token_probabilities(logits_BV: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """softmax(logits / temperature) over the `top_k` largest logits, BV; temperature 0 puts all on the largest."""
    if temperature < 1e-6:  # a smaller divisor is 0 in fp32
        return F.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).to(logits_BV.dtype)
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature  # no overflow at small temperatures
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(top_k, dim=-1).values[..., -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -math.inf)
    return scaled_BV.softmax(-1)


def generators_of(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """A generator for each prompt, by seed, prompt, and how often it came before: neighbours have no part in it."""
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompts):
        digest = hashlib.sha256(f"{seed}/{seen[prompt]}/{prompt}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63))
        seen[prompt] += 1
    return generators


@torch.inference_mode()
def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    end_of_text: int,
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> tuple[list[list[int]], list[float]]:
    """New token ids for each prompt (none empty), and the summed loss in nats of each prompt's tokens after its first.

    A row ends at end-of-text (not returned), at `max_new_tokens`, or when it fills the model's n_positions.
    """
    device = model.token_embedding.weight.device
    longest = max(map(len, prompts))
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    ids_BT = torch.tensor([[end_of_text] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    max_new_tokens = min(max_new_tokens, model.n_positions - min(map(len, prompts)))
    columns = longest + max_new_tokens
    real_BS = torch.arange(columns)[None, :] >= (longest - lengths_B)[:, None]
    cache = KeyValueCache(len(prompts), columns)
    logits_BTV = model(ids_BT.to(device), real_BS[:, :longest].to(device), cache=cache).float().cpu()
    losses = [
        float(
            F.cross_entropy(logits_TV[-len(prompt) : -1], torch.tensor(prompt[1:], dtype=torch.int64), reduction="sum")
        )
        for logits_TV, prompt in zip(logits_BTV, prompts, strict=True)
    ]
    new: list[list[int]] = [[] for _ in prompts]
    running_B = lengths_B < model.n_positions
    logits_BV = logits_BTV[:, -1]
    for position in range(max_new_tokens):
        probabilities_BV = next_token_probabilities(logits_BV, sampling.temperature, sampling.top_k)
        chosen_B = torch.full((len(prompts),), end_of_text)
        for row in running_B.nonzero().flatten().tolist():
            token = int(torch.multinomial(probabilities_BV[row], 1, generator=generators[row]))
            chosen_B[row] = token
            if token != end_of_text:
                new[row].append(token)
        running_B &= (chosen_B != end_of_text) & (lengths_B + position + 1 < model.n_positions)
        if not running_B.any() or position == max_new_tokens - 1:
            break
        real_BS[:, longest + position] = running_B  # a row that has ended goes on as padding, its position stays
        mask_BS = real_BS[:, : longest + position + 1].to(device)
        logits_BV = model(chosen_B[:, None].to(device), mask_BS, cache=cache)[:, -1].float().cpu()
    return new, losses


def read_prefixes(path: Path) -> list[str]:
    """The `prefix` of each line of a JSON-lines file. Raises DataError naming the line."""
    try:
        if path.is_char_device() or path.is_block_device():  # some never end
            raise DataError(f"{path}: got a device, expected JSON lines; give a file")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f'{path}: cannot read: {error.strerror}; give a file with a {{"prefix": ...}} a line') from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    prefixes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prefix = json.loads(line)["prefix"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prefix = None
        if not isinstance(prefix, str):
            raise DataError(f'{path}:{number}: got {line[:60]!r}, expected {{"prefix": "text"}}; mend the line')
        prefixes.append(prefix)
    if not prefixes:
        raise DataError(f'{path}: has no lines, expected {{"prefix": "text"}} in each; give at least one')
    return prefixes


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer, n_positions: int, masked: bool) -> list[list[int]]:
    """Prompts as ids. Raises ConfigError for one too long.

    Documents begin with end-of-text: so does an empty prompt, and every one where training masked documents.
    """
    start = [tokenizer.end_of_text]
    prompts = [(start if masked else []) + tokenizer.encode(text) or start for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= n_positions:
            raise ConfigError(
                f"prompt {text[:30]!r}...: has {len(prompt)} tokens, expected at most {n_positions - 1} "
                f"(the model reads {n_positions}); shorten it"
            )
    return prompts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, its numbers checked. Raises ConfigError."""
    parser = Parser(prog="python -m distgpt.generate", description=main.__doc__)
    parser.add_argument(
        "run",
        type=file_name,
        metavar="RUN",
        help="a finished run, such as outputs/GPT-tiny, or a checkpoint",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    source.add_argument("--prefixes", type=file_name, metavar="FILE", help='JSON lines of {"prefix": ...}')
    where = "where --prefixes writes (default: RUN/generation.jsonl)"
    parser.add_argument("--output", type=file_name, metavar="FILE", help=where)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens to add (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="fixes what is sampled (default 0)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="prompts at a time (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    options = parser.parse_args(arguments)
    limits = {
        "max_new_tokens": (options.max_new_tokens, 1),
        "top_k": (options.top_k, 1),
        "batch_size": (options.batch_size, 1),
        "temperature": (options.temperature, 0),
        "seed": (options.seed, 0),
    }
    for name, (value, least) in limits.items():
        if value is not None and not (least <= value < math.inf):
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}, expected a number from {least}; change it")
    if options.output is not None:
        check_output(Path(options.output), options.prompt is not None)
    return options


def check_output(output: Path, prompted: bool) -> None:
    """Raise ConfigError for a file that could not be written, before there is anything to write."""
    if prompted:
        raise ConfigError(f"--output: got {output} with --prompt, which prints; leave it out or use --prefixes")
    if not output.parent.is_dir():
        raise ConfigError(f"--output: got {output}, but {output.parent} is no folder; make it or choose another file")
    if output.exists() and not output.is_file():
        raise ConfigError(f"--output: got {output}, a folder or device, expected a file; choose another")


def main(arguments: Sequence[str]) -> None:
    """Continue prompts with a trained model."""
    options = parse(arguments)
    run = Path(options.run)
    texts = options.prompt or read_prefixes(Path(options.prefixes))
    model, tokenizer, _ = trained.load(run)
    prompts = encode_prompts(texts, tokenizer, model.n_positions, model.end_of_text is not None)
    model.to(worlds.choose_device(options.device, 0, 1))
    sampling = Sampling(options.temperature, options.top_k, options.seed)
    generators = generators_of(prompts, options.seed)
    generations: list[str] = []
    loss = 0.0
    for first in range(0, len(prompts), options.batch_size):
        part = slice(first, first + options.batch_size)
        new, losses = generate(
            model, prompts[part], tokenizer.end_of_text, options.max_new_tokens, sampling, generators[part]
        )
        generations += [tokenizer.decode(ids) for ids in new]
        loss += sum(losses)
    if options.prompt:
        print("\n\n".join(text + generation for text, generation in zip(texts, generations, strict=True)))
    else:
        output = Path(options.output or run / "generation.jsonl")
        rows = [{"prefix": text, "generation": new} for text, new in zip(texts, generations, strict=True)]
        try:
            replace(output, "".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:
            raise ConfigError(f"--output: cannot write {output}: {error.strerror}; choose another file") from None
        print(f"{len(rows)} generations written to {output}")
    predicted = sum(len(prompt) - 1 for prompt in prompts)
    if predicted:
        print(f"perplexity of the prefixes: {math.exp(loss / predicted):.2f} ({predicted} tokens)", file=sys.stderr)


if __name__ == "__main__":
    leave(run_command(main))
