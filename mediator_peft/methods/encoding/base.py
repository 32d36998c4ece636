"""The interface of encodings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...deferred import torch
from .scales import NUMBER_SCALES

if TYPE_CHECKING:
    from torch import Tensor


Parts: TypeAlias = "dict[str, Tensor]"
"""Name of a part → 1-D tensor: what an encoding stores beside the positions."""


class Precision(NamedTuple):
    """How finely an encoding stores what is kept; each encoding reads the fields that concern it."""

    dtype: torch.dtype | None = None
    """Of values that are stored as numbers; None keeps float32."""

    rescale: str = "projection"
    """A key of ``SIGN_SCALES``, and of ``NUMBER_SCALES``."""

    gain: float = 1.0
    """Factor of the sparsifier on kept numbers: 1 / density where entries were drawn at random."""


EXACT = Precision(rescale="mean")
"""Numbers are stored as they are, in float32."""


class Encoding(ABC):
    """One way to store the kept entries of a delta (O, I); a row of ``ENCODINGS``.

    A third-party encoding subclasses this and is entered by :func:`mediator_peft.register_method`. Only ``part_names``,
    ``encode``, ``decode`` and ``value_bytes`` are needed; the rest has defaults that are right and slow.
    """

    part_names: tuple[str, ...]
    """Names of the parts, each of which becomes one 1-D tensor in the adapter file."""

    in_kernels: bool = False
    """Whether the compiled kernels read the parts as they are: signs and scales, or values. Otherwise a delta is
    unpacked before it is applied."""

    has_positions: bool = True
    """Whether a bitmap of the kept entries is stored too; without one the encoding gives every entry."""

    has_scales: bool = False
    """Whether :meth:`scaled` works."""

    product_tokens: int = 0
    """Below so many vectors at once, :meth:`product` takes less time than the whole matrix and a dense product."""

    @abstractmethod
    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """Kept entries → parts.

        Args:
            delta: (O, I) float32, before sparsification: the norms of whole rows may be needed.
            kept: (O, I) bool
            precision: how finely.
        """

    @abstractmethod
    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """Parts → kept entries (num_kept,) float32, row by row.

        Args:
            parts: what ``encode`` gave.
            kept: (O, I) bool
        """

    def matrix(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The whole delta, (O, I) float32, of an encoding without positions."""
        device = next(iter(parts.values())).device
        return self.decode(parts, torch.ones(shape, dtype=torch.bool, device=device)).reshape(shape)

    @abstractmethod
    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        """Bytes on disk of all parts, without the positions.

        Args:
            num_kept: kept entries.
            num_rows: O.
            number_size: bytes of a number that is stored as it is.
        """

    def total_bytes(self, num_entries: int, num_kept: float) -> float | None:
        """Bytes on disk of a whole delta, where they do not follow from ``value_bytes`` and positions; else None."""
        return None

    def part_sizes(self, num_kept: int) -> dict[str, int]:
        """Lengths of the parts that follow from the number of kept entries; checked when an adapter is loaded."""
        return {}

    def fault(self, parts: Parts, shape: tuple[int, int], num_kept: int) -> str | None:
        """What of the parts does not fit the matrix and its positions; None where all fits."""
        for part, expected in self.part_sizes(num_kept).items():
            if len(parts[part]) != expected:
                return f"{len(parts[part])} {part} for {expected} expected"
        return None

    def scaled(self, parts: Parts, factor: float) -> Parts:
        """The parts of the delta times a factor, where ``has_scales``."""
        raise NotImplementedError

    def product(self, parts: Parts, shape: tuple[int, int], x: Tensor) -> Tensor | None:
        """``S x`` for vectors x (..., I) → (..., O), where that is cheaper than the dense product; else None."""
        return None

    def row_values(self, parts: Parts, rows: Tensor, counts: Tensor, places: Tensor) -> Tensor | None:
        """Kept entries of some rows alone, (m,) float32; None where all rows must be decoded.

        Args:
            parts: what ``encode`` gave.
            rows: (n,) row numbers.
            counts: (n,) kept entries of these rows.
            places: (m,) the entries' places among all kept ones.
        """
        return None

    def row_reader(self, parts: Parts, shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
        """What reads some rows of a matrix without positions: row numbers (n,) → (n, I) float32.

        It is held while rows of one delta are asked for. None where all rows must be decoded.
        """
        return None


def rescaled_numbers(delta: Tensor, kept: Tensor, precision: Precision) -> Tensor:
    """The kept entries (num_kept,) float32, row by row, times their factors of ``NUMBER_SCALES``."""
    if precision.rescale == "mean":
        return delta[kept] * precision.gain
    squares = delta.double().square()
    factors = NUMBER_SCALES[precision.rescale](
        squares.sum(dim=1).numpy(), torch.where(kept, squares, 0).sum(dim=1).numpy()
    )
    return delta[kept] * torch.repeat_interleave(torch.from_numpy(factors).float(), kept.sum(dim=1))
