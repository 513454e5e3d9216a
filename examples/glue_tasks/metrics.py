"""GLUE's metrics in percent: accuracy, F1, Matthews and Spearman correlation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Values = Sequence[float] | np.ndarray
Metric = Callable[[Values, Values], float]


def accuracy(predicted: Values, labels: Values) -> float:
    """The share of predictions that are the label."""
    return 100 * float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted: Values, labels: Values) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where no prediction of it is right."""
    ours, true = np.asarray(predicted) == 1, np.asarray(labels) == 1
    hits = np.sum(ours & true)
    return 100 * float(2 * hits / (ours.sum() + true.sum())) if hits else 0.0


def matthews(predicted: Values, labels: Values) -> float:
    """Matthews correlation of two classes, that is Pearson's of zeros and ones."""
    return _pearson(np.asarray(predicted, dtype=float), np.asarray(labels, dtype=float))


def spearman(predicted: Values, labels: Values) -> float:
    """Pearson correlation of ranks; equal values share the mean of their ranks."""
    return _pearson(_ranks(predicted), _ranks(labels))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews correlation": matthews,
    "Spearman correlation": spearman,
}


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    norms = np.sqrt(np.sum(first * first) * np.sum(second * second))
    # A model that says the same of all examples has failed: 0, and not NaN, which would hide it in a mean.
    return 100 * float(np.sum(first * second) / norms) if norms > 0 else 0.0


def _ranks(values: Values) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
