"""A checksum of a model's settings and weights, which identifies the model."""

import hashlib

import torch

from infini_ds.model.transformer import InfiniTransformer


def fingerprint(model: InfiniTransformer) -> str:
    """Computes sha256 over all non-default settings and over every parameter in its dtype.

    The result does not depend on the model's files, its device or the layout of its training.
    """
    digest = hashlib.sha256(model.config.model_dump_json(exclude_defaults=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
