"""The tokens of a run: the token file that `data` names or, without one, the sample corpus."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distgpt.config.schema import Config
from distgpt.data.sample_corpus import make_sample_corpus, sample_corpus_path
from distgpt.data.token_array import TokenArray
from distgpt.data.token_files import open_token_file
from distgpt.data.tokenizer import Tokenizer
from distgpt.errors import DataError, one_line

DEFAULT_DATA = Path("data/tokens.npz")
"""Used where `data` is not set and this file exists."""

MAX_TOKENS_CHECKED_AT_START = 2**26
"""Tokens whose ids are checked before the first step. Every sequence is checked again when it is read."""

MAX_SAMPLE_EPOCHS = 10
"""A longer run over the sample corpus is refused unless `data` names the corpus: its `data` was probably forgotten."""


@dataclass(frozen=True)
class TokenWindows:
    """The training sequences of a token array, as a map-style dataset: item i has tokens i T to (i + 1) T inclusive.

    The last token of an item is the target of the one before it, and the first token of the next item.
    """

    tokens: TokenArray
    seq_len: int
    n_vocab: int

    def __len__(self) -> int:
        return num_windows(len(self.tokens), self.seq_len)

    def __getitem__(self, index: int) -> np.ndarray:
        """The T + 1 token ids of a window (int64)."""
        start = index * self.seq_len
        return self.tokens.read(start, start + self.seq_len + 1, self.n_vocab)


@dataclass(frozen=True)
class Dataset:
    """The tokens that a run trains on and those that it is validated on."""

    path: Path
    train: TokenArray
    val: TokenArray
    note: str | None
    """What the user should know about the origin of the tokens."""

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens. A run resumes only with those that it was started with."""
        return f"{self.train.fingerprint}/{self.val.fingerprint}"

    def train_windows(self, seq_len: int, n_vocab: int) -> TokenWindows:
        """The training sequences. Anything with their `len`, `[i]` and `seq_len` can be trained on."""
        return TokenWindows(self.train, seq_len, n_vocab)


def open_dataset(config: Config, tokenizer: Tokenizer, for_training: bool = True) -> Dataset:
    """Open and check the run's tokens. Makes the sample corpus first where it is needed and does not exist.

    `for_training` also requires enough training tokens for the run. With several ranks, rank 0 makes the sample corpus
    while the others wait: call this through `DistributedContext.rank0_first`. Raises DataError.
    """
    note = None
    if config.data is not None or DEFAULT_DATA.exists():
        path = Path(config.data or DEFAULT_DATA)
    else:
        path = sample_corpus_path(tokenizer)
        note = f"no {DEFAULT_DATA}: training on {path}, made from the source of Python {sys.version.split()[0]}"
        if not path.exists():
            make_sample_corpus(path, tokenizer)
    arrays = open_token_file(path)
    for name in ("train", "val"):
        if name not in arrays:
            raise DataError(
                f"{path}: has arrays {one_line(', '.join(sorted(arrays)[:9])) or 'none'}, expected train and val; "
                f"add {name}"
            )
        if len(arrays[name]) < 2:
            raise DataError(
                f"{path}: {name} has {len(arrays[name])} tokens, expected at least 2; create the tokens again"
            )
    dataset = Dataset(path, arrays["train"], arrays["val"], note)
    for array in (dataset.train, dataset.val):
        array.check_ids(tokenizer.n_vocab, MAX_TOKENS_CHECKED_AT_START)
        if len(array) <= MAX_TOKENS_CHECKED_AT_START:
            array.check_crc()
    if for_training:
        _check_num_tokens(config, dataset, is_sample=note is not None)
    return dataset


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Training sequences in a token array: seq_len tokens each, and one more token as the target of the last."""
    return max(0, num_tokens - 1) // seq_len


def _check_num_tokens(config: Config, dataset: Dataset, is_sample: bool) -> None:
    """Raise DataError where one step needs more tokens than there are, or a run repeats the sample corpus too often."""
    num_tokens = len(dataset.train)
    epochs = config.num_training_steps * config.tokens_per_step / num_tokens
    if is_sample and epochs > MAX_SAMPLE_EPOCHS:
        raise DataError(
            f"data: not set, and {config.num_training_steps:,} steps of {config.tokens_per_step:,} tokens would be "
            f"{epochs:,.1f} epochs of the sample corpus ({num_tokens:,} tokens), expected at most {MAX_SAMPLE_EPOCHS}; "
            f"set data to a token file (data={dataset.path} trains on the sample corpus anyway)"
        )
    if num_windows(num_tokens, config.seq_len) < config.sequences_per_step:
        raise DataError(
            f"{dataset.path}: train has {num_tokens:,} tokens, expected at least {config.tokens_per_step + 1:,} "
            f"({config.sequences_per_step} sequences of seq_len {config.seq_len} in one step); "
            "give more tokens, or lower seq_len or the global batch size"
        )
