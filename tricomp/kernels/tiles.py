"""How much of a product a program computes: tiles for few rows and many, and what a kernel is compiled with for them.

Plain Python. The hard thing: where inputs become codes, bytes may not hang on the tile that a clock has chosen. Sums of
codes are exact, but those of groups are floats: so how many inputs are summed before they are scaled is one rule here.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_STEP = 128  # inputs of a group whose products are summed before they are scaled; bytes hang on it
FEW_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Rows and outputs of a program, bytes of each row of inputs that it reads at a time, and how it runs."""

    rows: int
    outs: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.outs} x {self.depth}"


# Few rows: every weight is used once, so that memory is all, and programs must be many. Many rows: arithmetic is all.
FEW = (Tile(16, 32, 256, 2, 4), Tile(16, 16, 256, 1, 4), Tile(16, 64, 128, 4, 4))
SOME = (Tile(64, 64, 128, 4, 3), Tile(64, 32, 128, 4, 3))
MANY = (Tile(128, 128, 128, 8, 3), Tile(64, 64, 128, 4, 3))
MANY_OF_MORE = (Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3))


def tiles_for(n_rows: int, has_more: bool) -> tuple[Tile, ...]:
    """Tiles that may be best, the likeliest first. has_more: groups with sums of their own, or float32 in pieces."""
    if n_rows <= FEW_ROWS:
        return FEW
    if n_rows <= SOME[0].rows:
        return SOME
    return MANY_OF_MORE if has_more else MANY


def constants_of(tile: Tile, n_in: int, bits: int, group: int, is_dynamic: bool, n_pieces: int) -> dict[str, int]:
    """What product_kernel is compiled with for rows of n_in. group: inputs that share a scale, 0: all of a row."""
    depth = tile.depth if is_dynamic else tile.depth // 2
    step = min(group & -group, depth, MOST_STEP) if group else depth
    depth = max(step, 32 if is_dynamic else 16)
    return {
        "IS_DYNAMIC": int(is_dynamic),
        "PIECES": n_pieces,
        "BITS": 4 if bits == 4 else 8,  # 5 to 7 bits stand a byte each, as 8 do
        "GROUP": group,
        "IS_EVEN": int(n_in % step == 0 and depth == step),
        "STEP": step,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "OUTS": tile.outs,
        "STAGES": tile.stages,
    }
