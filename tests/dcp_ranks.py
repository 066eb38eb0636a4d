"""Ranks for tests of distributed checkpoints: a process that has imported torch forks them, group after group.

One line of JSON on stdin starts a group: {"n": ranks, "scene": name, "folder": path, "options": {...}}. Each rank runs
the scene; the answer is one line of JSON: exit codes (negative: signals) and what the ranks had to say.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback

import torch
import torch._dynamo  # torch imports it late, which would be in every rank
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

SECONDS = 240.0  # that a group may take


class Net(torch.nn.Module):
    """Sizes that no number of ranks divides, a shard that is empty on the last of four, tied weights, a buffer."""

    def __init__(self, width=131, inner=257):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, width)
        self.inner = torch.nn.Sequential(torch.nn.Linear(width, inner), torch.nn.GELU(), torch.nn.Linear(inner, width))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 7, bias=False, dtype=torch.bfloat16)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, tokens):
        x = self.norm(self.inner(self.embedding(tokens)))
        return self.head(x.bfloat16()).float()


def begin(mesh=None, seed=0, **sizes):
    """A model, sharded over a mesh if there is one, and its optimizer."""
    torch.manual_seed(seed)
    model = Net(**sizes)
    if mesh is not None:
        for part in (model.head, model.inner, model):
            fully_shard(part, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def train(run, n_steps, seed):
    """Steps on the same data on all ranks."""
    model, optimizer = run
    torch.manual_seed(seed)
    for _ in range(n_steps):
        tokens = torch.randint(5, (11,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()


def state_of(run, **more):
    model, optimizer = get_state_dict(run[0], run[1])
    return {"model": model, "optimizer": optimizer, **more}


def restore(run, state):
    set_state_dict(*run, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole(node):
    """A state with every tensor as dtype, shape and bytes of the whole of it: on all ranks at a time."""
    if isinstance(node, DTensor):
        node = node.full_tensor()
    if isinstance(node, torch.Tensor):
        data = node.detach().contiguous().reshape(-1)
        return str(node.dtype), list(node.shape), data.view(torch.uint8).numpy().tobytes().hex() if len(data) else ""
    if isinstance(node, dict):
        return {key: whole(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [whole(value) for value in node]
    return node


def blank(node):
    """A state of the same form with other values everywhere."""
    if isinstance(node, torch.Tensor):
        with torch.no_grad():
            return torch.full_like(node, 1)
    if isinstance(node, dict):
        return {key: blank(value) for key, value in node.items()}
    if isinstance(node, list):
        return [blank(value) for value in node]
    return None


def _rank(number, n, store, scene, folder, options):
    """One rank, from its birth to its end."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(n)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=n)
    scene(number, n, folder, **options)
    dist.barrier()
    dist.destroy_process_group()


def _group(n, scene, folder, options):
    """Fork the ranks of a group and wait for them. Returns exit codes and what was said."""
    with tempfile.TemporaryDirectory() as here:
        ranks = {}
        for number in range(n):
            said = os.path.join(here, f"{number}.txt")
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                    _rank(number, n, os.path.join(here, "store"), scene, folder, options)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            ranks[pid] = number
        codes: dict[int, int] = {}
        deadline = time.monotonic() + SECONDS
        while len(codes) < n:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                for waiting, number in ranks.items():
                    if number not in codes:
                        os.kill(waiting, signal.SIGKILL)
                deadline = float("inf")
            else:
                time.sleep(0.01)
        texts = []
        for number in range(n):
            with open(os.path.join(here, f"{number}.txt"), errors="replace") as file:
                texts.append(file.read())
        return [codes[number] for number in range(n)], texts


def serve(scenes):
    """Answer each line of stdin by the codes and texts of a group."""
    for line in sys.stdin:
        asked = json.loads(line)
        codes, texts = _group(asked["n"], scenes[asked["scene"]], asked["folder"], asked["options"])
        print(json.dumps({"codes": codes, "texts": texts}), flush=True)
