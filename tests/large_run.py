"""A training run of some 600 MB, saved, checked and restored by a process that may take so much memory and no more.

Run by tests/test_large.py. The system refuses what is beyond the limit, so nothing is measured and nothing can flicker.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import tricomp_torch

import tricomp

MIB = 1 << 20
DECODING = 5 * 32 * MIB  # five batches of 8 Mi words of 32 bits
ENCODING = 256 * MIB  # no leaf here is so large that what it was coded to is more
OVERHEAD = 48 * MIB  # stacks of threads, and memory that the allocator has and nobody uses


class Net(torch.nn.Module):
    """A leaf of 200 MB, others of some MB, a copy of one in bfloat16, integers, and many small ones."""

    def __init__(self, words: np.ndarray) -> None:
        super().__init__()

        def values(n_words: int, k: int) -> torch.Tensor:
            return torch.from_numpy(np.resize(words, n_words) + np.uint32(k << 12)).view(torch.float32)

        self.embedding = torch.nn.Parameter(values(50 * MIB + 7, 0))
        self.layers = torch.nn.ParameterList([values(4 * MIB + k, 1 + k) for k in range(6)])
        self.register_buffer("rounded", self.layers[0].detach().to(torch.bfloat16))
        self.register_buffer("counts", torch.arange(1 << 21))
        for k in range(50):
            self.register_buffer(f"small{k}", values(1 + 300 * k, 20 + k))


def data_bytes() -> int:
    """Bytes of memory that this process has of its own, touched or not: what RLIMIT_DATA is about."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


@contextmanager
def at_most(n_bytes: int) -> Iterator[None]:
    """Let the process take so much more memory than it has."""
    gc.collect()
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + n_bytes + OVERHEAD, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def is_enforced() -> bool:
    """Whether this system refuses memory beyond the limit."""
    try:
        with at_most(0):
            np.empty(4 * OVERHEAD, np.uint8)
    except MemoryError:
        return True
    return False


def main(folder: str) -> None:
    """Save a keyframe and a delta, check the store, restore into tensors that hold other words, and compare."""
    if not is_enforced():
        print("not enforced")
        return
    words = (np.random.default_rng(0).standard_normal(MIB) * 0.02).astype(np.float32).view(np.uint32)
    net = Net(words)
    sgd = torch.optim.SGD(net.parameters(), momentum=0.9)
    for parameter in net.parameters():
        sgd.state[parameter]["momentum_buffer"] = parameter.detach() * 0.25
    n_state = sum(tensor.nbytes for tensor in (*net.state_dict().values(), *net.parameters()))
    store = tricomp.Store(folder, reference_in="store", threads=2)
    with tricomp_torch.Checkpointer(store) as ckpt:
        for step in (1, 2):
            with at_most(ENCODING + DECODING * (step > 1) + n_state * (step == 1)):  # the snapshot's memory is kept
                saving = ckpt.save(step, model=net, optimizer=sgd)
                assert saving is not None
                saving.result()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.view(torch.int32).bitwise_xor_(words[step] & 63)
        saved = net.embedding[::4097].clone()
    with at_most(DECODING):
        assert store.verify().is_clean
    with at_most(DECODING):
        restored = tricomp_torch.Checkpointer(store).restore(model=net, optimizer=sgd)
    assert restored is not None
    assert restored.step == 2
    flat = store.load(2)
    for name, tensor in net.state_dict().items():
        assert flat["model"][name].tobytes() == tensor.detach().view(torch.uint8).numpy().tobytes(), name
    for number, parameter in enumerate(net.parameters()):
        moment = sgd.state[parameter]["momentum_buffer"]
        assert flat["optimizer"]["state"][number]["momentum_buffer"].tobytes() == moment.numpy().tobytes()
    assert not torch.equal(saved, net.embedding[::4097])  # it was trained on after the last save
    print("n_state", n_state)


if __name__ == "__main__":
    main(sys.argv[1])
