"""The speed benchmark's results as Markdown, and its verdict on what the backend must reach. Standard library only.

The hard thing: every figure here is computed from the results file, so that none can be better than what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
WAYS = ("in", "out")
WHO = ("memcpy", "zstd -1", "zstd -3", "blosc2 lz4", "blosc2 zstd", "ZipNN", "tricomp fast", "tricomp dense")
README_WHO = ("memcpy", "zstd -1", "blosc2 zstd", "ZipNN", "tricomp fast", "tricomp dense")
README_WORKS = (
    "w bfloat16", "w float32", "m float32", "v float32",
    "w bfloat16, 1 apart", "w bfloat16, 10 apart", "w bfloat16, 100 apart",
    "w float32, 1 apart", "w float32, 10 apart", "w float32, 100 apart", "v float32, 10 apart",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """One thing that must be reached, on one piece of work."""

    must: str
    work: str
    target: float
    measured: float

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.target


def _of(row: Results, who: str, threads: int) -> Results | None:
    found = (one for one in row["results"] if (one["who"], one["threads"]) == (who, threads))
    return next(found, None)


def _is_large(row: Results) -> bool:
    return bool(row["form"] == "layers" and row["dtype"] in ("bfloat16", "float32"))


def _against_zipnn(results: Results) -> Iterator[Verdict]:
    names = {"bfloat16": "bf16", "float32": "fp32"}
    for row in filter(_is_large, results["works"]):
        dense, zipnn = (_of(row, who, 1) for who in ("tricomp dense", "ZipNN"))
        if dense is None or zipnn is None:
            continue
        if row["mode"] == "full":
            for way, target in (("in", 4.0), ("out", 2.5)):
                must = f"{names[row['dtype']]} full dense, {way}: {target:g}x ZipNN"
                yield Verdict(must, row["work"], target, dense[way] / zipnn[way])
        if row["mode"] in ("delta", "scaled_delta"):
            for way in WAYS:
                yield Verdict(f"deltas, {way}: 3x ZipNN on XOR", row["work"], 3.0, dense[way] / zipnn[way])


def _of_tiers(results: Results) -> Iterator[Verdict]:
    for row in filter(_is_large, results["works"]):
        dense, fast = (_of(row, f"tricomp {tier}", 1) for tier in ("dense", "fast"))
        if row["mode"] in ("full", "delta", "scaled_delta") and dense and fast:
            yield Verdict("fast tier, in: 2x dense", row["work"], 2.0, fast["in"] / dense["in"])


def _of_threads(results: Results) -> Iterator[Verdict]:
    for row in results["scaling"]:
        for who in ("tricomp dense", "tricomp fast"):
            one, two = (_of(row, who, n) for n in (1, 2))
            for way in WAYS:
                if one and two:
                    work = f"{row['work']}, {who.split()[1]}, {way}"
                    yield Verdict("two threads: 1.8x one", work, 1.8, two[way] / one[way])


def _of_sets(results: Results) -> Iterator[Verdict]:
    for row in results["sets"]:
        found = {(one["isa"], one["tier"]): one for one in row["results"]}
        for tier in ("dense", "fast"):
            avx512, avx2 = (found.get((isa, tier)) for isa in ("avx512", "avx2"))
            for way in WAYS:
                if avx512 and avx2:
                    work = f"{row['work']}, {tier}, {way}"
                    yield Verdict("AVX2: 0.5x AVX-512", work, 0.5, avx2[way] / avx512[way])


def cp_seconds(row: Results) -> dict[str, float]:
    """What cp takes to read what a command reads and to write what it writes, by command."""
    seconds = row["seconds"]
    writing = {name: seconds[f"cp_{name}"] - seconds[f"read_{name}"] for name in ("raw", "packed")}
    return {
        "compress": seconds["read_raw"] + writing["packed"],
        "decompress": seconds["read_packed"] + writing["raw"],
    }


def _of_files(results: Results) -> Iterator[Verdict]:
    for row in results["files"]["rows"]:
        share = cp_seconds(row)["decompress"] / row["seconds"]["decompress"]
        yield Verdict("`tricomp decompress`, all cores: 0.7x cp", row["file"], 0.7, share)


def verdicts(results: Results) -> list[Verdict]:
    """Every thing that must be reached, on every piece of work that it was measured on."""
    parts = (_against_zipnn, _of_tiers, _of_threads, _of_sets, _of_files)
    return [verdict for part in parts for verdict in part(results)]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _speed(gigabytes: float) -> str:
    return f"{gigabytes:.3g}" if gigabytes < 100 else f"{gigabytes:.0f}"


def _both_ways(one: Results | None) -> str:
    return " / ".join(_speed(one[way]) for way in WAYS if way in one) if one else ""


def verdict_tables(results: Results) -> str:
    """First what must be reached and the least that was, then every measurement."""
    found = verdicts(results)
    least = [min((v for v in found if v.must == must), key=lambda v: v.measured) for must in {v.must: 0 for v in found}]

    def cells(verdict: Verdict) -> list[str]:
        words = "reached" if verdict.is_reached else "**not reached**"
        return [verdict.work, f"{verdict.target:g}", f"{verdict.measured:.2f}", words]

    titles = {"must reach, one thread if no other is named; the least": least, "each": found}
    columns = ("work", "target", "measured", "")
    return "\n".join(
        _table(title, columns, [[verdict.must, *cells(verdict)] for verdict in some]) for title, some in titles.items()
    )


def speed_table(results: Results, threads: int, names: Sequence[str] = (), who: Sequence[str] = WHO) -> str:
    """GB/s of raw in and out at a number of threads, a row for each piece of work; names: those wanted, else all."""
    rows = {row["work"]: row for row in results["works"]}
    lines = [[name, *(_both_ways(_of(rows[name], one, threads)) for one in who)] for name in names or rows]
    return _table(f"GB/s of raw, in / out, {_threads(threads)}", who, lines)


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def ratio_table(results: Results) -> str:
    """Raw bytes over packed ones."""
    who = WHO[1:]
    lines = []
    for row in results["works"]:
        found = [_of(row, one, results["threads"][0]) for one in who]
        lines.append([row["work"], *(f"{row['raw'] / one['bytes']:,.4g}" if one else "" for one in found)])
    return _table("raw / packed", who, lines)


def share_table(results: Results) -> str:
    """Shares of memcpy at the same number of threads, how it was planned, and what the XOR alone does."""
    columns = [f"tricomp {tier}, {_threads(n)}" for n in results["threads"] for tier in ("dense", "fast")]
    lines = []
    for row in results["works"]:
        cells = []
        for n in results["threads"]:
            memcpy = _of(row, "memcpy", n)
            for tier in ("dense", "fast"):
                one = _of(row, f"tricomp {tier}", n)
                cells.append(" / ".join(f"{one[way] / memcpy['in']:.0%}" for way in WAYS) if one and memcpy else "")
        xor = _of(row, "XOR", 1)
        lines.append([row["work"], *cells, _both_ways(xor), row["plans"]["dense"], row["plans"]["fast"]])
    return _table("share of memcpy, in / out", [*columns, "XOR, GB/s", "plan, dense", "plan, fast"], lines)


def sets_table(results: Results) -> str:
    """GB/s by instruction set."""
    sets = list({one["isa"]: 0 for row in results["sets"] for one in row["results"]})
    lines = []
    for row in results["sets"]:
        found = {(one["isa"], one["tier"]): one for one in row["results"]}
        for tier in ("dense", "fast"):
            lines.append([f"{row['work']}, {tier}", *(_both_ways(found.get((isa, tier))) for isa in sets)])
    return _table("GB/s of raw, in / out, 1 thread", sets, lines)


def scaling_table(results: Results) -> str:
    """GB/s by number of threads."""
    counts = sorted({one["threads"] for row in results["scaling"] for one in row["results"]})
    lines = [
        [f"{row['work']}, {who}", *(_both_ways(_of(row, who, n)) for n in counts)]
        for row in results["scaling"]
        for who in ("memcpy", "tricomp dense", "tricomp fast")
    ]
    return _table("GB/s of raw, in / out", [_threads(n) for n in counts], lines)


def files_table(results: Results) -> str:
    """Large files: seconds of the commands, of the calls, and of cp."""
    columns = ("GB raw", "GB packed", "command", "call", "call, 1 thread", "cp's cost", "share, command", "share, call")
    lines = []
    for row in results["files"]["rows"]:
        for verb, cost in cp_seconds(row).items():
            seconds = [row["seconds"][f"{verb}{suffix}"] for suffix in ("", "_call", "_call_1")]
            sizes = [f"{row[size] / 1e9:.2f}" for size in ("raw", "packed")]
            shares = [f"{cost / spent:.0%}" for spent in seconds[:2]]
            lines.append([f"{verb}: {row['file']}", *sizes, *(f"{spent:.2f} s" for spent in (*seconds, cost)), *shares])
    return _table("large files", columns, lines)


def how(results: Results) -> str:
    """How it was measured, in some sentences."""
    runs = results["runs"]
    isa = f", {results['isa']}" if results["isa"] else ""
    return (
        f"tricomp's {results['backend']} backend{isa}; medians of {runs['peers']} runs after one that warms up, all in "
        "turn; GB are 10^9 bytes.\n"
    )


def readme(results: Results) -> str:
    """The table of README.md: one thread, and tricomp with all."""
    n = max(results["threads"])
    rows = {row["work"]: row for row in results["works"]}
    lines = []
    for name in README_WORKS:
        cells = [_both_ways(_of(rows[name], who, 1)) for who in README_WHO]
        cells[-1] = f"**{cells[-1]}**"
        lines.append([name, *cells, _both_ways(_of(rows[name], "tricomp dense", n))])
    return _table("GB/s of raw, in / out", [*README_WHO, f"tricomp dense, {_threads(n)}"], lines)


def report(results: Results, origin: str) -> str:
    """Everything that was measured, as one Markdown page. origin: of the results, in words."""
    speeds = "\n".join(speed_table(results, n) for n in results["threads"])
    load, runs, files = results["load"], results["runs"], results["files"]
    first = files["rows"][0]
    seconds = {name: f"{spent:.2f} s" for name, spent in first["seconds"].items()}
    return f"""# Speed on the CPU, {results["date"]}

{origin}
{how(results)}
tricomp is measured by `tricomp.encode` and `tricomp.decode`: planning, checksums and digests are in its times.
Whatever was timed came back byte for byte first, and tricomp packed the same bytes with any number of threads and by
every instruction set. All take turns, in another order each time. *n apart*: packed against the state n steps earlier;
the peers, which know no references, get the XOR of the two, and its time (numpy, one thread) counts in both directions.
ZipNN gets bytes that it may destroy, copied off the clock. zstd unpacks on one thread. memcpy writes to memory that is
there already; everybody else allocates what he gives back. blosc2 shuffles; its zstd is level 1, its lz4 level 5. The
same matrix of all blocks is one leaf, as in models that scan over their layers, and everybody packs leaf by leaf; "100
leaves": every parameter of the small GPT by itself, as it is; "all in one leaf": all matrices, one after the other.
float64: weights after a step along the momentum in float64; float8, int8: scaled weights.
The load of the machine was {load["before"]:.2f} before, {load["after"]:.2f} after; all took {results["seconds"]} s.

## Verdict

{verdict_tables(results)}
## Speed

{speeds}
{ratio_table(results)}
{share_table(results)}
## Instruction sets

{sets_table(results)}
Medians of {runs["sets"]} runs, of the reference {runs["reference"]}; processes of their own, in turn.

## Threads

{scaling_table(results)}
## Large files

{files_table(results)}
Files of safetensors on {files["file_system"]}, medians of {runs["files"]} runs; as much memory as an output takes
was written and freed just before, off the clock. "Command" is `tricomp compress -T 0` and `tricomp decompress -T 0`, a
new process each time (`tricomp --version`: {seconds["start"]}); "call" the same functions in a running Python, with all
cores and with one. cp's cost: reading what the command reads and writing what it writes, put together from
`cp --reflink=never` of either file and of either file to /dev/null. Plain cp of the raw file of {first["file"]}:
{seconds["cp_raw_plain"]}, with --reflink=never {seconds["cp_raw"]}.
"""
