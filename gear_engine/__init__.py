"""Fast, exact inference for GEAR and LlamaGen autoregressive image models."""
