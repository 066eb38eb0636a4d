"""Lightning: a CheckpointIO plugin, so that the Trainer's own checkpoints are `.tri` files.

>>> from tricomp_torch.lightning import TricompCheckpointIO  # doctest: +SKIP
>>> trainer = Trainer(plugins=[TricompCheckpointIO()], callbacks=[ModelCheckpoint(save_last=True)])  # doctest: +SKIP
>>> trainer.fit(model, ckpt_path="last")  # doctest: +SKIP

Works with `lightning`, and with `pytorch_lightning` and `lightning_fabric`. Imported by name only: `import
tricomp_torch` does without any of them.
"""

from tricomp_torch.lightning.plugin import TricompCheckpointIO
from tricomp_torch.lightning.reading import export, load_from_checkpoint

__all__ = ["TricompCheckpointIO", "export", "load_from_checkpoint"]
