"""The methods, one file each. `bsfa.methods.base` says what one is."""

from bsfa.methods.base import Call, Method
from bsfa.methods.bsfa import Bsfa
from bsfa.methods.dense import Dense
from bsfa.methods.sdpa import Sdpa
from bsfa.methods.streaming_llm import StreamingLLM

__all__ = ["Bsfa", "Call", "Dense", "Method", "Sdpa", "StreamingLLM"]
