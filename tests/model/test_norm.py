"""RMS norms against PyTorch's in fp64: results, gradients, and what is kept."""

import pytest
import torch

from infini_ds.model import norm
from infini_ds.model.norm import RMSNorm

SIZE = 24
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 5e-3}


def computed(layer, x):
    leaf = x.detach().requires_grad_()
    out = layer(leaf)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape).bfloat16().to(x.dtype)
    return out, *torch.autograd.grad(out, (leaf, layer.weight), upstream)


@pytest.mark.parametrize("rows", [1, 3, 1000], ids=lambda rows: f"{rows} at a time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False], ids=["whole", "slice"])
def test_norm_is_pytorch_s(monkeypatch, dtype, rows, in_place):
    monkeypatch.setattr(norm, "CACHED", rows * SIZE)
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 7, 2 * SIZE if not in_place else SIZE).bfloat16()
    x = x[..., :SIZE]
    ours, plain = RMSNorm(SIZE, eps=1e-5), torch.nn.RMSNorm(SIZE, eps=1e-5)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(SIZE).bfloat16() + 0.5)
        plain.weight.copy_(ours.weight)
    expected = computed(plain.double(), x.double())
    actual = computed(ours.to(dtype), x.to(dtype))
    for want, have in zip(expected, actual, strict=True):
        assert have.dtype == dtype
        assert (have.double() - want).norm() <= LIMITS[dtype] * want.norm()


def test_norm_keeps_its_input_and_a_number_a_row():
    x = torch.randn(2, 7, SIZE, dtype=torch.bfloat16, requires_grad=True)
    layer = RMSNorm(SIZE, eps=1e-5).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), layer.weight.data_ptr()]
    assert [t.numel() for t in kept[2:]] == [2 * 7]
