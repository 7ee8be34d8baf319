"""What tells one model from another: a checksum of its shape and weights."""

import hashlib

import torch

from infini_ds.model.transformer import InfiniTransformer


def fingerprint(model: InfiniTransformer) -> str:
    """sha256 over the settings that are not the defaults, and every parameter in its dtype.

    The same for one model whatever its files, its device and the layout it was trained in.
    """
    digest = hashlib.sha256(model.config.model_dump_json(exclude_defaults=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
