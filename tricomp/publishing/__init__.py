"""Weights for inference servers, version by version: publish on the trainer's side, apply on the server's.

    tricomp.publishing.publish(state, "/shared/run", 7)          # what changed since version 6
    tricomp.publishing.apply("/local/model", "/shared/run")      # from whatever version is there to the newest

The layout is the one that trainers and inference servers share (slime, miles, SGLang's /pull_weights, vime, stitch):

- `weight_v{N:06d}/` is version N. It is there when `model.safetensors.index.json` is, which is written last.
- A **delta** has in the index's metadata version, base_version (both six digits or more), delta_encoding (xor |
  overwrite), compression_format (zstd) and checksum_format (xxh3-128 | blake3 | adler32). Its weight_map names the
  tensors that changed and no others, its shards hold for each a flat U8 tensor, one zstd frame, and in their
  `__metadata__`, under the tensor's name, the checksum of all raw bytes of the tensor as this version has it.
- xor: the raw bytes of the tensor xor those of the base. overwrite: u32 n, then the places of n bytes (u32 each), then
  the n bytes; little-endian. Places count bytes, not elements.
- A **full** version is an ordinary checkpoint: an index without delta_encoding (or model.safetensors alone).
- Version 0 is the model that servers begin with, and need not be in the folder.

What sources leave open, and is so here: base_version is always version - 1, since servers count on it; a delta in
which nothing changed has an empty weight_map and no shard; zstd frames carry their content size and a checksum; a full
version keeps tensors' checksums in `__metadata__` under "tricomp.<format>:<name>" ("mx.adler32:<name>", which
ModelExpress reads); extra texts of other writers are left alone. With format="tri" a version is one file,
`weight_v{N:06d}/model.tri`, whose parent is version N - 1: smaller, and for apply alone to read. A copy on a server's
disk keeps its mark in `.weight_sync/state.json`, as SGLang does.
"""

from tricomp.publishing.application import Application
from tricomp.publishing.publication import Publication
from tricomp.publishing.publisher import Publisher
from tricomp.publishing.server import apply
from tricomp.publishing.trainer import publish

__all__ = ["Application", "Publication", "Publisher", "apply", "publish"]
