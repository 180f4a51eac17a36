"""Text survives a round trip through each tokenizer, and invalid vocabulary files are refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from distgpt.data.tokenizer import VOCAB_FILE, load_saved_tokenizer, load_tokenizer
from distgpt.errors import CheckpointError, ConfigError

TEXTS = ["def main():\n    return 'caf\u00e9'", "\u2603 \U0001f600 <|endoftext|>", "", " \t\n"]


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip_and_byte_counts_add_up(encoding: str, text: str) -> None:
    tokenizer = load_tokenizer(encoding)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids  # spelled out in a text, it is plain text


def test_gpt2_needs_no_network_and_gives_the_published_ids() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (50257, 50256)
    # Published in OpenAI's tiktoken README and the GPT-2 paper's examples.
    assert tokenizer.encode("hello world") == [31373, 995]


def test_bytes_encoding_gives_the_byte_values() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("A\u00e9") == [65, 0xC3, 0xA9]
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (257, 256)


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
def test_saved_tokenizer_encodes_identically(tmp_path: Path, encoding: str) -> None:
    tokenizer = load_tokenizer(encoding)
    tokenizer.save(tmp_path)
    loaded = load_saved_tokenizer(tmp_path)
    assert (loaded.n_vocab, loaded.end_of_text) == (tokenizer.n_vocab, tokenizer.end_of_text)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.fingerprint == tokenizer.fingerprint


def test_damaged_saved_tokenizer_is_refused(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path)
    (tmp_path / VOCAB_FILE).write_text("no ids")
    with pytest.raises(CheckpointError, match="line 1"):
        load_saved_tokenizer(tmp_path)


def test_saved_files_keep_their_names(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]


def test_fingerprints_are_those_in_existing_checkpoints() -> None:
    assert load_tokenizer("gpt2").fingerprint == "13c74cf72afe"
    assert load_tokenizer("bytes").fingerprint == "f0f09ac49366"


def test_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean gpt2"):
        load_tokenizer("gtp2")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no token for byte 0"),
        (b"AA== 0\nnonsense\n", "line 2"),
        (b"AA== 0\nAQ== 2\n", "not 0, 1, 2"),
        (b"AA== 0\nAQ== 1\n", r"no token for byte 2 \(and 253 others\)"),
    ],
)
def test_invalid_vocabulary_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "custom.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_tokenizer(str(path))


def test_custom_vocabulary_file_is_read(tmp_path: Path) -> None:
    tokens = [*(bytes([value]) for value in range(256)), b"th", b"the"]
    path = tmp_path / "custom.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % token_id for token_id, token in enumerate(tokens)))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("the") == [257]
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (259, 258)
