"""The dense kernels of others that a model's prefill is timed against: those that run here, and why not the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bsfa.errors import InputError
from bsfa.methods import Method, Sdpa
from bsfa.methods.upstream import Cudnn, FlashAttn2, FlashAttn3, TorchFlash
from bsfa.methods.upstream_flex import Flex
from bsfa.model import ModelInfo
from experiments.prefill import Prefill

log = logging.getLogger(__name__)

DENSE_KERNELS: dict[str, type[Method]] = {
    kind.name: kind for kind in (TorchFlash, Cudnn, FlashAttn3, FlashAttn2, Flex, Sdpa)
}


def usable(
    names: Sequence[str], model: ModelInfo, prefill: Prefill, longest: int
) -> tuple[dict[str, Method], dict[str, str]]:
    """Those of `DENSE_KERNELS` that run here, and those that do not, with the reason.

    Parameters
    ----------
    longest : int
        Tokens of the longest prompt.
    """
    found: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name in names:
        method = DENSE_KERNELS[name]()
        try:
            method.bind(model)
            prefill.check([method], longest)
        except InputError as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
        else:
            found[name] = method
    return found, left_out
