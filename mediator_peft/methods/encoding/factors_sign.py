"""Factors of 3 bits, and signs of what they leave: for few bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from ...storage import as_array, to_tensor
from ..sparsifying.magnitude import largest_mask
from ..sparsifying.svd import low_rank
from .base import Encoding, Parts, Precision
from .bitmaps import compress_mask, decompress_mask, pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor


LEVELS = (-2.1520, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1520)
"""The 8 levels nearest to a standard Gaussian in mean square (Max, 1960)."""

_BITS = 3
_COMPONENT_BITS = 48


class FactorsSignEncoding(Encoding):
    r"""A delta as few components of rank one with 3-bit vectors, plus signs of the largest entries of the rest.

    .. math:: \Delta \approx \sum_{i \le r} a_i \hat u_i \hat v_i^T + s\, M \circ \operatorname{sgn}(R),\quad
        a_i = \frac{\hat u_i^T \Delta \hat v_i}{|\hat u_i|^2 |\hat v_i|^2}

    :math:`\hat u, \hat v`: leading singular vectors, scaled to unit variance and rounded to ``LEVELS``; R: the rest.
    Few-bit factors are Delta-CoMe's (NeurIPS 2024), which has no signs; signs of the largest entries are T-Switch's
    (arXiv 2412.00054). A density d gives both halves the bytes of signs of density d / 2. Which entries are kept is
    decided on the rest, so of what a sparsifier chose only the number counts.

    The parts are held in memory as they lie on disk and are unpacked whenever they are applied: small, and slow.
    """

    part_names = ("left_codes", "right_codes", "sizes", "positions", "signs", "scale")
    has_positions = False
    has_scales = True
    product_tokens = 8

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """Factors, and signs of the rest.

        Returns:
            ``left_codes`` (3 ceil(O r / 8),) and ``right_codes`` (3 ceil(I r / 8),) uint8, bit planes; ``sizes`` (r,)
            float32; ``positions`` uint8, entropy-coded; ``signs`` (ceil(n / 8),) uint8; ``scale`` (1,) float32.
        """
        density = float(kept.sum()) / kept.numel() / 2
        rank = factor_rank((delta.shape[0], delta.shape[1]), density)
        left, right = low_rank(delta, rank, torch.Generator().manual_seed(0))
        codes = [nearest_levels(left), nearest_levels(right.T)]
        vectors = [torch.tensor(LEVELS)[code] for code in codes]
        squares = vectors[0].square().sum(dim=0) * vectors[1].square().sum(dim=0)
        sizes = ((vectors[0].T @ delta) * vectors[1].T).sum(dim=1) / squares
        rest = delta - (vectors[0] * sizes) @ vectors[1].T
        places = largest_mask(rest, max(density, 1 / rest.numel())) & (rest != 0)
        return {
            "left_codes": pack_codes(codes[0]),
            "right_codes": pack_codes(codes[1]),
            "sizes": sizes,
            "positions": to_tensor(compress_mask(as_array(pack_bits(places)))),
            "signs": pack_bits(rest[places] < 0),
            "scale": _scale(rest, places, precision.rescale)[None],
        }

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """Entries of the sum."""
        return self.matrix(parts, (kept.shape[0], kept.shape[1]))[kept]

    def matrix(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        left, right = _factors(parts, shape)
        matrix = left @ right
        entries = _entries(parts, shape)
        matrix.view(-1)[entries] += _signed(parts, len(entries))
        return matrix

    def scaled(self, parts: Parts, factor: float) -> Parts:
        return {**parts, **{name: parts[name] * factor for name in ("sizes", "scale")}}

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        # As if the matrix were square; what is known of the matrix is in total_bytes.
        return self.total_bytes(num_rows * num_rows, num_kept)

    def total_bytes(self, num_entries: int, num_kept: float) -> float:
        """Two halves with the bytes of signs of half the density each."""
        density = min(num_kept / num_entries, 1.0) / 2
        return num_entries * 2 * _sign_bits(density) / 8

    def fault(self, parts: Parts, shape: tuple[int, int], num_kept: int) -> str | None:
        rank = len(parts["sizes"])
        for part, size in (("left_codes", shape[0]), ("right_codes", shape[1])):
            expected = _BITS * -(-size * rank // 8)
            if len(parts[part]) != expected:
                return f"{len(parts[part])} {part} for {expected} expected"
        count = int(_places(parts, shape).sum())
        if len(parts["signs"]) != -(-count // 8) or len(parts["scale"]) != 1:
            return f"{len(parts['signs'])} bytes of signs for {count} entries"
        return None

    def product(self, parts: Parts, shape: tuple[int, int], x: Tensor) -> Tensor:
        left, right = _factors(parts, shape)
        result = torch.nn.functional.linear(torch.nn.functional.linear(x, right), left)
        entries = _entries(parts, shape)
        rows = entries.div(shape[1], rounding_mode="floor")
        return result.index_add(-1, rows, x[..., entries % shape[1]] * _signed(parts, len(rows)))

    def row_reader(self, parts: Parts, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        left, right = _factors(parts, shape)
        places = _places(parts, shape)
        counts = places.sum(dim=1)
        starts = counts.cumsum(0) - counts
        columns = torch.nonzero(places)[:, 1].int()
        signed = _signed(parts, len(columns))

        def read(rows: Tensor) -> Tensor:
            matrix, number = left[rows] @ right, counts[rows]
            owners = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), number)
            # The entries' places among all that are kept: each row's first, and so many on.
            kept = (starts[rows] - (number.cumsum(0) - number))[owners] + torch.arange(len(owners), device=rows.device)
            matrix[owners, columns[kept].long()] += signed[kept]
            return matrix

        return read


def factor_rank(shape: tuple[int, int], density: float) -> int:
    """Rank of factors of 3 bits that take the bytes of signs of a density; 48 bits a component are for its size."""
    bits = _sign_bits(density) * shape[0] * shape[1]
    return max(1, min(int(bits / (_BITS * sum(shape) + _COMPONENT_BITS)), *shape))


def nearest_levels(vectors: Tensor) -> Tensor:
    """Numbers of the nearest levels, of columns scaled to unit variance: (n, r) → (n, r) int64."""
    scale = vectors.square().mean(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    levels = torch.tensor(LEVELS)
    return torch.bucketize((vectors / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Numbers of 3 bits as bit planes: any shape → (3 ceil(n / 8),) uint8."""
    flat = codes.flatten()
    return torch.cat([pack_bits((flat >> bit & 1).bool()) for bit in range(_BITS)])


def unpack_codes(packed: Tensor, number: int) -> Tensor:
    """The reverse of :func:`pack_codes`: (number,) int64."""
    planes = unpack_bits(packed.reshape(_BITS, -1), number).long()
    return (planes << torch.arange(_BITS, device=packed.device)[:, None]).sum(dim=0)


def _factors(parts: Parts, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(O, r) with the sizes, and (r, I): float32."""
    sizes = parts["sizes"].float()
    levels, rank = torch.tensor(LEVELS, device=sizes.device), len(sizes)
    left = levels[unpack_codes(parts["left_codes"], shape[0] * rank)].reshape(shape[0], rank)
    right = levels[unpack_codes(parts["right_codes"], shape[1] * rank)].reshape(shape[1], rank)
    return left * sizes, right.T


def _places(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """Where signs are: (O, I) bool."""
    stored = parts["positions"]
    bitmap = to_tensor(decompress_mask(as_array(stored.cpu()), (shape[0], -(-shape[1] // 8)), "positions"))
    return unpack_bits(bitmap, shape[1]).to(stored.device)


def _entries(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """Numbers of the entries with signs, row by row: (n,) int64."""
    places = _places(parts, shape)
    if places.device.type == "cpu":  # numpy finds them three times faster
        return torch.from_numpy(np.flatnonzero(places.numpy()))
    return torch.nonzero(places.flatten()).flatten()


def _signed(parts: Parts, number: int) -> Tensor:
    """Plus or minus the scale: (number,) float32."""
    scale = parts["scale"].float()
    return torch.where(unpack_bits(parts["signs"], number), -scale, scale)


def _scale(rest: Tensor, places: Tensor, rescale: str) -> Tensor:
    """One size for all signs of a matrix; see ``SIGN_SCALES``."""
    kept = rest[places].double().abs()
    total = rest.double().square().sum()
    if not len(kept) or not float(kept.sum()):
        return torch.zeros(())
    sizes = {"mean": kept.mean(), "norm": (total / len(kept)).sqrt(), "projection": total / kept.sum()}
    return sizes.get(rescale, sizes["projection"]).float()


def _sign_bits(density: float) -> float:
    """Bits an entry of signs and their positions."""
    rest = 1 - density
    return density + sum(-share * log2(share) for share in (density, rest) if share > 0)
