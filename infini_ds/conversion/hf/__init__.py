"""What `infini-ds convert to-hf` puts beside the weights: code that needs transformers alone.

Nothing here imports the rest of the package, and nothing of the package imports this.
"""
