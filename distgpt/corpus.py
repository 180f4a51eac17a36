"""The tokens of a run: the file that `data` names or, without one, a sample corpus from text every machine has."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distgpt.config import Config
from distgpt.errors import DataError, MachineError, one_line
from distgpt.shards import TokenArray, open_tokens, smallest_dtype, write_npz
from distgpt.tokenizer import Tokenizer

DEFAULT_DATA = Path("data/tokens.npz")

ORDER_VERSION = 1
"""Of the order in which `data` reads windows. Checkpoints record it: another order would change every resumed run."""

CHECKED_AT_START = 2**26
"""Tokens whose ids are looked at before the first step; every window is looked at again when it is read."""

VAL_EVERY = 20
"""One source file in this many is held out of the sample corpus for validation."""


@dataclass(frozen=True)
class Tokens:
    """What a run trains on and what it is validated on."""

    path: Path
    train: TokenArray
    val: TokenArray
    note: str | None
    """What the user should know about where the tokens came from."""

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens: a run goes on only with those that it began with."""
        return f"{self.train.fingerprint}/{self.val.fingerprint}"


def open_corpus(config: Config, tokenizer: Tokenizer) -> Tokens:
    """Open and check the run's tokens, making the sample corpus first if it is needed and absent.

    Under several ranks one makes it while the others wait: `World.first_rank_first` calls this.
    """
    note = None
    if config.data is not None or DEFAULT_DATA.exists():
        path = Path(config.data or DEFAULT_DATA)
    else:
        path = sample_corpus_path(tokenizer)
        note = f"no {DEFAULT_DATA}: training on {path}, made from the source of Python {sys.version.split()[0]}"
        if not path.exists():
            make_sample_corpus(path, tokenizer)
    arrays = open_tokens(path)
    for name in ("train", "val"):
        if name not in arrays:
            raise DataError(
                f"{path}: has arrays {one_line(', '.join(sorted(arrays)[:9])) or 'none'}, expected train and val; "
                f"add {name}"
            )
        if len(arrays[name]) < 2:
            raise DataError(
                f"{path}: {name} has {len(arrays[name])} tokens, expected at least 2; make the tokens again"
            )
    tokens = Tokens(path, arrays["train"], arrays["val"], note)
    for array in (tokens.train, tokens.val):
        array.check(tokenizer.n_vocab, CHECKED_AT_START)
        if len(array) <= CHECKED_AT_START:
            array.verify()
    G, T = config.sequences_per_step, config.seq_len
    if window_count(len(tokens.train), T) < G:
        raise DataError(
            f"{path}: train has {len(tokens.train):,} tokens, expected at least {G * T + 1:,} "
            f"({G} sequences of seq_len {T} in one step); give more tokens or lower batch_size or seq_len"
        )
    return tokens


def window_count(tokens: int, seq_len: int) -> int:
    """Training windows in a stream: seq_len tokens each, plus one so that the last has a target."""
    return max(0, tokens - 1) // seq_len


def sample_corpus_path(tokenizer: Tokenizer) -> Path:
    """Where the sample corpus of this Python's library in this encoding is kept."""
    name = tokenizer.encoding.name
    if name not in ("gpt2", "bytes"):
        name = tokenizer.fingerprint  # files of one name may differ
    python = ".".join(map(str, sys.version_info[:3]))
    return DEFAULT_DATA.parent / f"sample-py{python}-{name}.npz"


def make_sample_corpus(path: Path, tokenizer: Tokenizer) -> None:
    """Encode the standard library's own source without its tests, one file in 20 held out."""
    texts = sample_texts()
    if len(texts) < 2 * VAL_EVERY:
        raise MachineError(
            f"found {len(texts)} source files in Python's standard library, too few for a sample corpus; "
            "set data to an .npz file with arrays train and val"
        )
    parts: dict[str, list[int]] = {"train": [], "val": []}
    with tqdm(texts, desc=f"making {path}", unit=" files", leave=False, disable=None) as progress:
        for number, text in enumerate(progress):
            split = parts["val" if number % VAL_EVERY == VAL_EVERY - 1 else "train"]
            split.extend(tokenizer.encode(text))
            split.append(tokenizer.end_of_text)
    dtype = smallest_dtype(tokenizer.n_vocab)
    try:
        write_npz(path, {name: np.array(ids, dtype=dtype) for name, ids in parts.items()})
    except OSError as error:
        raise MachineError(
            f"{path}: cannot write the sample corpus: {error.strerror}; set data to a token file"
        ) from None


def sample_texts() -> list[str]:
    """Distinct .py files of the standard library in an order that depends on their content alone."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for file in root.rglob("*.py"):
        folders = set(file.relative_to(root).parts[:-1])
        if folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    return [text for _, text in sorted(texts.items())]
