"""What single texts gave, kept on the disk until all are read, so that a calibration that was cut goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bsfa.errors import InputError
from bsfa.whole import whole


@dataclass(frozen=True)
class Finished:
    """The texts of one calibration that have been read, a file each.

    Parameters
    ----------
    folder : Path, or None to keep nothing
    origin : str
        A digest of all that the calibration depends on, see `of`.
    """

    folder: Path | None
    origin: str

    @classmethod
    def of(cls, folder: Path | None, *settings: Any) -> Finished:
        """Of a calibration with such settings, as JSON has them."""
        return cls(folder, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())

    def text(self, number: int, read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `read` gives, tensors on the CPU, or gave before.

        Raises
        ------
        InputError
            What lies in the folder is another calibration's, or damaged.
        """
        if self.folder is None:
            return read()
        path = self.folder / f"text-{number}.safetensors"
        if path.is_file():
            return self._load(path)
        found = read()
        with whole(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial, {"origin": self.origin})
        return found

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("origin") == self.origin:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); remove {path.parent}, and calibrate again") from error
        raise InputError(f"{path} is another calibration's; remove {path.parent}, or take another folder")
