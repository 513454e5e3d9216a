"""A small transformer encoder for short texts, in plain torch.nn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetuning.hashed_words import BUCKETS, LONGEST_TEXT, PADDING


class SmallEncoder(nn.Module):
    """Text classifier: hashed word pieces, a transformer encoder, the mean over words, a linear head.

    Args:
        label_count: width of the head's output.
        width: width of embeddings and hidden states.
        depth: number of transformer layers.
        heads: attention heads a layer.
        dropout: dropout probability, in every place where there is one.
    """

    def __init__(
        self,
        label_count: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.width = width
        self.pieces = nn.Embedding(BUCKETS, width, padding_idx=PADDING)
        self.positions = nn.Embedding(LONGEST_TEXT, width)
        self.hidden_word = nn.Parameter(torch.zeros(width))
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, label_count)
        self._initialise_embeddings()

    def forward(self, pieces: Tensor) -> Tensor:
        """Logits, (batch, label_count), of texts encoded as (batch, words, pieces)."""
        return self.head(self.dropout(self.text_vectors(pieces)))

    def text_vectors(self, pieces: Tensor, hide: Tensor | None = None) -> Tensor:
        """One vector a text: the mean of its words' last hidden states.

        Args:
            pieces: int64, (batch, words, pieces), as ``hashed_words.encode_texts`` gives them.
            hide: bool, (batch, words): these words are replaced by a learnt vector.

        Returns:
            (batch, width).
        """
        present = pieces != PADDING
        is_word = present.any(2)
        piece_count = present.sum(2, keepdim=True).clamp(min=1)
        # Dividing by the root keeps the variance of a sum of independent pieces at that of one.
        words = self.pieces(pieces).sum(2)
        words = words / piece_count.to(words.dtype).sqrt()
        if hide is not None:
            words = torch.where(hide[..., None], self.hidden_word, words)
        states = self.input_norm(words + self.positions.weight[: pieces.shape[1]])
        states = self.dropout(states)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~is_word)
        states = self.output_norm(states) * is_word[..., None]
        return states.sum(1) / is_word.sum(1, keepdim=True)

    def _initialise_embeddings(self) -> None:
        nn.init.normal_(self.pieces.weight, std=self.width**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)
        with torch.no_grad():
            self.pieces.weight[PADDING] = 0
