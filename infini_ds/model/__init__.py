"""The Infini-Transformer on one device, without DeepSpeed or ranks."""
