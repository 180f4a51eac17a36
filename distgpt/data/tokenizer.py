"""Text to token ids and back.

A tokenizer is a byte-level BPE of tiktoken. Its vocabulary file (.tiktoken) has one line per token, `base64(token) id`;
the order of ids is the order in which BPE merges.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import json
import lzma
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from distgpt import atomic_io
from distgpt.errors import CheckpointError, ConfigError, RuntimeEnvironmentError

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Of the embedded vocabulary file. tiktoken pins the same hash for it."""

MAX_IDS, MAX_VOCAB_FILE_BYTES = 2**24, 2**26
"""Larger vocabularies and files are treated as damaged. The largest known has 201,088 ids in 3.6 MB."""

VOCAB_FILE, DETAILS_FILE = "ranks.tiktoken", "tokenizer.json"
"""What `Tokenizer.save` writes."""


class Tokenizer:
    """A byte-pair encoding with ids 0 .. n_vocab - 1. The id `end_of_text` separates texts."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.n_vocab: int = encoding.n_vocab
        self.end_of_text: int = encoding.eot_token

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines how texts are encoded."""
        vocab = sorted((token_id, token.hex()) for token, token_id in self.encoding._mergeable_ranks.items())
        parts = (self.encoding._pat_str, vocab, sorted(self.encoding._special_tokens.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens spelled out in it are encoded as plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 become the replacement character."""
        return self.encoding.decode(ids)

    def bytes_per_token(self) -> np.ndarray:
        """Number of bytes of text that each id stands for, V; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.n_vocab, dtype=np.int64)
        for token, token_id in self.encoding._mergeable_ranks.items():
            sizes[token_id] = len(token)
        return sizes

    def save(self, folder: Path) -> None:
        """Write the vocabulary file and a JSON file with the pattern and special tokens, for `load_saved_tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        vocab = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = (base64.b64encode(token) + b" %d\n" % token_id for token, token_id in vocab)
        atomic_io.write_bytes(folder / VOCAB_FILE, b"".join(lines))
        details = {
            "name": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
        }
        atomic_io.write_bytes(folder / DETAILS_FILE, (json.dumps(details, indent=2) + "\n").encode())


def load_tokenizer(encoding: str) -> Tokenizer:
    """The tokenizer that `tokenizer_encoding` names: gpt2 (embedded), bytes, a .tiktoken file, or one of tiktoken's.

    Raises ConfigError for an unknown name or an invalid file, RuntimeEnvironmentError when tiktoken cannot download
    its file.
    """
    if encoding == "gpt2":
        return _build("gpt2", r50k_pat_str, _embedded_vocab(), {})
    if encoding == "bytes":
        return _build("bytes", r"[\s\S]", {bytes([value]): value for value in range(256)}, {})
    if encoding.endswith(".tiktoken"):
        return _from_file(encoding)
    known = tiktoken.list_encoding_names()
    if encoding not in known:
        near = difflib.get_close_matches(encoding, [*known, "bytes"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"tokenizer_encoding: got {encoding!r}, expected bytes, the path of a .tiktoken file, or one of "
            f"{', '.join(known)}{hint}"
        )
    try:
        return Tokenizer(tiktoken.get_encoding(encoding))
    except Exception as error:  # requests.RequestException, OSError, ValueError: whatever made the download fail
        raise RuntimeEnvironmentError(
            f"tokenizer_encoding: {encoding} is not on this machine and its download failed ({type(error).__name__}); "
            "fetch it once with a network (TIKTOKEN_CACHE_DIR names the folder to copy), or use gpt2, which needs none"
        ) from None


def load_saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `folder`. Raises CheckpointError."""
    try:
        details = json.loads((folder / DETAILS_FILE).read_text(encoding="utf-8"))
        vocab = _parse_vocab((folder / VOCAB_FILE).read_bytes())
        return _build(details["name"], details["pattern"], vocab, details["special_tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: no readable tokenizer ({error}); train again or restore the folder") from None


def _build(name: str, pattern: str, vocab: dict[bytes, int], special: dict[str, int]) -> Tokenizer:
    """A tokenizer from its parts. Without special tokens, end-of-text takes the next free id. Raises ValueError.

    All checks come before tiktoken, whose Rust code panics on two tokens with the same id.
    """
    missing = [value for value in range(256) if bytes([value]) not in vocab]
    if missing:
        raise ValueError(f"no token for byte {missing[0]} (and {len(missing) - 1} others): some texts have no encoding")
    if not all(isinstance(text, str) and isinstance(value, int) and value >= 0 for text, value in special.items()):
        raise ValueError(f"special tokens {special}, expected texts with ids")
    special = special or {ENDOFTEXT: max(vocab.values()) + 1}
    if ENDOFTEXT not in special:
        raise ValueError(f"special tokens {', '.join(special)}, expected {ENDOFTEXT} among them")
    ids = sorted([*vocab.values(), *special.values()])
    if not 0 <= ids[0] <= ids[-1] < MAX_IDS:
        raise ValueError(f"ids from {ids[0]} to {ids[-1]}, expected at least 0 and at most {MAX_IDS - 1}")
    if duplicates := [token_id for token_id, next_id in pairwise(ids) if token_id == next_id]:
        raise ValueError(f"two tokens with id {duplicates[0]}, expected a different id for each")
    return Tokenizer(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=vocab, special_tokens=special))


def _embedded_vocab() -> dict[bytes, int]:
    """GPT-2's vocabulary, which is part of the package. Its hash is verified."""
    packed = resources.files("distgpt").joinpath("assets/gpt2.tiktoken.xz").read_bytes()
    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != GPT2_SHA256:
        raise RuntimeEnvironmentError("distgpt/assets/gpt2.tiktoken.xz is damaged (sha256 differs); reinstall distgpt")
    return _parse_vocab(raw)


def _from_file(path: str) -> Tokenizer:
    """The tokenizer of a .tiktoken vocabulary file. Raises ConfigError."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("a folder or device")
        with Path(path).open("rb") as file:
            raw = file.read(MAX_VOCAB_FILE_BYTES + 1)
        if len(raw) > MAX_VOCAB_FILE_BYTES:
            raise ValueError(f"more than {MAX_VOCAB_FILE_BYTES:,} bytes, larger than any known vocabulary file")
        vocab = _parse_vocab(raw)
        if set(vocab.values()) != set(range(len(vocab))):
            raise ValueError(f"the ids of its {len(vocab)} tokens are not 0, 1, 2, ...")
        return _build(Path(path).stem, r50k_pat_str, vocab, {})
    except OSError as error:
        raise ConfigError(f"tokenizer_encoding: cannot read {path}: {error.strerror}; give a .tiktoken file") from None
    except ValueError as error:
        raise ConfigError(f"tokenizer_encoding: {path}: {error}; give a complete .tiktoken file") from None


def _parse_vocab(raw: bytes) -> dict[bytes, int]:
    """The tokens and ids of a vocabulary file. Raises ValueError naming the first invalid line."""
    vocab: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, token_id = line.split()
            vocab[base64.b64decode(token, validate=True)] = int(token_id)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number}: got {line[:40]!r}, expected `base64 id`") from None
    return vocab
