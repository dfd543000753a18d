"""CRC-32C of many records at once, as TFRecord files carry it: one table step per two bytes, for all records together.

A byte at a time in Python takes longer than everything else that reading an event file does.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
_MASK_DELTA = 0xA282EAD8  # TFRecord stores ((crc >> 15) | (crc << 17)) + this


def masked(data: np.ndarray) -> np.ndarray:
    """Return the masked CRC-32C of every row of an (n, length) array of bytes, as uint32."""
    import numpy as np  # noqa: PLC0415 - the package imports without numpy

    one, two = _tables()
    count, length = data.shape
    crc = np.full(count, 0xFFFFFFFF, np.uint32)
    words = np.ascontiguousarray(data[:, : length - length % 2]).view(np.uint16)
    for column in np.ascontiguousarray(words.T):
        crc = two[(crc ^ column) & 0xFFFF] ^ (crc >> 16)
    if length % 2:
        crc = one[(crc ^ data[:, -1]) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15) | (crc << 17)) + np.uint32(_MASK_DELTA)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the tables for one byte and for two."""
    import numpy as np  # noqa: PLC0415

    def steps(values: np.ndarray, bits: int) -> np.ndarray:
        for _ in range(bits):
            values = (values >> 1) ^ np.where(values & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
        return values

    return steps(np.arange(1 << 8, dtype=np.uint32), 8), steps(np.arange(1 << 16, dtype=np.uint32), 16)
