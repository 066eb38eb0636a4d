"""FORMAT.md against the code: its worked example byte by byte, its tables of dtypes and plan fields."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from importlib.resources import files

import numpy as np

from tricomp import dtypes
from tricomp.job import DecodeJob, EncodeJob, Side, Tables
from tricomp.plan import ENTROPIES, PREDICTIONS, REMAINDERS, Plan
from tricomp.reference import decode as decoder
from tricomp.reference import encode as encoder

TEXT = (files("tricomp") / "FORMAT.md").read_text(encoding="utf-8")


def test_the_worked_frame_is_what_the_encoder_writes():
    listing = TEXT.split("## A frame, byte by byte")[1].split("```")[1]
    shown = bytes.fromhex("".join(line.split(":")[1] for line in listing.strip().splitlines()))
    wire = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", TEXT.split("Plan `{")[1].split("}`")[0])}
    words = np.full(130, 7, np.uint16)
    words[::4] = 9
    words[77] = 200
    plan = Plan(dtypes.by_name("uint16"), 130, "palette", chunk_log2=10, entropy="rans", n_symbols=2)
    side = Side(Tables(np.array([[1536, 512]]), 11), palette=np.array([7, 9], np.uint16))
    encoded = encoder.encode([EncodeJob(plan, side, words)])[0]
    complete, data = encoded.plan, encoded.data
    assert data == shown
    assert complete.to_wire() == wire
    assert np.array_equal(decoder.decode([DecodeJob(Plan.from_wire(wire), shown)])[0], words)


def rows_of(heading):
    section = TEXT.split(heading)[1].split("\n## ")[0].split("\n### ")[0]
    lines = [line for line in section.splitlines() if line[:3] != "|--"]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_every_dtype_is_listed_with_its_fields():
    listed = {}
    for row in rows_of("## Words and dtypes"):
        if len(row) != 6 or row[0] == "number":
            continue
        for number, name, width in zip(*(row[i].split(", ") for i in range(3))):
            listed[name] = (int(number), int(width), int(row[3]), int(row[4]), row[5] == "yes")
    for name in dtypes.NAMES:
        dtype = dtypes.by_name(name)
        row = listed.pop(name)
        if name == "bool":
            assert row[:2] == (24, 8)
            continue
        assert row == (dtype.number, dtype.word_bits, dtype.exponent_bits, dtype.mantissa_bits, dtype.is_signed), name
    assert not listed


def test_every_plan_field_is_listed_with_key_and_default():
    listed = {}
    for row in rows_of("### Plan\n"):
        if len(row) == 5 and row[0] != "key" and all(len(key) <= 2 for key in row[0].replace("`", "").split(", ")):
            keys, names, defaults = (row[i].replace("`", "").split(", ") for i in (0, 1, 3))
            listed.update({key: (name, default) for key, name, default in zip(keys, names, defaults * len(keys))})
    for spec in fields(Plan):
        name, default = listed.pop(spec.metadata["key"])
        assert name == spec.name
        if spec.default is MISSING:
            assert default == "required"
        elif spec.default is None:
            assert default == "absent"
        elif spec.name == "factor":
            assert default == "2^30"
        else:
            names = spec.metadata.get("names")
            assert int(default) == (names.index(spec.default) if names else int(spec.default)), name
    assert not listed


def test_registered_numbers_are_the_documented_ones():
    assert ", ".join(f"{i} {name.replace('_', ' ')}" for i, name in enumerate(PREDICTIONS)) in TEXT
    assert ", ".join(f"{i} {name}" for i, name in enumerate(ENTROPIES)) in TEXT
    assert ", ".join(f"{i} {name}" for i, name in enumerate(REMAINDERS)) in TEXT
