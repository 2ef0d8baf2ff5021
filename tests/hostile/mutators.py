"""Seeded changes of bytes and of JSON: what a damaged disk, a careless tool or somebody who means harm makes of a file."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**31), 2**63, 10**30, 1.5, 1e308, -1e308, float("nan"), float("inf"), "", "x", "nan", "-inf",
    "../../etc", "\u0000", "\ud800", "é" * 300, [], {}, [[]], {"a": 1}, [1, 2, 3],
)  # fmt: skip


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Bits, cuts, splices, lengths, runs of one byte."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not made:
            break
        # the beginning holds what says how the rest is read
        place = rng.randrange(len(made) if rng.random() < 0.5 else min(len(made), 4096))
        match rng.randrange(7):
            case 0:
                made[place] ^= 1 << rng.randrange(8)
            case 1:
                del made[place:]
            case 2:
                other = rng.randrange(len(made))
                made[place : place + 64] = made[other : other + 64]
            case 3:
                made[place : place + 8] = rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little")
            case 4:
                made[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"))
            case 5:
                del made[place : place + rng.randrange(1, 64)]
            case 6:
                made[place:place] = bytes([rng.randrange(256)]) * rng.randrange(1, 64)
    return bytes(made)


def json_changed(value: Any, rng: random.Random) -> Any:
    """A value somewhere inside is another, gone, twice, or under another name."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        inner = made
        while isinstance(inner, dict | list) and inner:
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.15:
                break
            inner = inner[key]
        if not isinstance(inner, dict | list) or not inner:
            return copy.deepcopy(rng.choice(ODD))
        match rng.randrange(4):
            case 0:
                del inner[key]
            case 1 if isinstance(inner, dict):
                inner[f"{key}x"] = inner.pop(key)
            case 2 if isinstance(inner, list):
                inner.append(copy.deepcopy(inner[key]))
            case _:
                inner[key] = copy.deepcopy(rng.choice(ODD))
    return made


def text_changed(data: bytes, rng: random.Random) -> bytes:
    """JSON that says something else, JSON that is deep, or bytes that are no JSON."""
    match rng.randrange(8):
        case 0:
            return b"[" * rng.choice((10, 2_000, 100_000))
        case 1:
            return b'{"a":' * rng.choice((10, 2_000, 100_000)) + data
        case 2 | 3:
            return bytes_changed(data, rng)
    return json.dumps(json_changed(json.loads(data), rng)).encode()
