"""Kernels compiled ahead of time, and what their machine code holds. Imports the standard library; workers triton.

Started as `python -m tests.kernel_code`, it is such a worker: a process of its own, since Triton decides at its import
whether it compiles or interprets. The hard thing is the loop over rows of 128 words, where all time goes: it is the
longest stretch of code between a label and a branch back to it. Whoever reads it finds 256 words coded a trip: a
program has 8 chunks on 4 warps; a warp of 32 lanes holds two chunks, one value a lane in two registers, and codes a row
of each; a wave of 64 holds the same two in one. So a trip's instructions, over 8, are those for 32 words.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.kernel_variants import TARGETS, WARPS, C, Variant, variants

ROOT = Path(__file__).resolve().parents[1]
GROUPS = 128 * C // WARPS // 32  # of 32 words, that a warp codes in a trip of the loop

# Opcodes of sm_80 to sm_100 by what they keep busy, see `cycles` in tests.benchmarks.kernels.
_UNITS = {
    "wide": re.compile(r"IMAD\.(WIDE|HI)"),
    "multiply": re.compile(r"IMAD|FFMA|FADD|FMUL|IDP"),
    "convert": re.compile(r"POPC|FLO|BREV|I2F(?!P)|F2I|F2F|I2I|MUFU|C?REDUX"),
    "load": re.compile(r"LD[GSLC]?\b|LD[GSL]\."),
    "store": re.compile(r"ST[GSL]?\b|ST[GSL]\.|RED\b|ATOM"),
    "shuffle": re.compile(r"SHFL"),
    "branch": re.compile(r"BRA|BRX|CALL|RET|BSSY|BSYNC|WARPSYNC|BAR|EXIT|NOP|YIELD|DEPBAR"),
    "uniform": re.compile(r"U[A-Z]|R2UR|S2UR"),
}
_SPILL = re.compile(r"\b(LDL|STL|scratch_(load|store)\w*)\b")
_AMD_UNITS = {
    "load": re.compile(r"(global|buffer|flat|scratch)_load|ds_read"),
    "store": re.compile(r"(global|buffer|flat|scratch)_store|ds_write"),
    "shuffle": re.compile(r"ds_(bpermute|permute|swizzle)"),
    "branch": re.compile(r"s_(cbranch|branch|nop|waitcnt|barrier|endpgm)"),
    "scalar": re.compile(r"s_"),
}


def _unit(instruction: str) -> str:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
    unit = next((unit for unit, pattern in _UNITS.items() if pattern.match(opcode)), "integer")
    width = re.search(r"\.(64|128)\b", opcode) if unit in ("load", "store") else None
    return f"{unit}_{width[1]}" if width else unit


def _amd_unit(instruction: str) -> str:
    return next((unit for unit, pattern in _AMD_UNITS.items() if pattern.match(instruction)), "vector")


def _longest_loop(lines: list[str], branches: Sequence[tuple[int, str]], labels: dict[str, int]) -> list[str]:
    """The instructions from a label to the branch back to it; none if there is no loop. branches: (place, label)."""
    loops = [lines[labels[label] : place + 1] for place, label in branches if labels.get(label, len(lines)) <= place]
    return max(loops, key=len, default=[])


def _sass(text: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the loop. text: what nvdisasm prints."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    jumps = [re.search(r"BRA.*`\((\.L_x_\d+)\)", line) for line in lines]
    branches = [(place, jump[1]) for place, jump in enumerate(jumps) if jump]
    return lines, _longest_loop(lines, branches, labels)


def _amdgcn(text: str) -> tuple[list[str], list[str]]:
    """The same of AMD's assembly."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\t([a-z]\w+[^;]*)", line):
            lines.append(instruction[1].strip())
        if "s_endpgm" in line:
            break
    jumps = [re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line) for line in lines]
    branches = [(place, jump[1]) for place, jump in enumerate(jumps) if jump]
    return lines, _longest_loop(lines, branches, labels)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia(binary: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(binary)
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        lines, loop = _sass(_tool("nvdisasm", "-c", str(cubin)))
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    is_spilt = any(_SPILL.search(line) for line in lines)
    spilt = max(used["STACK"], used["LOCAL"], int(is_spilt))
    return {"registers": used["REG"], "spilt_bytes": spilt, **_counts(lines, loop, _unit)}


def _amd(text: str) -> dict[str, Any]:
    used = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spilt = used["private_segment_fixed_size"] + 4 * used["vgpr_spill_count"] + 4 * used["sgpr_spill_count"]
    registers = {"registers": used["vgpr_count"], "scalar_registers": used["sgpr_count"]}
    return {**registers, "spilt_bytes": spilt, **_counts(*_amdgcn(text), _amd_unit)}


def _counts(lines: Sequence[str], loop: Sequence[str], unit: Any) -> dict[str, Any]:
    units = Counter(map(unit, loop))
    spills = sum(1 for line in loop if _SPILL.search(line))
    return {
        "instructions": len(lines),
        "loop": len(loop),
        "spills_in_loop": spills,
        "units": dict(sorted(units.items())),
    }


def measure(variant: Variant, target: str) -> dict[str, Any]:
    """Compile a kernel for a target, with the options of a launch. Registers, bytes spilt, shared memory, counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [i for i, (name, kind) in enumerate(variant.signature) if kind.startswith("*") or name in variant.even]
    source = ASTSource(
        variant.function(),
        signature=dict(variant.signature),
        constexprs=variant.constants_on(target),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # as a launch finds torch's memory
    )
    options = {"num_warps": variant.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    code = _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    names = {"variant": variant.name, "target": target, "triton": triton.__version__}
    return {**names, "shared": compiled.metadata.shared, **code}


def measure_all(
    tasks: Iterable[tuple[str, str]], n_processes: int, cache: Path, python: str = sys.executable
) -> list[dict[str, Any]]:
    """Measure variants for targets, in processes. tasks: names of both. cache: a folder for what is compiled.

    python: another than this one has packages of its own, and is told of no others.
    """
    waiting: queue.SimpleQueue[tuple[int, tuple[str, str]]] = queue.SimpleQueue()
    tasks = list(tasks)
    for task in enumerate(tasks):
        waiting.put(task)
    found: dict[int, dict[str, Any]] = {}
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)

    def work() -> None:
        command = [python, "-m", "tests.kernel_code"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            while not waiting.empty():
                try:
                    number, task = waiting.get_nowait()
                except queue.Empty:
                    return
                child.stdin.write(json.dumps(task) + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
                if not answer:
                    return
                found[number] = json.loads(answer)
            child.stdin.close()

    threads = [threading.Thread(target=work) for _ in range(n_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if missing := [tasks[i] for i in range(len(tasks)) if i not in found]:
        raise RuntimeError(f"a compiling process ended early; not done: {missing}")
    return [found[i] for i in range(len(tasks))]


def main() -> None:
    """Answer tasks, a line of JSON each."""
    for line in sys.stdin:
        name, target = json.loads(line)
        try:
            answer = measure(variants()[name], target)
        except Exception as error:  # whatever a compiler of another version makes of it
            answer = {"variant": name, "target": target, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
