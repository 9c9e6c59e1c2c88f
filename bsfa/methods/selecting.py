"""A method that names its blocks before any exact score is seen, and has the kernels visit those alone."""

from __future__ import annotations

from abc import abstractmethod

from bsfa.blocks import BlockLists
from bsfa.methods.base import Attend, Call, Method
from bsfa.model import ModelInfo


class Selecting(Method):
    """What pre-selecting methods share."""

    def bind(self, model: ModelInfo) -> Attend:
        return lambda call: call.attend(blocks=self.select(call))

    @abstractmethod
    def select(self, call: Call) -> BlockLists:
        """The blocks of one call; part of the time that is measured.

        Raises
        ------
        NotImplementedError
            A chunk of a prefill, where the rule wants the whole prompt in one call.
        """
