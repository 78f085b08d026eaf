"""Raw values for all (token, prototype) pairs, and the loss from them.

`dense.py` is the readable truth on any device. `cpu.py` (Numba, float32 on CPUs) and `gpu.py` (Triton, float32 on CUDA) fuse the loss and
its gradients, and must agree with it.
"""
