"""The methods, one file each. `bsfa.methods.base` says what one is."""

from bsfa.methods.base import Call, Method
from bsfa.methods.blasst import Blasst, BlasstFit, FittedBlasst
from bsfa.methods.bsfa import Bsfa
from bsfa.methods.dense import Dense
from bsfa.methods.fisher_share import FisherShare
from bsfa.methods.flashprefill import FlashPrefill
from bsfa.methods.flexprefill import FlexPrefill
from bsfa.methods.late_share import LateShare
from bsfa.methods.minference import MInference
from bsfa.methods.row_share import RowShare
from bsfa.methods.sdpa import Sdpa
from bsfa.methods.spargeattn import SpargeAttn, SpargeAttnTopK
from bsfa.methods.streaming_llm import StreamingLLM
from bsfa.methods.xattention import XAttention

__all__ = [
    "Blasst",
    "BlasstFit",
    "Bsfa",
    "Call",
    "Dense",
    "FisherShare",
    "FittedBlasst",
    "FlashPrefill",
    "FlexPrefill",
    "LateShare",
    "MInference",
    "Method",
    "RowShare",
    "Sdpa",
    "SpargeAttn",
    "SpargeAttnTopK",
    "StreamingLLM",
    "XAttention",
]
