"""Model files: where a model's folder is, and GGUF files turned into such folders."""
