"""A counter hash in tensor operations: 32 bits as a function of a key's two words and the index of an element.

The mixer is the 32-bit finaliser with multipliers 0x21f0aaad and 0x735a2d97 found by C. Wellons' hash-prospector
(github.com/skeeto/hash-prospector, issue 19). Keys are mixed in int64, where products of 32-bit values fit, since both
multipliers are below 2**31. Elements are mixed in int32, in half the time or less: products keep their low 32 bits, which
are the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_SIGN = -(1 << 31)
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0x735A2D97


def words(*parts: object) -> tuple[int, int]:
    """Hash printable parts (a seed, a name) to two 32-bit words, stable across processes and Python versions."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def mix_key(x: Tensor, salt: Tensor) -> Tensor:
    """Hash int64 values in [0, 2**32) to the same range; `salt` enters between the two rounds."""
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIER_1) & MASK
    x = x ^ (x >> 15) ^ salt
    x = (x * _MULTIPLIER_2) & MASK
    return x ^ (x >> 15)


def _mix_elements(x: Tensor, salt: Tensor) -> Tensor:
    """Hash int32 values that stand for their 32 bits, to the same bits as `mix_key`."""
    x = x ^ (x >> 16 & 0xFFFF)  # a shift of signed numbers fills with the sign
    x = x * _MULTIPLIER_1
    x = x ^ (x >> 15 & 0x1FFFF) ^ salt
    x = x * _MULTIPLIER_2
    return x ^ (x >> 15 & 0x1FFFF)


def hashed(keys: Tensor, numel: int, start: int = 0) -> Tensor:
    """Compute the bits of `numel` elements from `start` on for one or several keys.

    Args:
        keys: int64, shape (..., 2), two 32-bit words each.
        numel: elements per key.
        start: index of the first.

    Returns:
        int32, shape (..., numel); each stands for its 32 bits, see `unsigned` and `at_least`.
    """
    first, second = _low_bits(keys).unsqueeze(-2).unbind(-1)
    # Zero, but unknown to a C++ compiler, which may assume that int32 never overflows: it would take a product of
    # 0, 1, ... to be positive, and drop the masks above.
    zero = _low_bits(keys[..., :1] >> 32)
    if start + numel <= 1 << 31:
        counter = torch.arange(start, start + numel, dtype=torch.int32, device=keys.device) + zero
        return _mix_elements(_mix_elements(counter, first), second)
    wide = torch.arange(start, start + numel, dtype=torch.int64, device=keys.device)
    return _mix_elements(_mix_elements(_low_bits(wide) + zero, first) ^ _low_bits(wide >> 32), second)


def unsigned(hashes: Tensor) -> Tensor:
    """Return the bits of int32 values as int64 values in [0, 2**32)."""
    return hashes.to(torch.int64) & MASK


def at_least(threshold: int, hashes: Tensor) -> Tensor:
    """Return where the bits of int32 values, read as unsigned numbers, are at least a threshold in [0, 2**32)."""
    return hashes ^ _SIGN >= threshold + _SIGN


def _low_bits(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64 values, as int32."""
    return x.to(torch.int32)
