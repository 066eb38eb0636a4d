"""The GPU backend: Triton kernels over flat device memory; the only place in tricomp that may import triton or torch.

Register functions (bits, lanes, entropy, pack, predict) load and store streams alone; memory kernels (*_kernel) are
made of them; launchers (encode, decode, ...) allocate, launch and never wait. Nothing is imported here: see `device`.
"""
