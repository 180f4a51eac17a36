"""`DecoderLM`: GPT-2's decoder in plain PyTorch, for a single device.

Tensor names end in their dimensions, one letter each, everywhere in the project: `B` sequences, `T` positions,
`S` key positions, `D` hidden size, `N` heads, `H` head size, `F` MLP size, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distgpt.models.attention import ATTENTION
from distgpt.models.config import GPT2Config
from distgpt.models.cross_entropy import CROSS_ENTROPY
from distgpt.models.document_mask import DocumentIndex, document_attention, index_documents
from distgpt.models.kernels import Kernels
from distgpt.models.kv_cache import KVCache

TOKEN_EMBEDDING = "token_embedding.weight"


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight_D, bias_D = self.weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype)
        return F.layer_norm(x_BTD, self.normalized_shape, weight_D, bias_D, self.eps)


def _gelu_sigmoid(x: Tensor) -> Tensor:
    """tanh-GELU written as x sigmoid(2 u): the same function, faster in compiled code."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu_tanh(x: Tensor) -> Tensor:
    """tanh-GELU by torch's own kernel."""
    return F.gelu(x, approximate="tanh")


GELU: dict[str, Callable[[Tensor], Tensor]] = {"tanh": _gelu_tanh, "sigmoid": _gelu_sigmoid}
"""GELU in its tanh approximation (Hendrycks & Gimpel 2016), by implementation."""


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, layer: int, n_embd: int, n_head: int, p_dropout: float, kernel: str) -> None:
        super().__init__()
        self.layer, self.n_head, self.p_dropout = layer, n_head, p_dropout
        self.attention_function, self.upcast = ATTENTION[kernel], kernel == "sdpa-fp32"
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.out = nn.Linear(n_embd, n_embd)

    def attend(
        self, qkv_BTX: Tensor, mask_BNTS: Tensor | None, cache: KVCache | None, documents: DocumentIndex | None
    ) -> Tensor:
        """The attention outputs BTD of queries, keys and values (X = 3 N H): what is between the two projections."""
        p_dropout = self.p_dropout if self.training else 0.0
        if self.upcast:
            qkv_BTX = qkv_BTX.float()
        if documents is not None:
            y_BTD: Tensor = document_attention(documents, qkv_BTX, self.n_head, p_dropout)
            return y_BTD
        q_BNTH, k_BNSH, v_BNSH = rearrange(qkv_BTX, "B T (qkv N H) -> qkv B N T H", qkv=3, N=self.n_head)
        if cache is not None:
            k_BNSH, v_BNSH = cache.append(self.layer, k_BNSH, v_BNSH)
        y_BNTH = self.attention_function(q_BNTH, k_BNSH, v_BNSH, mask_BNTS, p_dropout)
        return rearrange(y_BNTH, "B N T H -> B T (N H)")


class Block(nn.Module):
    """One pre-LN decoder layer (Radford et al. 2019, section 2.3): x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, layer: int, n_embd: int, n_head: int, p_dropout: float, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(n_embd)
        self.attention = Attention(layer, n_embd, n_head, p_dropout, kernels.attention)
        self.mlp_norm = LayerNorm(n_embd)
        self.mlp_up = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = GELU[kernels.gelu]
        self.mlp_down = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        mask_BNTS: Tensor | None = None,
        cache: KVCache | None = None,
        documents: DocumentIndex | None = None,
    ) -> Tensor:
        qkv_BTX = self.attention.qkv(self.attention_norm(x_BTD))
        y_BTD = self.attention.attend(qkv_BTX, mask_BNTS, cache, documents)  # over documents, compiled code breaks here
        x_BTD = x_BTD + self.dropout(self.attention.out(y_BTD))
        h_BTF = self.gelu(self.mlp_up(self.mlp_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.mlp_down(h_BTF))
        return x_BTD


class LMHead(nn.Module):
    """Hidden states to logits or loss. It owns no parameter: its weight is the token embedding's."""

    def __init__(self, n_vocab: int, cross_entropy: str) -> None:
        super().__init__()
        self.n_vocab = n_vocab
        self.cross_entropy = CROSS_ENTROPY[cross_entropy]()

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits BTV; with `targets_BT`, the sum of the token losses in nats instead (fp32 scalar)."""
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD[: self.n_vocab])
        return self.cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), self.n_vocab)


class DecoderLM(nn.Module):
    """GPT-2's decoder language model (Radford et al. 2019): learned positions, pre-LN, GELU, tied embeddings."""

    def __init__(
        self,
        n_vocab: int,
        n_embd: int,
        n_head: int,
        n_positions: int,
        n_layer: int,
        p_dropout: float = 0.0,
        *,
        seed: int = 0,
        end_of_text: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """`end_of_text`, if set, keeps attention within the documents that begin with this token; positions restart
        in each."""
        super().__init__()
        kernels = kernels or Kernels()
        config = GPT2Config(n_embd=n_embd, n_head=n_head, n_positions=n_positions, n_layer=n_layer)
        self.n_vocab, self.n_positions, self.seed, self.end_of_text = n_vocab, n_positions, seed, end_of_text
        self.parameter_shapes = config.parameter_shapes(n_vocab)
        """The shape of every parameter by its canonical name, which wrapping and sharding do not change."""
        self.token_embedding = nn.Embedding(self.parameter_shapes[TOKEN_EMBEDDING][0], n_embd)
        self.position_embedding = nn.Embedding(n_positions, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self.blocks = nn.ModuleList(Block(layer, n_embd, n_head, p_dropout, kernels) for layer in range(n_layer))
        self.final_norm = LayerNorm(n_embd)
        self.head = LMHead(n_vocab, kernels.cross_entropy)
        if not self.token_embedding.weight.is_meta:
            self.load_state_dict(dict(self.initial_weights()))

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

        `attention_mask` BS (1 for tokens, 0 for left padding) covers cached positions too; positions count tokens only.
        `documents` index `ids_BT` where attention stays within documents; computed here if absent, which waits for the
        device.
        """
        mask_BNTS = None
        if cache is not None or attention_mask is not None:
            positions_BT, mask_BNTS = self._positions_and_mask(ids_BT, attention_mask, cache)
        elif self.end_of_text is not None:
            documents = documents or index_documents(ids_BT.cpu(), self.end_of_text).to(ids_BT.device)
            positions_BT = documents.positions_BT
        else:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BNTS, cache, documents)
        if cache is not None:
            cache.length += ids_BT.shape[1]
        output: Tensor = self.head(self.final_norm(x_BTD), self.token_embedding.weight, targets)
        return output

    def _positions_and_mask(
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

    def parameter_role(self, name: str) -> str:
        """`matrix`, `embedding` or `vector` (norms and biases): optimizers treat these differently."""
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
        """Each parameter's name and its initial values on the CPU, one at a time (Radford et al. 2019, section 2.3).

        Weights are N(0, 0.02), those that write to the residual stream N(0, 0.02 / sqrt(2 n_layer)), norms 1, biases 0.
        Each parameter has a generator of its own, seeded by (seed, name), so that every parallel layout starts with
        identical weights.
        """
        for name, shape in self.parameter_shapes.items():
            if name.endswith("bias"):
                yield name, torch.zeros(shape, device="cpu")
            elif "norm" in name:
                yield name, torch.ones(shape, device="cpu")
            else:
                digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
                writes_residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if writes_residual else 0.02
                values = torch.randn(shape, generator=generator, device="cpu").mul_(std)
                if name == TOKEN_EMBEDDING:
                    values[self.n_vocab :] = 0.0
                yield name, values
