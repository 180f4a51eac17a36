"""The architectures that a config can name: sizes, parameter shapes and costs of each. Imports no torch.

To add one, write a dataclass here with the members of `GPT2Config`, a `LanguageModel` in a file of its own, and add it
to `MODELS`. Everything else derives from these members: memory estimates, FLOPs, the choice between DDP and FSDP, the
disk space of checkpoints, and how a saved model is built again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from distgpt.config.fields import SECTION, Size, union_of
from distgpt.models.kernels import Kernels

if TYPE_CHECKING:
    from distgpt.models.language_model import LanguageModel

VOCAB_MULTIPLE = 64
"""Embeddings are padded to a multiple of this many rows, which matrix units prefer (50,257 becomes 50,304)."""


class _Architecture(Protocol):
    """Costs that follow from the parameter shapes, the same for all architectures."""

    n_layer: int
    n_embd: int
    n_head: int

    def parameter_shapes(self, n_vocab: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name, in the order of the module."""
        ...

    @property
    def head_size(self) -> int:
        """Hidden size of one attention head."""
        return self.n_embd // self.n_head

    def num_parameters(self, n_vocab: int) -> int:
        """Trainable parameters, without the padding rows of the vocabulary."""
        shapes = self.parameter_shapes(n_vocab)
        padding = (shapes["token_embedding.weight"][0] - n_vocab) * self.n_embd
        return sum(map(math.prod, shapes.values())) - padding

    def flops_per_token(self, n_vocab: int, seq_len: int) -> int:
        """Floating-point operations of training on one token, forward and backward.

        6 x matmul weights (the head counts, the embedding lookup does not) + 12 n_layer n_head head_size seq_len for
        attention, without a discount for causality (Chowdhery et al. 2022, PaLM, appendix B).
        """
        shapes = self.parameter_shapes(n_vocab)
        blocks = sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks.") and len(s) == 2)
        attention = 12 * self.n_layer * self.n_head * self.head_size * seq_len
        return 6 * (blocks + n_vocab * self.n_embd) + attention


@dataclass(frozen=True, kw_only=True, config=SECTION)
class GPT2Config(_Architecture):
    """GPT-2's decoder (Radford et al. 2019): learned positions, pre-LN blocks, GELU, tied embeddings."""

    model_type: Literal["gpt2"] = "gpt2"
    """Architecture."""
    n_embd: Annotated[int, Strict(), Field(ge=1, le=2**16)]
    """Hidden size."""
    n_head: Annotated[int, Strict(), Field(ge=1, le=2**12)]
    """Attention heads per layer; divides n_embd."""
    n_positions: Size
    """Longest sequence the model can read, in tokens."""
    n_layer: Annotated[int, Strict(), Field(ge=1, le=2**12)]
    """Decoder layers."""

    def parameter_shapes(self, n_vocab: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name, in the order of the module. Layer i's names begin with `blocks.i.`.

        The tied head owns no parameter. The embedding includes the padding rows of the vocabulary.
        """
        D, padded = self.n_embd, math.ceil(n_vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        block = {
            "attention_norm.weight": (D,),
            "attention_norm.bias": (D,),
            "attention.qkv.weight": (3 * D, D),
            "attention.qkv.bias": (3 * D,),
            "attention.out.weight": (D, D),
            "attention.out.bias": (D,),
            "mlp_norm.weight": (D,),
            "mlp_norm.bias": (D,),
            "mlp_up.weight": (4 * D, D),
            "mlp_up.bias": (4 * D,),
            "mlp_down.weight": (D, 4 * D),
            "mlp_down.bias": (D,),
        }
        return {
            "token_embedding.weight": (padded, D),
            "position_embedding.weight": (self.n_positions, D),
            **{f"blocks.{i}.{name}": shape for i in range(self.n_layer) for name, shape in block.items()},
            "final_norm.weight": (D,),
            "final_norm.bias": (D,),
        }

    def activations_per_token(self, recomputation: str) -> tuple[int, int]:
        """Numbers that one layer keeps per token for backward: (in fp32, in the dtype of matmuls).

        Without recomputation: the inputs of both norms; then norm 1, qkv 3, attention output 1, norm 1, MLP 4 and
        GELU 4 times the hidden size. Selective recomputation keeps the layer's input and the outputs of matmuls and
        attention, full recomputation the input alone.
        """
        multiples = {"none": (2, 14), "selective": (1, 10), "full": (1, 0)}[recomputation]
        return multiples[0] * self.n_embd, multiples[1] * self.n_embd

    def cross_field_errors(self) -> Iterator[tuple[str, str]]:
        """(key, problem) for values that are individually valid but inconsistent."""
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_head))
            expected = f"expected a divisor of model_config.n_embd = {self.n_embd}"
            yield "n_head", f"got {self.n_head}, {expected}; {nearest} is the nearest"

    def build(
        self,
        n_vocab: int,
        p_dropout: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
        kernels: Kernels | None = None,
    ) -> LanguageModel:
        """The module, on the current default device."""
        from distgpt.models.gpt2 import DecoderLM

        sizes = self.n_embd, self.n_head, self.n_positions, self.n_layer
        return DecoderLM(n_vocab, *sizes, p_dropout, seed=seed, end_of_text=end_of_text, kernels=kernels or Kernels())


MODELS = {"gpt2": GPT2Config}
"""Every architecture by its `model_type`."""

if TYPE_CHECKING:
    ModelConfig = GPT2Config
else:
    ModelConfig = union_of(MODELS, "model_type")
"""The type of the section `model_config`."""
