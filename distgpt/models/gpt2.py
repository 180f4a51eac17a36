"""`DecoderLM`: GPT-2's decoder in plain PyTorch, for a single device.

Tensors carry their dimensions as a suffix, one letter each: `B` sequences, `T` positions, `S` key positions,
`D` hidden size, `N` heads, `H` head size, `F` MLP size, `V` vocabulary, `P` all positions of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distgpt.models.architectures import GPT2Config
from distgpt.models.attention_kernels import ATTENTION
from distgpt.models.cross_entropy import LMHead
from distgpt.models.document_mask import DocumentIndex, document_attention, index_documents
from distgpt.models.kernels import Kernels
from distgpt.models.kv_cache import KVCache
from distgpt.models.language_model import TOKEN_EMBEDDING, LanguageModel


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight_D, bias_D = self.weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype)
        return F.layer_norm(x_BTD, self.normalized_shape, weight_D, bias_D, self.eps)


def _gelu_sigmoid(x: Tensor) -> Tensor:
    """The same function as x sigmoid(2 u), where u is the argument of tanh; faster in compiled code."""
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
        """Attention outputs BTD of queries, keys and values (X = 3 N H), between the two projections.

        The block calls the projections itself, so that a graph break for documents falls between them.
        """
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
        y_BTD = self.attention.attend(qkv_BTX, mask_BNTS, cache, documents)  # with documents, the graph breaks here
        x_BTD = x_BTD + self.dropout(self.attention.out(y_BTD))
        h_BTF = self.gelu(self.mlp_up(self.mlp_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.mlp_down(h_BTF))
        return x_BTD


class DecoderLM(LanguageModel):
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
        kernels = kernels or Kernels()
        config = GPT2Config(n_embd=n_embd, n_head=n_head, n_positions=n_positions, n_layer=n_layer)
        shapes = config.parameter_shapes(n_vocab)
        super().__init__(shapes, n_vocab=n_vocab, n_positions=n_positions, seed=seed, end_of_text=end_of_text)
        self.token_embedding = nn.Embedding(shapes[TOKEN_EMBEDDING][0], n_embd)
        self.position_embedding = nn.Embedding(n_positions, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self.blocks = nn.ModuleList(Block(layer, n_embd, n_head, p_dropout, kernels) for layer in range(n_layer))
        self.final_norm = LayerNorm(n_embd)
        self.head = LMHead(n_vocab, kernels.cross_entropy)
        self.load_initial_weights()

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        documents: DocumentIndex | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See `LanguageModel.forward`."""
        mask_BNTS = None
        if cache is not None or attention_mask is not None:
            positions_BT, mask_BNTS = self.positions_and_mask(ids_BT, attention_mask, cache)
        elif self.end_of_text is not None:
            documents = documents or index_documents(ids_BT.cpu(), self.end_of_text).to(ids_BT.device)
            positions_BT = documents.positions_BT
        else:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BNTS, cache, documents)
        if cache is not None:
            cache.length += ids_BT.shape[1]
        output: Tensor = self.head(self.final_norm(x_BTD), self.token_embedding.weight, targets)
        return output

    def initial_std(self, name: str) -> float:
        """0.02 (Radford et al. 2018), divided by sqrt(2 n_layer) for residual projections (2019, section 2.3)."""
        writes_residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
        return 0.02 / math.sqrt(2 * len(self.blocks)) if writes_residual else 0.02
