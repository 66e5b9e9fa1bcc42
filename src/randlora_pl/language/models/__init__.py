"""Language models from transformers: loading, tokenization, generation, default targets."""
