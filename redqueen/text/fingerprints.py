"""Fingerprints of canonical text. What is done with them is `redqueen.campaigns` and
`redqueen.adaptation`."""

from __future__ import annotations

import numpy as np

_MIX_A = np.uint64(0x9E3779B97F4A7C15)
_MIX_B = np.uint64(0xBF58476D1CE4E5B9)


def simhash(canonical: str) -> int:
    """Signed 64-bit fingerprint: near-duplicates differ in few bits (see `hamming`), others in about 32.

    Every four bytes of the UTF-8 form are one shingle; each bit is the majority of the shingles' hashes.
    Stable across processes and machines. Empty text gives 0.
    """
    raw = np.frombuffer(canonical.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint64)
    if raw.size == 0:
        return 0
    if raw.size < 4:
        raw = np.pad(raw, (0, 4 - raw.size))
    mixed = raw[:-3] | raw[1:-2] << np.uint64(8) | raw[2:-1] << np.uint64(16) | raw[3:] << np.uint64(24)
    mixed = (mixed + _MIX_A) * _MIX_B
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX_A
    mixed ^= mixed >> np.uint64(32)
    bits = np.unpackbits(mixed.astype("<u8").view(np.uint8)).reshape(mixed.size, 64)
    majority = 2 * bits.sum(axis=0, dtype=np.int64) > mixed.size
    return int.from_bytes(np.packbits(majority).tobytes(), "little", signed=True)


def hamming(a: int, b: int) -> int:
    """How many of the 64 bits of two fingerprints differ (0 to 64)."""
    return ((a ^ b) & 0xFFFF_FFFF_FFFF_FFFF).bit_count()
