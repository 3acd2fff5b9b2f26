"""Dynamic block-sparse attention for PyTorch."""
