"""Raw values for all (token, prototype) pairs.

`dense.py` is the readable truth on any device; `cpu.py` (Numba) computes the elementwise kernels in float32 on CPUs, and must agree with
it. `gpu.py` is the place of Triton kernels; until they stand, a GPU takes the chunked path over `dense.py`.
"""
