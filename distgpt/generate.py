"""Sample text from a trained model.

`python -m distgpt.generate outputs/GPT-tiny --prompt "def main"` prints; `--prefixes FILE.jsonl` writes a file.
Prompts of different lengths share a left-padded batch. Each is continued exactly as it would be alone.
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

from distgpt.atomic_io import write_bytes
from distgpt.checkpoint.weights import load_model
from distgpt.data.tokenizer import Tokenizer
from distgpt.distributed.context import resolve_device
from distgpt.errors import ArgumentParser, ConfigError, DataError, exit_process, path_argument, run_command
from distgpt.models.kv_cache import KVCache
from distgpt.models.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """How many of the most likely tokens can be chosen; None: all."""


def next_token_probabilities(logits_BV: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """softmax(logits / temperature) over the `top_k` largest logits, BV; at temperature 0, 1 for the largest.

    Logits equal to the k-th largest all count as among them.
    """
    if temperature < 1e-6:  # practically greedy
        return F.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).to(logits_BV.dtype)
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature  # no overflow at small temperatures
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(top_k, dim=-1).values[..., -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -math.inf)
    return scaled_BV.softmax(-1)


def prompt_generators(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """A random generator for each prompt.

    It is seeded by (seed, prompt, how often the same prompt came before), so a sample does not depend on the batch.
    """
    num_seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompts):
        digest = hashlib.sha256(f"{seed}/{num_seen[prompt]}/{prompt}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63))
        num_seen[prompt] += 1
    return generators


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    end_of_text: int,
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> tuple[list[list[int]], list[float]]:
    """New token ids for each prompt, and the summed loss in nats of each prompt's tokens after its first.

    No prompt may be empty. A sequence ends at end-of-text (which is not returned), after `max_new_tokens`, or when it
    fills the model's n_positions.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    ids_BT = torch.tensor([[end_of_text] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    max_new_tokens = min(max_new_tokens, model.n_positions - min(map(len, prompts)))
    max_seq_len = longest + max_new_tokens
    attention_mask_BS = torch.arange(max_seq_len)[None, :] >= (longest - lengths_B)[:, None]
    cache = KVCache(len(prompts), max_seq_len)
    logits_BTV = model(ids_BT.to(device), attention_mask_BS[:, :longest].to(device), cache=cache).float().cpu()
    losses = [
        float(
            F.cross_entropy(logits_TV[-len(prompt) : -1], torch.tensor(prompt[1:], dtype=torch.int64), reduction="sum")
        )
        for logits_TV, prompt in zip(logits_BTV, prompts, strict=True)
    ]
    new_ids: list[list[int]] = [[] for _ in prompts]
    running_B = lengths_B < model.n_positions
    logits_BV = logits_BTV[:, -1]
    for position in range(max_new_tokens):
        probabilities_BV = next_token_probabilities(logits_BV, sampling.temperature, sampling.top_k)
        next_ids_B = torch.full((len(prompts),), end_of_text)
        for row in running_B.nonzero().flatten().tolist():
            token = int(torch.multinomial(probabilities_BV[row], 1, generator=generators[row]))
            next_ids_B[row] = token
            if token != end_of_text:
                new_ids[row].append(token)
        running_B &= (next_ids_B != end_of_text) & (lengths_B + position + 1 < model.n_positions)
        if not running_B.any() or position == max_new_tokens - 1:
            break
        attention_mask_BS[:, longest + position] = running_B  # a finished sequence receives padding from here on
        mask_BS = attention_mask_BS[:, : longest + position + 1].to(device)
        logits_BV = model(next_ids_B[:, None].to(device), mask_BS, cache=cache)[:, -1].float().cpu()
    return new_ids, losses


def read_prefixes(path: Path) -> list[str]:
    """The `prefix` of each line of a JSON-lines file. Raises DataError with the line's number."""
    try:
        if path.is_char_device() or path.is_block_device():  # reading some of them never ends
            raise DataError(f"{path}: got a device, expected JSON lines; give a file")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f'{path}: cannot read: {error.strerror}; give a file with {{"prefix": "text"}} on each line'
        ) from None
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
            raise DataError(f'{path}:{number}: got {line[:60]!r}, expected {{"prefix": "text"}}; fix this line')
        prefixes.append(prefix)
    if not prefixes:
        raise DataError(f'{path}: has no lines, expected {{"prefix": "text"}} on each; give at least one')
    return prefixes


def encode_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, n_positions: int, mask_documents: bool
) -> list[list[int]]:
    """Prompts as token ids. Raises ConfigError for one that is too long.

    A document begins with end-of-text. An empty prompt therefore becomes this token, and with `mask_documents` (as the
    model was trained) every prompt begins with it.
    """
    start = [tokenizer.end_of_text]
    prompts = [(start if mask_documents else []) + tokenizer.encode(text) or start for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= n_positions:
            raise ConfigError(
                f"prompt {text[:30]!r}...: has {len(prompt)} tokens, expected at most {n_positions - 1} "
                f"(the model reads {n_positions}); shorten it"
            )
    return prompts


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with its numbers and output path checked. Raises ConfigError."""
    parser = ArgumentParser(prog="python -m distgpt.generate", description=main.__doc__)
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN",
        help="a finished run, such as outputs/GPT-tiny, or a checkpoint",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    source.add_argument("--prefixes", type=path_argument, metavar="FILE", help='JSON lines of {"prefix": ...}')
    output_help = "where --prefixes writes (default: RUN/generation.jsonl)"
    parser.add_argument("--output", type=path_argument, metavar="FILE", help=output_help)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="maximum to add (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="prompts per batch (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    options = parser.parse_args(arguments)
    minima = {"max_new_tokens": 1, "top_k": 1, "batch_size": 1, "temperature": 0, "seed": 0}
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None and not (minimum <= value < math.inf):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: got {value}, expected a number of at least {minimum}; change it")
    if options.output is not None:
        _check_output(Path(options.output), options.prompt is not None)
    return options


def _check_output(output: Path, has_prompt: bool) -> None:
    """Raise ConfigError for a path that cannot be written, before anything is generated."""
    if has_prompt:
        raise ConfigError(f"--output: got {output} with --prompt, which prints; remove it or use --prefixes")
    if not output.parent.is_dir():
        raise ConfigError(
            f"--output: got {output}, but {output.parent} is not a folder; create it or choose another file"
        )
    if output.exists() and not output.is_file():
        raise ConfigError(f"--output: got {output}, a folder or device, expected a file; choose another")


def main(arguments: Sequence[str]) -> None:
    """Continue prompts with a trained model."""
    options = parse_arguments(arguments)
    run = Path(options.run)
    texts = options.prompt or read_prefixes(Path(options.prefixes))
    model, tokenizer, config = load_model(run)
    prompts = encode_prompts(texts, tokenizer, model.n_positions, config.mask_documents)
    model.to(resolve_device(options.device, 0, 1))
    sampling = Sampling(options.temperature, options.top_k)
    generators = prompt_generators(prompts, options.seed)
    generations: list[str] = []
    loss = 0.0
    for first in range(0, len(prompts), options.batch_size):
        batch = slice(first, first + options.batch_size)
        new_ids, losses = generate(
            model, prompts[batch], tokenizer.end_of_text, options.max_new_tokens, sampling, generators[batch]
        )
        generations += [tokenizer.decode(ids) for ids in new_ids]
        loss += sum(losses)
    if options.prompt:
        print("\n\n".join(text + generation for text, generation in zip(texts, generations, strict=True)))
    else:
        _write_generations(Path(options.output or run / "generation.jsonl"), texts, generations)
    num_predicted = sum(len(prompt) - 1 for prompt in prompts)
    if num_predicted:
        perplexity = math.exp(loss / num_predicted)
        print(f"perplexity of the prefixes: {perplexity:.2f} ({num_predicted} tokens)", file=sys.stderr)


def _write_generations(output: Path, texts: Sequence[str], generations: Sequence[str]) -> None:
    """Write a JSON line for each prompt. Raises ConfigError."""
    rows = [{"prefix": text, "generation": generation} for text, generation in zip(texts, generations, strict=True)]
    try:
        write_bytes(output, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error.strerror}; choose another file") from None
    print(f"{len(rows)} generations written to {output}")


if __name__ == "__main__":
    exit_process(run_command(main))
