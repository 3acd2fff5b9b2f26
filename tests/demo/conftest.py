from tests.evaluation.conftest import tiny_model, tokenizer

__all__ = ["tiny_model", "tokenizer"]
