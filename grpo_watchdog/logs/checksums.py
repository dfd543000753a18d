"""Checksums: CRC-32C, masked as TensorFlow's record files have it, of many stretches of a buffer at once.

Without its first and last inversion a CRC is linear: zeros in front change nothing, and the CRC of A + B is that of A,
moved on by the length of B, XOR that of B. So stretches of all lengths are set right-aligned into one matrix, every
64 bytes of it are a lane of their own, and the lanes are folded in pairs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from grpo_watchdog.logs.short_checksum import DELTA, TABLE

Words = NDArray[np.uint32]
Places = NDArray[np.int64]

_LANE = 64  # bytes
_NARROW, _GRAIN = 8, 16  # bytes: the widths of matrices of one lane
_BLOCK = 1 << 22  # bytes of a matrix that is worked on at once
_SEED = 4  # bytes at the beginning that the first inversion comes down to


def masked(buffer: bytes, starts: Places, lengths: Places) -> Words:
    """Return the masked CRC-32C of each stretch of a buffer.

    Args:
        buffer: where they lie.
        starts: where each begins; in front of each there are 8 bytes or more.
        lengths: how long each is, 4 bytes or more [bytes].
    """
    found = np.zeros(len(starts), np.uint32)
    powers = 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    small = np.where(lengths > _NARROW, -(-lengths // _GRAIN) * _GRAIN, _NARROW)
    widths = np.where(lengths > _LANE, powers, small)
    for width in map(int, np.unique(widths)):
        (of_it,) = np.nonzero(widths == width)
        at_once = max(1, _BLOCK // width)
        for first in range(0, len(of_it), at_once):
            some = of_it[first : first + at_once]
            found[some] = _crc(buffer, starts[some], lengths[some], width)
    return ((found >> np.uint32(15)) | (found << np.uint32(17))) + np.uint32(DELTA)


def words_at(buffer: bytes, places: Places) -> Words:
    """Return the four bytes at each place as a number, little end first."""
    taken = sliding_window_view(np.frombuffer(buffer, np.uint8), 4)[places]
    return taken.view("<u4").astype(np.uint32)[:, 0]


def _crc(buffer: bytes, starts: Places, lengths: Places, width: int) -> Words:
    size = min(width, _LANE)
    lanes = _aligned(buffer, starts, lengths, width).view("<u4").reshape(-1, size // 4).T.copy()
    near, far = _pair_table(), _far_pair_table()
    crc: Words = np.zeros(lanes.shape[1], np.uint32)
    for column in lanes:
        crc ^= column
        halves = crc.astype("<u4").view("<u2").reshape(-1, 2)
        crc = far.take(halves[:, 0])
        crc ^= near.take(halves[:, 1])
    folded: Words = crc.reshape(len(starts), -1)
    while folded.shape[1] > 1:
        folded = _moved(folded[:, ::2], size) ^ folded[:, 1::2]
        size *= 2
    return ~folded[:, 0]


def _aligned(buffer: bytes, starts: Places, lengths: Places, width: int) -> NDArray[np.uint8]:
    """Return the stretches as rows that end at the right edge, zeros in front, their first bytes inverted."""
    content = np.frombuffer(buffer, np.uint8)
    ends = starts + lengths
    matrix: NDArray[np.uint8]
    if len(content) >= width:
        matrix = sliding_window_view(content, width)[np.maximum(ends - width, 0)]
    else:
        matrix = np.zeros((len(starts), width), np.uint8)
    for row in np.nonzero(ends < width)[0].tolist():  # too near to the beginning of the buffer for a window
        matrix[row, width - lengths[row] :] = content[starts[row] : ends[row]]
    if width <= _LANE:
        kept, inverted = _patterns(width)
        matrix &= kept[lengths]
        matrix ^= inverted[lengths]
    else:
        for row, zeros in enumerate((width - lengths).tolist()):
            matrix[row, :zeros] = 0
            matrix[row, zeros : zeros + _SEED] ^= 0xFF
    return matrix


@cache
def _patterns(width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return, by length, which bytes of a row are kept, and which of these are inverted."""
    place, length = np.arange(width), np.arange(width + 1)[:, None]
    kept = place >= width - length
    inverted = kept & (place < width - length + _SEED)
    return (kept * 0xFF).astype(np.uint8), (inverted * 0xFF).astype(np.uint8)


@cache
def _byte_table() -> Words:
    return np.array(TABLE, np.uint32)


@cache
def _pair_table() -> Words:
    """Return what two bytes, little end first, become: one look-up instead of two."""
    crc: Words = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        crc = _byte_table()[crc & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return crc


@cache
def _far_pair_table() -> Words:
    """Return what two bytes become that have two others behind them."""
    return _moved(_pair_table(), 2)


@cache
def _zeros_table(size: int) -> Words:
    """Return, for each byte of a CRC at each of its four places, what `size` zero bytes behind it make of it."""
    bits = np.arange(256, dtype=np.uint32)
    crc: Words = np.stack([bits << np.uint32(8 * place) for place in range(4)])
    if size == 1:
        moved: Words = _byte_table()[crc & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
        return moved
    return _moved(_moved(crc, size // 2), size // 2)


def _moved(crc: Words, size: int) -> Words:
    """Return CRCs with `size` zero bytes behind; `size` is a power of two."""
    table, low = _zeros_table(size), np.uint32(0xFF)
    moved: Words = table[0][crc & low]
    for place in (1, 2, 3):
        moved = moved ^ table[place][(crc >> np.uint32(8 * place)) & low]
    return moved
