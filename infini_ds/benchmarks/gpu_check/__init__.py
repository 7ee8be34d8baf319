"""Implements `make gpu-check`, which does everything that a first day on a GPU needs, in one go.

See launch/GPU.md. With DRY=1 the same steps run on a CPU, at tiny sizes and with PyTorch's
operators in place of the Triton kernels, so that outdated code is found before a GPU is waiting.
"""
