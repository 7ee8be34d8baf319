"""The Infini-Transformer on one device: no DeepSpeed, no ranks."""
