"""The GPU backend: Triton kernels, one program per chunk; the only place in tricomp that may import triton or torch.

This version has none: every leaf is coded by `tricomp.reference`, whose bytes this backend will have to equal.
"""
