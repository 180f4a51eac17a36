"""Text to token ids and back."""

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

from distgpt import durable
from distgpt.errors import CheckpointError, ConfigError, MachineError

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Of the embedded rank file; the hash that tiktoken pins for the same file."""

MOST_IDS, MOST_BYTES = 2**24, 2**26
"""Larger vocabularies and rank files are taken for damage; the largest known has 201,088 ids in 3.6 MB."""

RANKS_FILE, DETAILS_FILE = "ranks.tiktoken", "tokenizer.json"


class Tokenizer:
    """A byte-pair encoding: ids 0 .. n_vocab - 1, one of which ends a text."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.n_vocab: int = encoding.n_vocab
        self.end_of_text: int = encoding.eot_token

    @property
    def fingerprint(self) -> str:
        """Changes when any text could be encoded otherwise."""
        ranks = sorted((rank, token.hex()) for token, rank in self.encoding._mergeable_ranks.items())
        parts = (self.encoding._pat_str, ranks, sorted(self.encoding._special_tokens.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it are read as plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become the replacement character."""
        return self.encoding.decode(ids)

    def bytes_per_token(self) -> np.ndarray:
        """How many bytes of text each id stands for, V; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.n_vocab, dtype=np.int64)
        for token, rank in self.encoding._mergeable_ranks.items():
            sizes[rank] = len(token)
        return sizes

    def save(self, folder: Path) -> None:
        """Write what `load_saved` reads: the rank file and a JSON file with the pattern and special tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
        durable.replace(folder / RANKS_FILE, b"".join(lines))
        details = {
            "name": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
        }
        durable.replace(folder / DETAILS_FILE, (json.dumps(details, indent=2) + "\n").encode())


def load_tokenizer(encoding: str) -> Tokenizer:
    """The tokenizer that `tokenizer_encoding` names: gpt2 (embedded), bytes, a .tiktoken file, or one of tiktoken's.

    Raises ConfigError for a name or file that is none, MachineError when tiktoken cannot download its file.
    """
    if encoding == "gpt2":
        return build("gpt2", r50k_pat_str, embedded_ranks(), {})
    if encoding == "bytes":
        return build("bytes", r"[\s\S]", {bytes([value]): value for value in range(256)}, {})
    if encoding.endswith(".tiktoken"):
        return from_file(encoding)
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
    except Exception as error:  # requests, OSError, ValueError: whatever the download failed with
        raise MachineError(
            f"tokenizer_encoding: {encoding} is not on this machine and its download failed ({type(error).__name__}); "
            "fetch it once with a network (TIKTOKEN_CACHE_DIR names the folder to copy), or use gpt2, which needs none"
        ) from None


def load_saved(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, as `Tokenizer.save` wrote it. Raises CheckpointError."""
    try:
        details = json.loads((folder / DETAILS_FILE).read_text(encoding="utf-8"))
        ranks = parse_ranks((folder / RANKS_FILE).read_bytes())
        return build(details["name"], details["pattern"], ranks, details["special_tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: no readable tokenizer ({error}); train again or restore the folder") from None


def build(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> Tokenizer:
    """A tokenizer from its parts; without special tokens, end-of-text takes the next free id. Raises ValueError.

    What tiktoken would not survive is found before: its Rust code panics over two tokens of one id.
    """
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ValueError(f"no token for byte {missing[0]} (and {len(missing) - 1} others): some texts have no encoding")
    if not all(isinstance(token, str) and isinstance(rank, int) and rank >= 0 for token, rank in special.items()):
        raise ValueError(f"special tokens {special}, expected texts with ids")
    special = special or {ENDOFTEXT: max(ranks.values()) + 1}
    if ENDOFTEXT not in special:
        raise ValueError(f"special tokens {', '.join(special)}, expected {ENDOFTEXT} among them")
    ids = sorted([*ranks.values(), *special.values()])
    if not 0 <= ids[0] <= ids[-1] < MOST_IDS:
        raise ValueError(f"ids from {ids[0]} to {ids[-1]}, expected 0 to {MOST_IDS - 1} at most")
    if twice := [one for one, other in pairwise(ids) if one == other]:
        raise ValueError(f"two tokens with id {twice[0]}, expected an id for each")
    return Tokenizer(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def embedded_ranks() -> dict[bytes, int]:
    """GPT-2's ranks, which travel with the package; their hash is verified."""
    packed = resources.files("distgpt").joinpath("assets/gpt2.tiktoken.xz").read_bytes()
    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != GPT2_SHA256:
        raise MachineError("distgpt/assets/gpt2.tiktoken.xz is damaged (sha256 differs); reinstall distgpt")
    return parse_ranks(raw)


def from_file(path: str) -> Tokenizer:
    """The tokenizer whose ranks a .tiktoken file holds; raises ConfigError naming what is wrong."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("a folder or device")
        with Path(path).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes, which no rank file is")
        ranks = parse_ranks(raw)
        if set(ranks.values()) != set(range(len(ranks))):
            raise ValueError(f"the ranks of its {len(ranks)} tokens are not 0, 1, 2, ...")
        return build(Path(path).stem, r50k_pat_str, ranks, {})
    except OSError as error:
        raise ConfigError(f"tokenizer_encoding: cannot read {path}: {error.strerror}; give a .tiktoken file") from None
    except ValueError as error:
        raise ConfigError(f"tokenizer_encoding: {path}: {error}; give a whole .tiktoken file") from None


def parse_ranks(raw: bytes) -> dict[bytes, int]:
    """Lines of `base64(token) rank` to a dict; raises ValueError naming the first line that is not one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number}: got {line[:40]!r}, expected `base64 rank`") from None
    return ranks
