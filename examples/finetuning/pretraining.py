"""Pretraining of the small encoder on Debian sections that fine-tuning does not use.

Two tasks share each batch: which section a description belongs to, and which of the batch's packages
bears the name that goes with it. A quarter of the words is hidden, so that no single word decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from tqdm import tqdm

from finetuning.hashed_words import encode_texts, trimmed
from finetuning.labelled_text import PRETRAINING_SECTIONS, PackageDescription
from finetuning.progress import tell_without_bar
from finetuning.small_encoder import SmallEncoder

_BATCH = 64
_LEARNING_RATE = 1e-3
_HIDDEN_WORDS = 0.25
_SHARPNESS = 15.0  # of the softmax over cosine similarities, which lie within [-1, 1]


def pretrain(packages: Sequence[PackageDescription], epochs: int, seed: int) -> dict[str, Tensor]:
    """Pretrain a SmallEncoder on the rows of the pretraining sections.

    Returns:
        Its state dict without the head, for ``load_state_dict(..., strict=False)``.
    """
    torch.manual_seed(seed)
    rows = [row for row in packages if row.section in PRETRAINING_SECTIONS]
    descriptions = encode_texts([row.description for row in rows])
    names = encode_texts([row.package.replace("-", " ") for row in rows])
    sections = torch.tensor([PRETRAINING_SECTIONS.index(row.section) for row in rows])

    model = SmallEncoder(len(PRETRAINING_SECTIONS))
    projection = nn.Linear(model.width, model.width)
    parameters = [*model.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)
    steps = epochs * (len(rows) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    progress = tqdm(total=steps, desc="pretraining", unit="step", disable=None)
    for epoch in range(epochs):
        tell_without_bar(f"pretraining: epoch {epoch + 1} of {epochs} ...")
        order = torch.randperm(len(rows))
        for batch in order[: len(rows) // _BATCH * _BATCH].split(_BATCH):
            pieces = trimmed(descriptions[batch])
            hide = torch.rand(pieces.shape[:2]) < _HIDDEN_WORDS
            vectors = model.text_vectors(pieces, hide)
            section_loss = functional.cross_entropy(
                model.head(model.dropout(vectors)), sections[batch]
            )
            name_vectors = model.text_vectors(trimmed(names[batch]))
            loss = section_loss + _matching_loss(projection(vectors), projection(name_vectors))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    progress.close()
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith("head.")
    }


def _matching_loss(descriptions: Tensor, names: Tensor) -> Tensor:
    """Cross-entropy of finding each row's partner among all rows of the batch, in both directions."""
    similarity = functional.normalize(descriptions, dim=1) @ functional.normalize(names, dim=1).T
    logits = _SHARPNESS * similarity
    partner = torch.arange(len(logits))
    forwards = functional.cross_entropy(logits, partner)
    return (forwards + functional.cross_entropy(logits.T, partner)) / 2
