"""Damage to valid files, drawn by hypothesis: flipped bits, cuts, splices and extreme numbers."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

EXTREME = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"[" * 400,
    b"{" * 400,
    b'"\\ud800"',
    b"\n\x1b[2J",
    b"null",
    b"!!python/object:os.system",
]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, most: int = 3) -> bytes:
    """`whole` with up to `most` kinds of damage, more of it near the start, where headers are."""
    blob = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        reach = draw(st.sampled_from([min(24, len(blob)), min(2200, len(blob)), len(blob)]))
        if not reach:
            break
        place = draw(st.integers(0, reach - 1))
        kind = draw(st.sampled_from(["flip", "cut", "splice", "number", "text", "byte"]))
        if kind == "flip":
            blob[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del blob[place:]
        elif kind == "splice":
            start = draw(st.integers(0, len(blob) - 1))
            blob[place:place] = blob[start : start + draw(st.integers(1, 64))]
        elif kind == "number":
            form = draw(st.sampled_from(["<Q", "<I", "<H"]))
            value = draw(st.sampled_from(EXTREME)) % (1 << 8 * struct.calcsize(form))
            blob[place : place + struct.calcsize(form)] = struct.pack(form, value)
        elif kind == "text":
            blob[place : place + draw(st.integers(0, 8))] = draw(st.sampled_from(TEXTS))
        else:
            blob[place] = draw(st.integers(0, 255))
    return bytes(blob)
