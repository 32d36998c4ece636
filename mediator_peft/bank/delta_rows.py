"""Decoding of single rows of a packed delta, as embeddings need it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.encoding import ENCODINGS
from ..methods.encoding.bitmaps import count_bits_by_row, unpack_bits
from .sparse_delta import SparseDelta


class DeltaRows:
    """Rows of one delta (O, I) on demand."""

    def __init__(self, delta: SparseDelta) -> None:
        self.delta = delta
        encoding = ENCODINGS[delta.coding]
        self._read = None if encoding.has_positions else encoding.row_reader(delta.parts, delta.shape)
        self._counts = count_bits_by_row(delta.mask)
        self._starts = self._counts.cumsum(0) - self._counts

    def dense(self, rows: Tensor) -> Tensor:
        """These rows as a plain matrix.

        Args:
            rows: (n,) int64, on the delta's device.

        Returns:
            (n, I) float32
        """
        if self._read is not None:
            return self._read(rows)
        values = self._values(rows)
        if values is None:
            return self.delta.dense()[rows]
        kept = unpack_bits(self.delta.mask[rows], self.delta.shape[1])
        matrix = torch.zeros(kept.shape, device=kept.device)
        matrix[kept] = values
        return matrix

    def _values(self, rows: Tensor) -> Tensor | None:
        """Kept entries of these rows, row by row: (m,) float32; None where the encoding must decode all rows."""
        counts = self._counts[rows]
        # The entries' places among all that are kept: each row's first, and so many on.
        shift = self._starts[rows] - (counts.cumsum(0) - counts)
        places = torch.repeat_interleave(shift, counts) + torch.arange(int(counts.sum()), device=rows.device)
        return ENCODINGS[self.delta.coding].row_values(self.delta.parts, rows, counts, places)
