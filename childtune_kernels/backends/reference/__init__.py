"""The specification in code: plain PyTorch, on any device, written to be read."""
