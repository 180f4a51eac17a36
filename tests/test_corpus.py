"""The sample corpus is made once, from this machine, and the same each time; other tokens are used as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distgpt import config as configs
from distgpt import corpus as corpora
from distgpt.config import Config
from distgpt.corpus import make_sample_corpus, open_corpus, sample_corpus_path, sample_texts
from distgpt.errors import DataError
from distgpt.shards import open_tokens
from distgpt.tokenizer import load_tokenizer
from tests.conftest import REPO


def load(*overrides: str) -> Config:
    return configs.load(REPO / "configs" / "GPT-tiny.yaml", overrides)


@pytest.fixture
def short_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder and a standard library of 60 files."""
    texts = sample_texts()[:60]
    monkeypatch.setattr(corpora, "sample_texts", lambda: texts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_file_the_sample_corpus_is_made_once_and_said(short_library: Path) -> None:
    tokenizer, config = load_tokenizer("gpt2"), load()
    tokens = open_corpus(config, tokenizer)
    assert tokens.path == sample_corpus_path(tokenizer)
    assert tokens.note is not None and "no data/tokens.npz" in tokens.note
    written = tokens.path.stat().st_mtime_ns
    assert open_corpus(config, tokenizer).path.stat().st_mtime_ns == written
    assert list((short_library / "data").iterdir()) == [short_library / tokens.path]


def test_the_sample_corpus_is_the_librarys_text_split_by_file(short_library: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    make_sample_corpus(Path("a.npz"), tokenizer)
    make_sample_corpus(Path("b.npz"), tokenizer)
    assert open_tokens("a.npz")["train"].fingerprint == open_tokens("b.npz")["train"].fingerprint
    arrays = open_tokens("a.npz")
    found = {}
    for name, array in arrays.items():
        ids = array.read(0, len(array), tokenizer.n_vocab)
        assert ids[-1] == tokenizer.end_of_text
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
        found[name] = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert sorted(found["train"] + found["val"]) == sorted(corpora.sample_texts())
    assert len(found["val"]) == 3


def test_the_library_has_enough_text_and_none_twice() -> None:
    texts = sample_texts()
    assert sum(map(len, texts)) > 5_000_000
    assert len(set(texts)) == len(texts)
    assert texts == sample_texts()


def test_tokens_npz_is_used_where_it_exists(short_library: Path) -> None:
    (short_library / "data").mkdir()
    np.savez(short_library / "data" / "tokens.npz", train=np.arange(9000), val=np.arange(90))
    tokens = open_corpus(load(), load_tokenizer("gpt2"))
    assert tokens.path == Path("data/tokens.npz") and tokens.note is None


def test_a_file_that_was_asked_for_is_never_replaced_by_the_sample(short_library: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npz: cannot read"):
        open_corpus(load("data=nowhere.npz"), load_tokenizer("gpt2"))
    assert not (short_library / "data").exists()


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"train": np.arange(9000)}, "has arrays train, expected train and val; add val"),
        ({"val": np.arange(9000)}, "add train"),
        ({}, "has arrays none"),
        ({"train": np.arange(9000), "val": np.arange(1)}, "val has 1 tokens, expected at least 2"),
        ({"train": np.arange(0), "val": np.arange(9)}, "train has 0 tokens"),
        ({"train": np.arange(32 * 128), "val": np.arange(9)}, "train has 4,096 tokens, expected at least 4,097"),
        ({"train": np.arange(9000) * 7, "val": np.arange(9)}, r"train\[7180\] is token 50260, expected 0 to 50256"),
    ],
)
def test_tokens_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], expected: str
) -> None:
    np.savez(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=expected):
        open_corpus(load(f"data={tmp_path / 't.npz'}"), load_tokenizer("gpt2"))


def test_exactly_one_batch_is_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", train=np.arange(32 * 128 + 1), val=np.arange(9))
    open_corpus(load(f"data={tmp_path / 't.npz'}"), load_tokenizer("gpt2"))
