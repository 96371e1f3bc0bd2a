"""Which tensors of a network its file stores, in which dtypes, and the file's checksum."""

import zlib
from collections.abc import Container
from typing import get_args

import torch
from torch import Tensor

from selfcompress.file import header as h

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(h.TensorType)}
"""The dtypes of tensors that a file can hold, by name."""


def is_stored(name: str, layers: Container[str], folded: Container[str]) -> bool:
    """Whether a parameter or buffer is among the header's tensors.

    Args:
        name: full name of the parameter or buffer.
        layers, folded: names of the quantised layers and of the folded batch norms.
    """
    owner, _, key = name.rpartition(".")
    if owner in layers and key in ("weight", "bit_depth", "exponent"):
        return False
    if owner in folded and key in ("running_mean", "running_var"):
        return False
    return key != "num_batches_tracked"


def stored_dtype(dtype: torch.dtype, half: bool) -> torch.dtype:
    """Return the dtype that tensors of `dtype` are stored in, complex ones as pairs of floats."""
    real = dtype.to_real()
    return torch.float16 if half and real.is_floating_point else real


def representable(depths: Tensor, exponents: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` can have these formats, both (rows,).

    The largest must be finite in `dtype`, and the step 2^exponent above 0 in at least float32.
    """
    wide = exponents.to(torch.promote_types(dtype, torch.float32))
    largest = torch.exp2(wide + depths.to(wide.dtype) - 1).to(dtype)
    return bool((torch.exp2(wide) > 0).all() and largest.isfinite().all())


def checksum(header: bytes, streams: dict[str, Tensor]) -> bytes:
    """Return the CRC-32 of the compressed header and the other streams; see `header.py`."""
    crc = zlib.crc32(header)
    for name in sorted(streams):
        crc = zlib.crc32(f"{name};".encode(), crc)
        crc = zlib.crc32(streams[name].contiguous().view(torch.uint8).numpy(force=True).data, crc)
    return crc.to_bytes(4, "little")
