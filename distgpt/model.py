"""`DecoderLM` in plain PyTorch: GPT-2's decoder, which has never heard of ranks.

Tensor names end in their dimensions, one letter each, everywhere in the project:
`B` sequences, `T` positions, `S` key positions, `D` width, `N` heads, `H` head size, `F` hidden, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distgpt.documents import Documents, attend_within, find_documents
from distgpt.loss import Tiles, plain_loss, tiled_loss
from distgpt.plan import VOCAB_MULTIPLE

TOKEN_ROWS = "token_embedding.weight"

NARROW_HEAD, SHORT_SEQUENCE = 32, 512
"""In bf16 on the CPU, narrower heads attend in fp32; others, if compiled, by matmuls over at most so many positions."""


class KeyValueCache:
    """The keys and values of positions already read, a slot for each layer: a new token costs one position.

    `n_rows` sequences share the same columns: they are left-padded to end together.
    """

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.n_rows, self.n_columns = n_rows, n_columns
        self.length = 0
        self.starts_BS = torch.empty(n_rows, 0, dtype=torch.bool)
        """Columns in which a document begins."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of that layer's, BNSH."""
        if layer not in self.layers:
            _, N, _, H = k_BNTH.shape
            room = (self.n_rows, N, self.n_columns, H)
            self.layers[layer] = k_BNTH.new_empty(room), v_BNTH.new_empty(room)
        end = self.length + k_BNTH.shape[2]
        k_BNSH, v_BNSH = self.layers[layer]
        k_BNSH[:, :, self.length : end] = k_BNTH
        v_BNSH[:, :, self.length : end] = v_BNTH
        return k_BNSH[:, :, :end], v_BNSH[:, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2), fused."""

    def __init__(self, layer: int, n_embd: int, n_head: int, p_dropout: float) -> None:
        super().__init__()
        self.layer, self.n_head, self.p_dropout = layer, n_head, p_dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.out = nn.Linear(n_embd, n_embd)

    def attend(
        self, qkv_BTX: Tensor, mask_BNTS: Tensor | None, cache: KeyValueCache | None, documents: Documents | None
    ) -> Tensor:
        """What every position gathers, BTD, from queries, keys and values (X = 3 N H); between the two projections."""
        device_type, H = qkv_BTX.device.type, qkv_BTX.shape[-1] // (3 * self.n_head)
        p_dropout = self.p_dropout if self.training else 0.0
        fused_is_slow = qkv_BTX.dtype == torch.bfloat16 and device_type == "cpu"  # both ways round it: bench/README.md
        if fused_is_slow and H < NARROW_HEAD:
            qkv_BTX, fused_is_slow = qkv_BTX.float(), False
        has_autocast = torch.amp.is_autocast_available(device_type)  # not on the meta device
        # In the type that queries, keys and values have now.
        with torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
            if documents is not None:
                return attend_within(documents, qkv_BTX, self.n_head, p_dropout)
            q_BNTH, k_BNSH, v_BNSH = rearrange(qkv_BTX, "B T (qkv N H) -> qkv B N T H", qkv=3, N=self.n_head)
            if cache is not None:
                k_BNSH, v_BNSH = cache.append(self.layer, k_BNSH, v_BNSH)
            short = mask_BNTS is None and qkv_BTX.shape[1] <= SHORT_SEQUENCE
            if fused_is_slow and short and torch.compiler.is_compiling():
                attended_BNTH = attend_by_matmuls(q_BNTH, k_BNSH, v_BNSH, p_dropout)
            else:
                attended_BNTH = F.scaled_dot_product_attention(
                    q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_BNTS, dropout_p=p_dropout, is_causal=mask_BNTS is None
                )
            return rearrange(attended_BNTH, "B N T H -> B T (N H)")


def attend_by_matmuls(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, p_dropout: float) -> Tensor:
    """Causal attention with all of its T x T weights; compiled, what is between the two matmuls is one pass."""
    T, H = q_BNTH.shape[-2:]
    later_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTH.device).triu(1)
    scores_BNTT = (q_BNTH / math.sqrt(H)) @ k_BNTH.mT
    weights_BNTT = scores_BNTT.masked_fill(later_TT, -math.inf).softmax(-1)
    return F.dropout(weights_BNTT, p_dropout) @ v_BNTH


class Norm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in the type of what it normalises, whatever type its weights come in."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight_D, bias_D = self.weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype)
        return F.layer_norm(x_BTD, self.normalized_shape, weight_D, bias_D, self.eps)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016), which is x sigmoid(2 u) as well: compiled, that is faster."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """One pre-LN decoder layer (Radford et al. 2019, section 2.3): attention, then an MLP, each added to the stream."""

    def __init__(self, layer: int, n_embd: int, n_head: int, p_dropout: float) -> None:
        super().__init__()
        self.attention_norm = Norm(n_embd)
        self.attention = Attention(layer, n_embd, n_head, p_dropout)
        self.mlp_norm = Norm(n_embd)
        self.mlp_up = nn.Linear(n_embd, 4 * n_embd)
        self.mlp_down = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        mask_BNTS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        return self.after(x_BTD, self.attention.attend(self.before(x_BTD), mask_BNTS, cache, documents))

    def before(self, x_BTD: Tensor) -> Tensor:
        """Up to attention: queries, keys and values."""
        qkv_BTX: Tensor = self.attention.qkv(self.attention_norm(x_BTD))
        return qkv_BTX

    def after(self, x_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        """From attention on: its output added to the stream, then the MLP's."""
        x_BTD = x_BTD + self.dropout(self.attention.out(attended_BTD))
        h_BTF = gelu(self.mlp_up(self.mlp_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.mlp_down(h_BTF))
        return x_BTD


class Head(nn.Module):
    """Hidden states to logits or loss, through the token embedding's own rows: it owns no parameter."""

    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        self.n_vocab = n_vocab
        self.tiles: Tiles | None = None
        """Set: the loss goes tile by tile, and where there are many logits they never exist as a whole."""

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits BTV; with `targets_BT`, the sum of the token losses in nats instead (fp32, scalar)."""
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD[: self.n_vocab])
        x_PD, targets_P = x_BTD.flatten(0, 1), targets_BT.flatten()
        if self.tiles is None:
            return plain_loss(x_PD, weight_VD, targets_P, self.n_vocab)
        return tiled_loss(x_PD, weight_VD, targets_P, self.n_vocab, self.tiles)


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
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> None:
        super().__init__()
        self.n_vocab, self.n_positions, self.seed = n_vocab, n_positions, seed
        self.end_of_text = end_of_text
        """If set, attention stays within the documents that begin with this token, and positions restart in each."""
        n_rows = math.ceil(n_vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token_embedding = nn.Embedding(n_rows, n_embd)
        self.position_embedding = nn.Embedding(n_positions, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self.blocks = nn.ModuleList(Block(layer, n_embd, n_head, p_dropout) for layer in range(n_layer))
        self.final_norm = Norm(n_embd)
        self.head = Head(n_vocab)
        if not self.token_embedding.weight.is_meta:
            with torch.no_grad():
                for parameter, values in self.initial_weights():
                    parameter.copy_(values)

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        *,
        targets_BT: Tensor | None = None,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits BTV (fp32 outside autocast); with `targets_BT`, the summed loss, so that logits never leave here.

        `attention_mask_BS` (1 real, 0 padding, left) covers the cached columns too; positions count real tokens only.
        `documents` are those of `ids_BT` where documents are masked; found here (which waits for the device) if absent.
        """
        mask_BNTS = None
        if cache is not None or attention_mask_BS is not None:
            positions_BT, mask_BNTS = self.place(ids_BT, attention_mask_BS, cache)
        elif self.end_of_text is not None:
            documents = documents or find_documents(ids_BT.cpu(), self.end_of_text).to(ids_BT.device)
            positions_BT = documents.positions_BT
        else:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BNTS, cache, documents)
        if cache is not None:
            cache.length += ids_BT.shape[1]
        out: Tensor = self.head(self.final_norm(x_BTD), self.token_embedding.weight, targets_BT)
        return out

    def place(
        self, ids_BT: Tensor, attention_mask_BS: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        """Positions BT, and mask BNTS (True where query t may see key s), of rows with padding or cached columns."""
        (B, T), device = ids_BT.shape, ids_BT.device
        S = T if cache is None else cache.length + T
        real_BS = torch.ones(B, S, dtype=torch.bool, device=device)
        if attention_mask_BS is not None:
            real_BS = attention_mask_BS.bool()
        starts_BS = ids_BT == (-1 if self.end_of_text is None else self.end_of_text)
        if cache is not None:
            starts_BS = cache.starts_BS = torch.cat([cache.starts_BS.to(device), starts_BS], 1)
        document_BS = starts_BS.cumsum(1)
        counted_BS = real_BS.cumsum(1) - 1
        first_BS = torch.where(starts_BS, counted_BS, 0).cummax(1).values
        positions_BT = (counted_BS - first_BS).clamp_(min=0)[:, S - T :]
        causal_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)
        # A padding query sees only padding: let it see itself, since a softmax over nothing is NaN.
        itself_TS = causal_TS.triu(S - T)
        same_BTS = document_BS[:, S - T :, None] == document_BS[:, None, :]
        return positions_BT, (causal_TS & same_BTS & real_BS[:, None, :] | itself_TS)[:, None]

    def without_padding(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights (a whole state_dict of this model) without the padding rows of the vocabulary."""
        return weights | {TOKEN_ROWS: weights[TOKEN_ROWS][: self.n_vocab]}

    def shapes_without_padding(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter as a finished run stores it: without padding rows."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return shapes | {TOKEN_ROWS: (self.n_vocab, *shapes[TOKEN_ROWS][1:])}

    def initial_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with GPT-2's initial weights for it (Radford et al. 2019, section 2.3), one at a time.

        They are N(0, 0.02), on the way into the residual stream N(0, 0.02 / sqrt(2 n_layer)), norms 1 and biases 0.
        Each parameter has a generator of its own, seeded by (seed, name), so that any layout starts alike.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                yield parameter, torch.zeros(parameter.shape)
            elif "norm" in name:
                yield parameter, torch.ones(parameter.shape)
            else:
                key = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little")
                residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key)).mul_(std)
                if name == TOKEN_ROWS:
                    values[self.n_vocab :] = 0.0
                yield parameter, values
