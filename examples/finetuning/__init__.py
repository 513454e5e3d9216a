"""The parts of the examples: data, models, pretraining, methods, comparisons, reports."""
