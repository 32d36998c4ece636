"""Features of texts, kept by the hash of what they were computed from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class FeatureCache:
    """Token ids → feature vector, in memory and, if a folder is given, in files that later runs read.

    Args:
        origin: what else the features depend on (backbone, layer); other origins never share an entry.
        folder: made when first written to; each file holds one batch of new features.
    """

    def __init__(self, origin: str, folder: Path | None = None) -> None:
        self._origin = hashlib.sha256(origin.encode()).hexdigest()
        self._folder = folder
        self._kept: dict[str, Tensor] = {}
        if folder is not None and folder.is_dir():
            for path in sorted(folder.glob(f"features-{self._origin[:16]}-*.safetensors")):
                self._read(path)

    def key(self, token_ids: Sequence[int]) -> str:
        """Hash of one text's token ids under this cache's origin."""
        return hashlib.sha256(f"{self._origin}\n{','.join(map(str, token_ids))}".encode()).hexdigest()

    def get(self, key: str) -> Tensor | None:
        """(H,), or None if it has not been computed."""
        return self._kept.get(key)

    def put(self, features: dict[str, Tensor]) -> None:
        """Keep new features, key → (H,)."""
        self._kept.update({key: value.detach().float().cpu().clone() for key, value in features.items()})
        if self._folder is None or not features:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()[:16]
        target = self._folder / f"features-{self._origin[:16]}-{name}.safetensors"
        partial = target.with_suffix(f".partial-{os.getpid()}")
        keys = sorted(features)
        stacked = torch.stack([self._kept[key] for key in keys])
        # Not by the library's own writing, which lets nobody else read the file.
        partial.write_bytes(save({"features": stacked}, metadata={"keys": ",".join(keys)}))
        os.replace(partial, target)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                keys = (file.metadata() or {}).get("keys", "").split(",")
                features = file.get_tensor("features")
        except (SafetensorError, OSError):
            return  # a damaged cache file is as good as none: its features are computed again
        if len(keys) == len(features):
            self._kept.update(zip(keys, features, strict=True))
