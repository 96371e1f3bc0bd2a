"""Encode integers as bytes and decode them: each at its row's bit depth, or entropy coded.

The integers come in groups: those of all rows of one layer that have the same bit depth. A group
of n integers of b bits is written either

- *plain*: n · b bits, each integer plus 2^(b-1), lowest bit first; or
- *coded*: by an ANS coder with a table of how often each of the 2^b integers occurs in the group,
  in about n times the entropy of these frequencies. A frequency takes one byte, the largest is 255,
  and the table is in the order of the integers, the most negative first.

whichever is estimated to be shorter, the table included. All groups together are one array of
bytes: one bit per group (is it coded?), padded to whole bytes; the tables of the coded groups; all
plain groups, padded to whole bytes; and the coder's words of 32 bits, each lowest byte first. The
lowest bit of a byte comes first. One coder, constriction's `AnsCoder`, holds all coded groups; it
is read in the order of the groups, with the model
`Categorical(frequencies / frequencies.sum(), perfect=False)`.
"""

from collections.abc import Sequence

import constriction
import numpy as np

MAX_CODED = 256
"""Most coded integers per byte of the coder: a small file must not unpack into a huge network."""

_WIDEST_TABLE = 12  # bits; tables of deeper groups cost more than they save in realistic networks

Group = tuple[int, np.ndarray]
"""A bit depth from 1 to 16 and (n,) integers from -2^(depth-1) to 2^(depth-1) - 1."""


class DamagedIntegersError(ValueError):
    """The bytes do not hold the integers that they should."""


def encode(groups: Sequence[Group], entropy_coding: bool) -> np.ndarray:
    """Encode `groups` as (bytes,) uint8, all of them plain unless `entropy_coding` is set."""
    unsigned = [_unsigned(depth, values) for depth, values in groups]
    tables = [
        _table(depth, values) if entropy_coding else None
        for (depth, _), values in zip(groups, unsigned, strict=True)
    ]
    coder = constriction.stream.stack.AnsCoder()
    plain = []
    # The coder is a stack: what is read first is written last.
    for (depth, _), values, table in reversed(list(zip(groups, unsigned, tables, strict=True))):
        if table is None:
            plain.append(_to_bits(depth, values))
        else:
            coder.encode_reverse(values.astype(np.int32), _model(table))
    coded = coder.get_compressed().astype("<u4").view(np.uint8)
    if sum(len(v) for v, t in zip(unsigned, tables, strict=True) if t is not None) > (
        MAX_CODED * len(coded)
    ):
        return encode(groups, entropy_coding=False)
    is_coded = np.array([table is not None for table in tables], bool)
    flags = np.packbits(is_coded, bitorder="little")
    parts = [flags, *(t for t in tables if t is not None)]
    parts.append(np.packbits(np.concatenate([*plain[::-1], flags[:0]]), bitorder="little"))
    return np.concatenate([*parts, coded])


def decode(data: np.ndarray, groups: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return the (n,) int32 integers of each group that `encode` was given.

    Args:
        data: (bytes,) uint8, as returned by `encode`.
        groups: bit depth and number of integers of each group.

    Raises:
        DamagedIntegersError: `data` cannot be the encoding of such groups.
    """
    flags_size = -(-len(groups) // 8)
    if len(data) < flags_size:
        raise DamagedIntegersError("there are fewer groups of integers than there should be")
    is_coded = np.unpackbits(data[:flags_size], bitorder="little", count=len(groups)).astype(bool)
    coded_size = sum(n for (_, n), c in zip(groups, is_coded, strict=True) if c)
    plain_size = sum(b * n for (b, n), c in zip(groups, is_coded, strict=True) if not c)
    tables_size = sum(2**b for (b, _), c in zip(groups, is_coded, strict=True) if c)
    # All sizes are checked before anything is unpacked.
    left = len(data) - flags_size - tables_size - -(-plain_size // 8)
    if left < 0:
        raise DamagedIntegersError("there are fewer plain integers than there should be")
    if coded_size > MAX_CODED * left or left % 4:
        raise DamagedIntegersError("the coded integers take another number of bytes")
    _, tables, plain, coded = np.split(
        data, np.cumsum([flags_size, tables_size, len(data) - left - flags_size - tables_size])
    )
    plain = np.unpackbits(plain, bitorder="little", count=plain_size)
    decoder = _decoder(coded)
    found = []
    for (depth, n), from_coder in zip(groups, is_coded, strict=True):
        if from_coder:
            table, tables = tables[: 2**depth], tables[2**depth :]
            if not table.any():
                raise DamagedIntegersError("a table of frequencies is empty")
            values = decoder.decode(_model(table), n)
        else:
            values, plain = _from_bits(depth, plain[: depth * n]), plain[depth * n :]
        found.append(values - 2 ** (depth - 1))
    if not decoder.is_empty():
        raise DamagedIntegersError("there are more coded integers than there should be")
    return found


def entropy_bits(groups: Sequence[Group]) -> float:
    """Return the sum of the entropies of all groups, in bits: what an ideal coder would need."""
    total = 0.0
    for depth, values in groups:
        counts = np.bincount(_unsigned(depth, values))
        counts = counts[counts > 0]
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total


def _unsigned(depth: int, values: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = (values.astype(np.int32) + 2 ** (depth - 1)).astype(np.uint16)
    return shifted


def _to_bits(depth: int, values: np.ndarray) -> np.ndarray:
    """Return the (n · depth,) bits, as zeros and ones, of (n,) uint16 values."""
    if depth <= 8:
        octets = values.astype(np.uint8)[:, None]
    else:
        octets = values.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.unpackbits(octets, axis=1, count=depth, bitorder="little").ravel()


def _from_bits(depth: int, bits: np.ndarray) -> np.ndarray:
    """Return the (n,) int32 values of (n · depth,) bits, given as zeros and ones."""
    octets = np.packbits(bits.reshape(-1, depth), axis=1, bitorder="little").astype(np.int32)
    low: np.ndarray = octets[:, 0]
    return low if depth <= 8 else low + 256 * octets[:, 1]


def _table(depth: int, values: np.ndarray) -> np.ndarray | None:
    """Return the frequencies to code a group with, or None if the group is to be written plain."""
    if depth > _WIDEST_TABLE or len(values) == 0:
        return None
    counts = np.bincount(values, minlength=2**depth)
    scaled = np.round(counts * (255 / counts.max()))
    table: np.ndarray = np.where(counts > 0, scaled.clip(1), 0).astype(np.uint8)
    shares = table[counts > 0] / table.sum(dtype=np.float64)
    cost = -(counts[counts > 0] * np.log2(shares)).sum() + 8 * len(table)
    return table if cost < depth * len(values) else None


def _model(table: np.ndarray) -> constriction.stream.model.Categorical:
    frequencies = table.astype(np.float64)
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)


def _decoder(coded: np.ndarray) -> constriction.stream.stack.AnsCoder:
    try:
        return constriction.stream.stack.AnsCoder(coded.view("<u4").astype(np.uint32))
    except ValueError as error:  # words that no coder can have produced
        raise DamagedIntegersError("the coded integers are damaged") from error
