"""Raw values for all (token, prototype) pairs.

`dense.py` is the readable truth on any device. `cpu.py` (Numba) and `gpu.py` (Triton) are the places of the fused kernels, which must
agree with it; until they stand, `impl="auto"` takes the chunked path over `dense.py`.
"""
