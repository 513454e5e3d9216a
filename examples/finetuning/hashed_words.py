"""A tokenizer without a vocabulary: every word is itself and its character trigrams, hashed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

BUCKETS = 8192
LONGEST_TEXT = 16  # words; the longest Debian description has exactly as many
LONGEST_WORD = 14  # pieces: the whole word and its first 13 trigrams
PADDING = 0
EMPTY_TEXT = 1  # stands for a text without a single word, so that attention has something to see

_WORD = re.compile(r"[\w+#]+")


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Encode texts as hashed pieces of words.

    Returns:
        int64, (texts, LONGEST_TEXT, LONGEST_WORD), padded with PADDING; what is longer is cut off.
    """
    pieces = torch.full((len(texts), LONGEST_TEXT, LONGEST_WORD), PADDING, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = _WORD.findall(text.lower())[:LONGEST_TEXT]
        for column, word in enumerate(words):
            buckets = [_bucket(piece) for piece in _pieces(word)]
            pieces[row, column, : len(buckets)] = torch.tensor(buckets)
        if not words:
            pieces[row, 0, 0] = EMPTY_TEXT
    return pieces


def trimmed(pieces: Tensor) -> Tensor:
    """The same batch without the words and pieces that are padding in all of its texts."""
    present = pieces != PADDING
    words = int(present.any(2).sum(1).max())
    longest = int(present.sum(2).max())
    return pieces[:, :words, :longest]


def _pieces(word: str) -> list[str]:
    # The brackets tell "net" the word, "net" at a word's start and "net" inside a word apart.
    bracketed = f"<{word}>"
    trigrams = [bracketed[start : start + 3] for start in range(len(bracketed) - 2)]
    return [bracketed, *trigrams][:LONGEST_WORD]


def _bucket(piece: str) -> int:
    # CRC-32 and not hash(): Python salts the hashes of strings anew in every process.
    reserved = EMPTY_TEXT + 1
    return reserved + zlib.crc32(piece.encode()) % (BUCKETS - reserved)
