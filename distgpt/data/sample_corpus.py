"""A small corpus for first runs without a token file: the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distgpt.data.numpy_files import write_npz
from distgpt.data.token_array import smallest_dtype
from distgpt.data.tokenizer import Tokenizer
from distgpt.errors import RuntimeEnvironmentError

VAL_EVERY = 20
"""One source file in this many is held out for validation."""

_FOLDER = Path("data")
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def sample_corpus_path(tokenizer: Tokenizer) -> Path:
    """Where the sample corpus of this version of Python is stored in this encoding."""
    name = tokenizer.encoding.name
    if name not in ("gpt2", "bytes"):
        name = tokenizer.fingerprint  # .tiktoken files of the same name may differ
    python = ".".join(map(str, sys.version_info[:3]))
    return _FOLDER / f"sample-py{python}-{name}.npz"


def make_sample_corpus(path: Path, tokenizer: Tokenizer) -> None:
    """Encode the standard library's source and write the arrays train and val.

    Raises RuntimeEnvironmentError where there is too little source or the file cannot be written.
    """
    texts = sample_texts()
    if len(texts) < 2 * VAL_EVERY:
        raise RuntimeEnvironmentError(
            f"found {len(texts)} source files in Python's standard library, too few for a sample corpus; "
            "set data to an .npz file with arrays train and val"
        )
    splits: dict[str, list[int]] = {"train": [], "val": []}
    with tqdm(texts, desc=f"making {path}", unit=" files", leave=False, disable=None) as progress:
        for number, text in enumerate(progress):
            split = splits["val" if number % VAL_EVERY == VAL_EVERY - 1 else "train"]
            split.extend(tokenizer.encode(text))
            split.append(tokenizer.end_of_text)
    dtype = smallest_dtype(tokenizer.n_vocab)
    try:
        write_npz(path, {name: np.array(ids, dtype=dtype) for name, ids in splits.items()})
    except OSError as error:
        raise RuntimeEnvironmentError(
            f"{path}: cannot write the sample corpus: {error.strerror}; set data to a token file"
        ) from None


def sample_texts() -> list[str]:
    """Distinct .py files of the standard library without its tests, in an order that depends on their content alone."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for file in root.rglob("*.py"):
        if _EXCLUDED_FOLDERS & set(file.relative_to(root).parts[:-1]):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    return [text for _, text in sorted(texts.items())]
