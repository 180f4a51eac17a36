"""Text survives encoding, and every wrong rank file is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from distgpt.errors import CheckpointError, ConfigError
from distgpt.tokenizer import load_saved, load_tokenizer

TEXTS = ["def main():\n    return 'caf\u00e9'", "\u2603 \U0001f600 <|endoftext|>", "", " \t\n"]


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_byte_counts_add_up(encoding: str, text: str) -> None:
    tokenizer = load_tokenizer(encoding)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids  # written out in a text, it is text


def test_gpt2_is_gpt2_without_a_network() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (50257, 50256)
    # Published in OpenAI's tiktoken README and the GPT-2 paper's examples.
    assert tokenizer.encode("hello world") == [31373, 995]


def test_bytes_are_themselves() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("A\u00e9") == [65, 0xC3, 0xA9]
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (257, 256)


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path, encoding: str) -> None:
    tokenizer = load_tokenizer(encoding)
    tokenizer.save(tmp_path)
    again = load_saved(tmp_path)
    assert (again.n_vocab, again.end_of_text) == (tokenizer.n_vocab, tokenizer.end_of_text)
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_damaged_saved_tokenizer_is_refused(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path)
    (tmp_path / "ranks.tiktoken").write_text("not ranks")
    with pytest.raises(CheckpointError, match="line 1"):
        load_saved(tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
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
def test_a_wrong_rank_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_tokenizer(str(path))


def test_a_rank_file_of_ones_own_is_read(tmp_path: Path) -> None:
    tokens = [*(bytes([value]) for value in range(256)), b"th", b"the"]
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("the") == [257]
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (259, 258)
