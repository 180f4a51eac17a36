"""The sample corpus is made once and deterministically; a run's own tokens are checked and used unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distgpt.config.loader import load_config
from distgpt.config.schema import Config
from distgpt.data import sample_corpus
from distgpt.data.dataset import MAX_SAMPLE_EPOCHS, num_windows, open_dataset
from distgpt.data.sample_corpus import make_sample_corpus, sample_corpus_path, sample_texts
from distgpt.data.token_files import open_token_file
from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import DataError
from tests.conftest import REPO, Run


def load(*overrides: str) -> Config:
    return load_config(REPO / "configs" / "GPT-tiny.yaml", ["num_training_steps=20", *overrides])


@pytest.fixture
def short_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder and a standard library of 60 files."""
    texts = sample_texts()[:60]
    monkeypatch.setattr(sample_corpus, "sample_texts", lambda: texts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_token_file_the_sample_corpus_is_made_once_and_noted(short_library: Path) -> None:
    tokenizer, config = load_tokenizer("gpt2"), load()
    dataset = open_dataset(config, tokenizer)
    assert dataset.path == sample_corpus_path(tokenizer)
    assert dataset.note is not None and "no data/tokens.npz" in dataset.note
    mtime = dataset.path.stat().st_mtime_ns
    assert open_dataset(config, tokenizer).path.stat().st_mtime_ns == mtime
    assert list((short_library / "data").iterdir()) == [short_library / dataset.path]


def test_sample_corpus_is_the_librarys_text_split_by_file(short_library: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    make_sample_corpus(Path("a.npz"), tokenizer)
    make_sample_corpus(Path("b.npz"), tokenizer)
    assert open_token_file("a.npz")["train"].fingerprint == open_token_file("b.npz")["train"].fingerprint
    texts = {}
    for name, array in open_token_file("a.npz").items():
        ids = array.read(0, len(array), tokenizer.n_vocab)
        assert ids[-1] == tokenizer.end_of_text
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
        texts[name] = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert sorted(texts["train"] + texts["val"]) == sorted(sample_corpus.sample_texts())
    assert len(texts["val"]) == 3


def test_sample_texts_are_large_and_distinct() -> None:
    texts = sample_texts()
    assert sum(map(len, texts)) > 5_000_000
    assert len(set(texts)) == len(texts)
    assert texts == sample_texts()


def test_tokens_npz_is_used_where_it_exists(short_library: Path) -> None:
    (short_library / "data").mkdir()
    np.savez(short_library / "data" / "tokens.npz", train=np.arange(9000), val=np.arange(90))
    dataset = open_dataset(load(), load_tokenizer("gpt2"))
    assert dataset.path == Path("data/tokens.npz") and dataset.note is None


def test_missing_data_file_is_never_replaced_by_the_sample_corpus(short_library: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npz: cannot read"):
        open_dataset(load("data=nowhere.npz"), load_tokenizer("gpt2"))
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
        open_dataset(load(f"data={tmp_path / 't.npz'}"), load_tokenizer("gpt2"))


def test_tokens_for_exactly_one_step_are_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", train=np.arange(32 * 128 + 1), val=np.arange(9))
    open_dataset(load(f"data={tmp_path / 't.npz'}"), load_tokenizer("gpt2"))


def test_evaluation_needs_no_tokens_to_train_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", train=np.arange(9), val=np.arange(9))
    config, tokenizer = load(f"data={tmp_path / 't.npz'}"), load_tokenizer("gpt2")
    assert len(open_dataset(config, tokenizer, for_training=False).val) == 9
    with pytest.raises(DataError, match="train has 9 tokens, expected at least 4,097"):
        open_dataset(config, tokenizer)


def test_num_windows_leaves_a_target_for_the_last_token() -> None:
    assert [num_windows(num_tokens, 8) for num_tokens in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]


def test_more_than_ten_epochs_over_the_sample_corpus_are_refused(short_library: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    num_tokens = len(open_dataset(load(), tokenizer).train)
    max_steps = MAX_SAMPLE_EPOCHS * num_tokens // load().tokens_per_step
    open_dataset(load(f"num_training_steps={max_steps}"), tokenizer)
    too_long = load(f"num_training_steps={max_steps + 1}")
    with pytest.raises(DataError) as error:
        open_dataset(too_long, tokenizer)
    assert str(error.value).startswith(f"data: not set, and {max_steps + 1:,} steps of 4,096 tokens would be 10.")
    assert f"epochs of the sample corpus ({num_tokens:,} tokens), expected at most 10; set data to a token file" in str(
        error.value
    )
    assert open_dataset(too_long, tokenizer, for_training=False).note is not None  # its model can be evaluated


def test_tokens_that_the_user_chose_may_be_repeated_without_limit(short_library: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    sample = open_dataset(load(), tokenizer).path
    open_dataset(load("num_training_steps=1000000", f"data={sample}"), tokenizer)
    np.savez("data/tokens.npz", train=np.arange(9000), val=np.arange(90))
    open_dataset(load("num_training_steps=1000000"), tokenizer)


def test_too_many_sample_epochs_are_refused_before_the_first_step(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / sample_corpus_path(load_tokenizer("bytes"))
    np.savez(path, train=np.zeros(40_960, dtype=np.uint16), val=np.zeros(99, dtype=np.uint16))
    config = REPO / "configs" / "GPT-tiny.yaml"
    for command in ("check", "train"):
        done = run(command, config, "tokenizer_encoding=bytes", "num_training_steps=101", "device=cpu")
        assert done.returncode == 3, done.stderr
        assert done.stderr == (
            "distgpt: error: data: not set, and 101 steps of 4,096 tokens would be 10.1 epochs of the sample corpus "
            f"(40,960 tokens), expected at most 10; set data to a token file (data={path.relative_to(tmp_path)} trains "
            "on the sample corpus anyway)\n"
        )
    assert not (tmp_path / "outputs").exists()
