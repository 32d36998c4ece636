"""Encodings: how the kept entries of a delta are stored. One file and one row each."""

from __future__ import annotations

from .base import Encoding
from .blockwise import Int8Encoding, Nf4Encoding
from .factors import FactorsEncoding
from .factors_sign import FactorsSignEncoding
from .floats import FloatEncoding
from .sign import SignEncoding

ENCODINGS: dict[str, Encoding] = {
    "sign": SignEncoding(),
    "float": FloatEncoding(),
    "int8": Int8Encoding(),
    "nf4": Nf4Encoding(),
    "factors": FactorsEncoding(),
    "factors_sign": FactorsSignEncoding(),
}

__all__ = ["ENCODINGS", "Encoding"]
