"""RMS norms (Zhang & Sennrich 2019) that keep no copies of their input for the gradient."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.segment_sums import CACHED
from infini_ds.kernels.launch import is_recording


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm on GPUs and compiled, where it is one kernel, and one of our own elsewhere.

    Elsewhere PyTorch's norm is a chain of operators that keeps fp32 copies. Both implementations
    compute in fp32, whatever the type of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., size] to the same shape."""
        if x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.empty(*x.shape[:-1], 1, device=x.device)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for own_x, own_scale, own_out in _parts(x, scale, out):
            values = own_x.float()
            norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            own_scale.copy_((norm.square_() / x.shape[-1]).add_(eps).rsqrt_())
            own_out.copy_((values * own_scale).mul_(weight))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight = torch.zeros(weight.shape, device=x.device)
        for own_x, own_scale, own_gradient, own_dx in _parts(x, scale, gradient, dx):
            normed = own_x.float() * own_scale
            d_out = own_gradient.float()
            along = d_out * normed
            d_weight += along.sum(dim=0)
            mean = along @ weight.float()[:, None] / x.shape[-1]
            own_dx.copy_((d_out * weight).addcmul_(normed, mean, value=-1).mul_(own_scale))
        return dx, d_weight.to(weight.dtype), None


def _parts(*tensors: Tensor):
    """Splits all tensors into blocks of rows, [rows, size], that fit into a core's cache."""
    size = tensors[0].shape[-1]
    # Tensors without data are in no cache, and a large model has thousands of blocks.
    rows = tensors[0].numel() // size if is_recording() else max(1, CACHED // size)
    return zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)
