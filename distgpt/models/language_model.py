"""What the rest of the package needs of an architecture: the `LanguageModel` that all of them extend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distgpt.models.cross_entropy import LMHead
from distgpt.models.document_mask import DocumentIndex
from distgpt.models.kv_cache import KVCache

TOKEN_EMBEDDING = "token_embedding.weight"


class LanguageModel(nn.Module):
    """A decoder language model for a single device.

    A subclass calls `__init__` with its parameter shapes, then creates the modules below with parameters of these
    shapes and without buffers, and finally calls `load_initial_weights`.
    """

    token_embedding: nn.Embedding
    blocks: nn.ModuleList
    """The layers: each is compiled, checkpointed and sharded as a unit."""
    head: LMHead

    def __init__(
        self,
        parameter_shapes: dict[str, tuple[int, ...]],
        *,
        n_vocab: int,
        n_positions: int,
        seed: int,
        end_of_text: int | None,
    ) -> None:
        """`end_of_text`, if set, keeps attention within the documents that begin with this token; positions restart
        in each."""
        super().__init__()
        self.parameter_shapes = parameter_shapes
        """The shape of every parameter by its canonical name, which wrapping and sharding do not change."""
        self.n_vocab, self.n_positions, self.seed, self.end_of_text = n_vocab, n_positions, seed, end_of_text

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        documents: DocumentIndex | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits BTV (fp32 outside autocast); with `targets` BT, the summed loss, so that no logits are returned.

        `attention_mask` BS (1 for tokens, 0 for left padding) covers cached positions too. Padding does not advance
        positions. `documents` index `ids_BT` where attention stays within documents; computed here if absent, which
        synchronizes with the device.
        """
        raise NotImplementedError

    def initial_std(self, name: str) -> float:
        """Standard deviation of the normal distribution that a matrix or embedding is drawn from."""
        raise NotImplementedError

    def parameter_role(self, name: str) -> str:
        """`matrix`, `embedding` or `vector` (norms and biases). AdamW decays all but vectors."""
        if name.endswith("bias") or "norm" in name:
            return "vector"
        return "embedding" if "embedding" in name else "matrix"

    def remove_vocab_padding(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A whole state_dict of this model without the padding rows of the vocabulary."""
        return state_dict | {TOKEN_EMBEDDING: state_dict[TOKEN_EMBEDDING][: self.n_vocab]}

    def unpadded_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter as a finished run stores it: without padding rows."""
        return self.parameter_shapes | {TOKEN_EMBEDDING: (self.n_vocab, self.parameter_shapes[TOKEN_EMBEDDING][1])}

    def initial_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its initial values on the CPU, one at a time: norms 1, biases 0, the rest normal.

        Each parameter has a generator of its own, seeded by (seed, name), so that every parallel layout starts with
        identical weights.
        """
        for name, shape in self.parameter_shapes.items():
            if name.endswith("bias"):
                yield name, torch.zeros(shape, device="cpu")
            elif self.parameter_role(name) == "vector":
                yield name, torch.ones(shape, device="cpu")
            else:
                digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
                values = torch.randn(shape, generator=generator, device="cpu").mul_(self.initial_std(name))
                if name == TOKEN_EMBEDDING:
                    values[self.n_vocab :] = 0.0
                yield name, values

    def load_initial_weights(self) -> None:
        """Set the initial weights, unless the model is on the meta device."""
        if not self.token_embedding.weight.is_meta:
            self.load_state_dict(dict(self.initial_weights()))

    def positions_and_mask(
        self, ids_BT: Tensor, attention_mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Positions BT, and the mask BNTS (True where query t may see key s), with padding or cached positions."""
        (B, T), device = ids_BT.shape, ids_BT.device
        S = T if cache is None else cache.length + T
        non_pad_BS = torch.ones(B, S, dtype=torch.bool, device=device)
        if attention_mask is not None:
            non_pad_BS = attention_mask.bool()
        starts_BS = ids_BT == (-1 if self.end_of_text is None else self.end_of_text)
        if cache is not None:
            starts_BS = cache.starts_BS = torch.cat([cache.starts_BS.to(device), starts_BS], 1)
        document_BS = starts_BS.cumsum(1)
        index_BS = non_pad_BS.cumsum(1) - 1
        document_start_BS = torch.where(starts_BS, index_BS, 0).cummax(1).values
        positions_BT = (index_BS - document_start_BS).clamp_(min=0)[:, S - T :]
        causal_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)
        # A padding query sees only padding. It attends to itself, since a softmax over nothing is NaN.
        diagonal_TS = causal_TS.triu(S - T)
        same_document_BTS = document_BS[:, S - T :, None] == document_BS[:, None, :]
        mask_BTS = causal_TS & same_document_BTS & non_pad_BS[:, None, :] | diagonal_TS
        return positions_BT, mask_BTS[:, None]
