"""Sparse attention under the names that other libraries look it up by; each imports its own."""
