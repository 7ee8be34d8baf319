"""`make gpu-check`: everything that a first day on a GPU should tell, in one go.

See launch/GPU.md. With DRY=1 the same runs on a CPU, at tiny sizes, with PyTorch's operators in
place of the Triton kernels: what has moved since it was written is found before a GPU waits.
"""
