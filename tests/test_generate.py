"""A sequence in a batch is continued as it would be alone, and sampling follows the model's probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distgpt.data.tokenizer import load_tokenizer
from distgpt.errors import ConfigError, DataError
from distgpt.generate import (
    Sampling,
    encode_prompts,
    generate,
    next_token_probabilities,
    parse_arguments,
    prompt_generators,
    read_prefixes,
)
from distgpt.models.architectures import GPT2Config
from distgpt.models.language_model import LanguageModel

N_VOCAB = 101
END_OF_TEXT = N_VOCAB - 1
PROMPTS = [[1], [5, 6, 7, 8, 9, 10, 11], [3, 4, 3], [7] * 19, [1]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A small model with large random weights: at initialization all logits are nearly equal."""
    model = GPT2Config(n_embd=24, n_head=3, n_positions=20, n_layer=2).build(N_VOCAB, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def naive_greedy(model: LanguageModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without cache, batch or mask: the model reads the whole sequence again for each token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        if len(ids) >= model.n_positions:
            break
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == END_OF_TEXT:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_decoding_in_a_batch_equals_naive_greedy_decoding(model: LanguageModel) -> None:
    new_ids, _ = generate(model, PROMPTS, END_OF_TEXT, 30, Sampling(temperature=0), prompt_generators(PROMPTS, 0))
    assert new_ids == [naive_greedy(model, prompt, 30) for prompt in PROMPTS]
    assert [len(prompt) + len(ids) for prompt, ids in zip(PROMPTS, new_ids, strict=True)] == [20] * 5  # n_positions


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(2.0, top_k=1)])
def test_a_sample_does_not_depend_on_the_batch(model: LanguageModel, sampling: Sampling) -> None:
    generators = prompt_generators(PROMPTS, 3)
    batched, losses = generate(model, PROMPTS, END_OF_TEXT, 12, sampling, generators)
    for row, prompt in enumerate(PROMPTS[:4]):  # the fifth repeats the first: alone, it would equal the first
        single, loss = generate(model, [prompt], END_OF_TEXT, 12, sampling, prompt_generators([prompt], 3))
        assert single[0] == batched[row]
        assert loss[0] == pytest.approx(losses[row], rel=1e-5, abs=1e-5)


def test_repeated_prompts_get_different_samples(model: LanguageModel) -> None:
    prompts = [[1, 2]] * 2
    new_ids, _ = generate(model, prompts, END_OF_TEXT, 10, Sampling(1.0), prompt_generators(prompts, 0))
    assert new_ids[0] != new_ids[1]


def test_prompt_losses_equal_the_models_cross_entropy(model: LanguageModel) -> None:
    _, losses = generate(model, PROMPTS, END_OF_TEXT, 1, Sampling(0), prompt_generators(PROMPTS, 0))
    for prompt, loss in zip(PROMPTS, losses, strict=True):
        logits = model(torch.tensor([prompt]))[0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(prompt[1:]), reduction="sum") if len(prompt) > 1 else 0.0
        assert loss == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-5)


def test_end_of_text_ends_a_sequence_and_is_not_returned(model: LanguageModel) -> None:
    unlimited = naive_greedy(model, PROMPTS[2], 12)
    end_of_text = next(token for token in unlimited if token != unlimited[0])
    new_ids, _ = generate(model, PROMPTS, end_of_text, 12, Sampling(0), prompt_generators(PROMPTS, 0))
    assert unlimited.index(end_of_text) > 0 and new_ids[2] == unlimited[: unlimited.index(end_of_text)]


def test_probabilities_are_the_softmax_of_the_top_k_logits() -> None:
    probabilities = next_token_probabilities(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 1.0, top_k=3)[0]
    assert probabilities[3] == 0
    expected = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    np.testing.assert_allclose(probabilities[:3], expected, rtol=1e-6)


def test_prefixes_are_read_and_invalid_lines_are_reported_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prefix": "a"}\n\n{"prefix": "\u00e9", "other": 1}\n')
    assert read_prefixes(path) == ["a", "\u00e9"]
    for bad in ("nonsense", '{"prefix": 3}', '{"text": "a"}', "[1]", "3"):
        path.write_text('{"prefix": "a"}\n' + bad + "\n")
        with pytest.raises(DataError, match=r"p\.jsonl:2: got"):
            read_prefixes(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no lines"):
        read_prefixes(path)


def test_too_long_prompts_are_refused_and_empty_prompts_start_a_document() -> None:
    tokenizer = load_tokenizer("bytes")
    assert encode_prompts(["", "ab"], tokenizer, 4, False) == [[256], [97, 98]]
    with pytest.raises(ConfigError, match="has 4 tokens, expected at most 3"):
        encode_prompts(["abcd"], tokenizer, 4, False)


@pytest.mark.parametrize(
    "option",
    ["--temperature=-1", "--temperature=nan", "--top-k=0", "--max-new-tokens=0", "--seed=-1", "--batch-size=0"],
)
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option.split('=', maxsplit=1)[0]}: got"):
        parse_arguments(["run", "--prompt", "x", option])


def test_generations_can_be_read_as_prefixes(tmp_path: Path) -> None:
    row = {"prefix": "\u00e9", "generation": "x"}
    (tmp_path / "g.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prefixes(tmp_path / "g.jsonl") == ["\u00e9"]
