"""The parts of examples/finetune.py: data, models, pretraining, methods, comparison, report."""
