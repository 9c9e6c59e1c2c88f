"""lm-eval's tasks: which ones names stand for, and each one loaded as a source of samples."""

from __future__ import annotations

import json
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError
from experiments import checks
from experiments.tasks import folder
from experiments.unavailable import Unavailable, reason

INSTALL = "pip install 'lm_eval[hf]' (with [ruler] and [longbench] for those tasks)"


@dataclass(frozen=True)
class Settings:
    """How lm-eval is to run its tasks.

    Parameters
    ----------
    lengths : sequence of int, optional
        lm-eval's ``max_seq_lengths``, for tasks that make prompts of a given size, such as RULER's: tokens, each a run
        of its own. None for all others.
    limit : int, optional
        The first samples of each task; None: all.
    num_fewshot : int, optional
        None: what the task says.
    chat_template : bool
        Through the model's chat template.
    include_path : str, optional
        A folder of more tasks.
    """

    lengths: Sequence[int] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    include_path: str | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            checks.counts("lm_eval.lengths", self.lengths)
        if self.limit is not None:
            checks.count("lm_eval.limit", self.limit)
        if self.num_fewshot is not None:
            checks.seed("lm_eval.num_fewshot", self.num_fewshot)
        checks.switch("lm_eval.chat_template", self.chat_template)
        if self.include_path is not None:
            checks.text("lm_eval.include_path", self.include_path)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"lm_eval.include_path={self.include_path} is no folder")

    @property
    def sizes(self) -> list[int | None]:
        return list(self.lengths) if self.lengths else [None]


def index(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """lm-eval's tasks, groups and tags by name: all, or the user's own where they are all that is asked for."""
    manager = imported("lm_eval.tasks").TaskManager
    own = manager(include_defaults=False, include_path=settings.include_path).task_index
    if names and all(name in own and own[name].kind.name == "TASK" for name in names):
        return own  # to read all of lm-eval's takes some seconds
    return manager(include_path=settings.include_path).task_index


def imported(module: str) -> Any:
    """A module of lm-eval's.

    Raises
    ------
    InputError
        It, or what it needs, is not installed.
    """
    try:
        found = import_module(module)
    except ImportError as error:
        raise InputError(f"experiment=lm_eval needs {error.name}: {INSTALL}") from error
    for name in ("lm_eval", "huggingface_hub"):  # their warnings are of options not used here, and of each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return found


def leaves(names: Sequence[str], index: dict[str, Any]) -> list[str]:
    """The tasks that names of tasks, groups and tags stand for, each once.

    Raises
    ------
    InputError
        No name, an unknown one, a group that changes its tasks and so is more than their names.
    """
    if not names:
        raise InputError("tasks=[] names no task; give some of lm-eval's, such as tasks=[niah_single_1,ruler_vt]")
    found: dict[str, None] = {}
    for name in names:
        if name not in index:
            raise InputError(f"tasks: lm-eval {version('lm_eval')} has no task {name}; `lm-eval ls tasks` lists them")
        entry = index[name]
        match entry.kind.name:
            case "TAG":
                found |= dict.fromkeys(leaves(sorted(entry.tags), index))
            case "GROUP":
                members = entry.cfg["task"]
                if not all(isinstance(member, str) for member in members):
                    raise InputError(f"tasks: lm-eval's group {name} changes its tasks' settings; name tasks instead")
                found |= dict.fromkeys(leaves(members, index))
            case _:
                found[name] = None
    return list(found)


class LmEvalTask:
    """One of lm-eval's tasks, loaded when its samples are first asked for: making prompts may want the tokenizer."""

    name: ClassVar[str] = "lm_eval"
    version: ClassVar[int] = 1

    def __init__(self, entry: Any, length: int | None, settings: Settings) -> None:
        self.entry = entry
        self.task_name: str = entry.name
        self.length = length
        self.settings = settings
        self.loaded: Any = None

    def data(self) -> dict[str, str]:
        text = json.dumps(self.entry.cfg, sort_keys=True, default=str)
        for place in (str(Path(imported("lm_eval").__file__).parent), self.settings.include_path):
            text = text.replace(place or "\0", "")  # functions are named with the folder they are in
        return {"definition": folder.digest([text])}

    @property
    def protocol(self) -> str:
        """Whose prompts and scores these are, as records and tables name it."""
        shots = "" if self.settings.num_fewshot is None else f", {self.settings.num_fewshot} shots"
        return f"official, lm_eval {version('lm_eval')}{shots}{', chat' if self.settings.chat_template else ''}"

    def longest(self) -> int:
        return self.length or 1

    def ids(self) -> list[str]:
        """Known once `make` has been called."""
        count = len(self.loaded.eval_docs)
        return [self.id(n) for n in range(min(count, self.settings.limit or count))]

    def id(self, n: int) -> str:
        return "-".join(str(part) for part in (self.task_name, self.length, n) if part is not None)

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
        """lm-eval's documents.

        Raises
        ------
        Unavailable
            The task cannot be loaded: its data, a package or the network is missing.
        """
        if self.loaded is None:
            self.loaded = self._load(tokenizer)
        yield from self.loaded.eval_docs

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        tasks, defaults = imported("lm_eval.tasks"), imported("lm_eval.defaults")
        random.seed(defaults.DEFAULT_RANDOM_SEED)  # as lm-eval does before it loads: some tasks draw their prompts
        np.random.seed(defaults.DEFAULT_OTHER_SEED)
        with tempfile.TemporaryDirectory() as place:
            tokenizer.save_pretrained(place)  # RULER's tasks read one by name
            metadata = {"tokenizer": place} | ({"max_seq_lengths": [self.length]} if self.length else {})
            home = self.entry.yaml_path.parent  # to look there alone takes a moment, everywhere some seconds
            manager = tasks.TaskManager(include_defaults=False, include_path=home, metadata=metadata)
            try:
                return manager.load([self.task_name])["tasks"][self.task_name]
            except Exception as error:  # whatever a hub, its client and a task's own code can raise
                raise Unavailable(f"lm-eval cannot load it: {reason(error)}") from error
