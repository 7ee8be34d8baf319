"""The Infini-Transformer as a DeepSpeed pipeline: stages, payload, memory transport, engine."""
