"""CRC-32C of a few bytes, masked as TensorFlow's record files have it; `checksums` has it of many stretches at once."""

from __future__ import annotations

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed; RFC 3720, appendix B.4
DELTA = 0xA282EAD8  # of the mask
_WORD = 0xFFFFFFFF


def _entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


TABLE = tuple(map(_entry, range(256)))  # what each byte becomes


def masked_crc(content: bytes) -> int:
    """Return the masked checksum of some bytes."""
    crc = _WORD
    for byte in content:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= _WORD
    return ((crc >> 15 | crc << 17) + DELTA) & _WORD
