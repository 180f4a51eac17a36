"""`DecoderLM` in plain PyTorch: GPT-2's decoder, which has never heard of ranks.

Tensor names end in their dimensions, one letter each, everywhere in the project:
`B` sequences, `T` positions, `S` key positions, `D` width, `N` heads, `H` head size, `F` hidden, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distgpt.loss import ExpRows, plain_loss, tiled_loss

VOCAB_MULTIPLE = 64
"""Vocabulary rows are padded to this multiple: matrix units like round sizes (50,257 becomes 50,304)."""

TOKEN_ROWS = "token_embedding.weight"


class KeyValueCache:
    """The keys and values of positions already read, a slot for each layer: a new token costs one position.

    `n_rows` sequences share the same columns: they are left-padded to end together.
    """

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.n_rows, self.n_columns = n_rows, n_columns
        self.length = 0
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

    def forward(self, x_BTD: Tensor, mask_BNTS: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        q_BNTH, k_BNSH, v_BNSH = rearrange(self.qkv(x_BTD), "B T (qkv N H) -> qkv B N T H", qkv=3, N=self.n_head)
        if cache is not None:
            k_BNSH, v_BNSH = cache.append(self.layer, k_BNSH, v_BNSH)
        if q_BNTH.dtype == torch.bfloat16 and x_BTD.device.type == "cpu" and q_BNTH.shape[-1] < 32:
            # The CPU's fused backward takes 5 times as long in bf16 as in fp32 for H = 16 (15.3 and 2.8 ms for
            # B=32 N=2 T=128), as long from H = 64 on.
            q_BNTH, k_BNSH, v_BNSH = q_BNTH.float(), k_BNSH.float(), v_BNSH.float()
        with torch.autocast(x_BTD.device.type, enabled=False):  # in the type that q, k and v have now
            attended_BNTH = F.scaled_dot_product_attention(
                q_BNTH,
                k_BNSH,
                v_BNSH,
                attn_mask=mask_BNTS,
                dropout_p=self.p_dropout if self.training else 0.0,
                is_causal=mask_BNTS is None,
            )
        out_BTD: Tensor = self.out(rearrange(attended_BNTH, "B N T H -> B T (N H)"))
        return out_BTD


class Block(nn.Module):
    """One pre-LN decoder layer (Radford et al. 2019, section 2.3): attention, then an MLP, each added to the stream."""

    def __init__(self, layer: int, n_embd: int, n_head: int, p_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(n_embd)
        self.attention = Attention(layer, n_embd, n_head, p_dropout)
        self.mlp_norm = nn.LayerNorm(n_embd)
        self.mlp_up = nn.Linear(n_embd, 4 * n_embd)
        self.mlp_down = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(self, x_BTD: Tensor, mask_BNTS: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), mask_BNTS, cache))
        h_BTF = F.gelu(self.mlp_up(self.mlp_norm(x_BTD)), approximate="tanh")
        x_BTD = x_BTD + self.dropout(self.mlp_down(h_BTF))
        return x_BTD


class Head(nn.Module):
    """Hidden states to logits or loss, through the token embedding's own rows: it owns no parameter."""

    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        self.n_vocab = n_vocab
        self.exp_rows: ExpRows | None = None
        """Set (to `loss.exp_rows`, compiled): the loss goes tile by tile and the logits never exist as a whole."""

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits BTV; with `targets_BT`, the sum of the token losses in nats instead (fp32, scalar)."""
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD[: self.n_vocab])
        x_PD, targets_P = x_BTD.flatten(0, 1), targets_BT.flatten()
        if self.exp_rows is None:
            return plain_loss(x_PD, weight_VD, targets_P, self.n_vocab)
        return tiled_loss(x_PD, weight_VD, targets_P, self.n_vocab, self.exp_rows)


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
    ) -> None:
        super().__init__()
        self.n_vocab, self.n_positions = n_vocab, n_positions
        n_rows = math.ceil(n_vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token_embedding = nn.Embedding(n_rows, n_embd)
        self.position_embedding = nn.Embedding(n_positions, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self.blocks = nn.ModuleList(Block(layer, n_embd, n_head, p_dropout) for layer in range(n_layer))
        self.final_norm = nn.LayerNorm(n_embd)
        self.head = Head(n_vocab)
        self.init_weights(seed)

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        *,
        targets_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits BTV (fp32 outside autocast); with `targets_BT`, the summed loss, so that logits never leave here.

        `attention_mask_BS` (1 real, 0 padding, left) covers the cached columns too; positions count real tokens only.
        """
        T = ids_BT.shape[1]
        S = T if cache is None else cache.length + T
        if attention_mask_BS is None:
            positions_BT = torch.arange(S - T, S, device=ids_BT.device)
            mask_BNTS: Tensor | None = None if S == T else causal_mask(T, S, ids_BT.device)
        else:
            real_BS = attention_mask_BS.bool()
            positions_BT = (real_BS.cumsum(1) - 1).clamp_(min=0)[:, S - T :]
            # A padding query sees only padding: let it see itself, since a softmax over nothing is NaN.
            itself_TS = torch.ones(T, S, dtype=torch.bool, device=ids_BT.device).triu_(S - T).tril_(S - T)
            mask_BNTS = causal_mask(T, S, ids_BT.device) & real_BS[:, None, None, :] | itself_TS
        x_BTD = self.dropout(self.token_embedding(ids_BT) + self.position_embedding(positions_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BNTS, cache)
        if cache is not None:
            cache.length = S
        out: Tensor = self.head(self.final_norm(x_BTD), self.token_embedding.weight, targets_BT)
        return out

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights by name, without the padding rows of the vocabulary."""
        weights = dict(self.state_dict())
        weights[TOKEN_ROWS] = weights[TOKEN_ROWS][: self.n_vocab]
        return weights

    def load_trained_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over weights from `trained_weights`. Raises ValueError naming the first tensors that do not fit."""
        own = self.trained_weights()
        wrong = [
            f"{name}: {describe_tensor(weights.get(name))}, expected {describe_tensor(own.get(name))}"
            for name in sorted(own.keys() | weights.keys())
            if describe_tensor(weights.get(name)) != describe_tensor(own.get(name))
        ]
        if wrong:
            raise ValueError("; ".join(wrong[:3]))
        with torch.no_grad():
            for name, tensor in own.items():  # views of the parameters: padding rows stay zero
                tensor.copy_(weights[name])

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initial weights (Radford et al. 2019, section 2.3): N(0, 0.02), residual ones / sqrt(2 n_layer).

        Each parameter has a generator of its own, seeded by (seed, name), so that any layout starts alike.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
                residual = name.endswith(("attention.out.weight", "mlp_down.weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key)) * std
                parameter.copy_(values)
        self.token_embedding.weight[self.n_vocab :] = 0.0


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """True where query t (the last T of S columns) may see key s, TS."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)


def describe_tensor(tensor: Tensor | None) -> str:
    """Shape and dtype, or `absent`."""
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
