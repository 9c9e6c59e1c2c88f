"""LongBench's rows and prompts, from a folder of its files or from the hub. None of its text is kept here."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from bsfa.errors import InputError
from experiments.tasks import folder, longbench_scores
from experiments.tasks.base import Metric
from experiments.unavailable import Unavailable, reason

INSTALL = "pip install 'lm_eval[longbench,hf]'"
CONTEXT = "\x00context\x00"  # stands for the context where a template is filled in without it
KEYS = ("input", "context", "answers", "all_classes")
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"


@dataclass(frozen=True)
class Row:
    """One prompt in three parts, of which only the context may be cut.

    Attributes
    ----------
    before, context, after : str
    answers : tuple of str
    classes : tuple of str
        Names of all classes, where the answer is one.
    fields : dict
        The row as its source has it.
    """

    before: str
    context: str
    after: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    fields: dict[str, Any]

    def digest(self) -> str:
        """16 hex digits of the prompt and its answers."""
        return folder.digest((self.before, self.context, self.after, *self.answers, *self.classes))


@dataclass(frozen=True)
class DataSet:
    """The rows of one task, and its answer budget in tokens."""

    name: str
    rows: tuple[Row, ...]
    max_new_tokens: int

    def digest(self) -> str:
        """16 hex digits of all that goes into prompts and scores."""
        return folder.digest(row.digest() for row in self.rows)


class Scorer(Protocol):
    """How answers are scored. ``name`` is part of a record's identity."""

    name: str

    def metric(self, task: str, row: Row) -> Metric: ...


class Source(Protocol):
    def read(self, name: str, samples: int | None) -> DataSet:
        """The first ``samples`` rows of a task, or all.

        Raises
        ------
        Unavailable
            The task's data is not there.
        """


class Folder:
    """``DIR/<task>.jsonl`` with LongBench's `dataset2prompt.json` and `dataset2maxlen.json` beside them.

    Raises
    ------
    InputError
        No such folder, no prompts or answer lengths in it.
    """

    def __init__(self, root: str) -> None:
        self.root = folder.existing(root)
        if missing := [name for name in (PROMPTS, LENGTHS) if not (self.root / name).is_file()]:
            raise InputError(
                f"{self.root} has no {' and no '.join(missing)}: LongBench's repository has both, in LongBench/config; "
                "put them beside the *.jsonl"
            )
        self.prompts, self.lengths = (folder.read_json(self.root / name) for name in (PROMPTS, LENGTHS))

    def read(self, name: str, samples: int | None) -> DataSet:
        path = self.root / f"{name}.jsonl"
        if not path.is_file():
            raise Unavailable(f"there is no {path}")
        for file, table in ((PROMPTS, self.prompts), (LENGTHS, self.lengths)):
            if name not in table:
                raise Unavailable(f"{self.root / file} does not name it")
        if not (isinstance(self.prompts[name], str) and isinstance(self.lengths[name], int) and self.lengths[name] > 0):
            raise Unavailable(f"{self.root / PROMPTS} must give it text, and {LENGTHS} a number of tokens")
        before, context, after = self.prompts[name].partition("{context}")
        if not context:
            raise Unavailable(f"its prompt in {self.root / PROMPTS} has no {{context}}")
        try:
            rows = tuple(
                _row(before.format_map(row), after.format_map(row), row)
                for row in itertools.islice(folder.read_rows(path, KEYS), samples)
            )
        except InputError as error:
            raise Unavailable(str(error)) from error
        except (KeyError, ValueError, IndexError) as error:
            raise Unavailable(f"its prompt in {self.root / PROMPTS} cannot be filled in: {error!r}") from error
        if not rows:
            raise Unavailable(f"{path} is empty")
        return DataSet(name, rows, self.lengths[name])


class Hub:
    """The hub's LongBench, by lm-eval's definitions of its tasks.

    Raises
    ------
    Unavailable
        lm-eval or what its LongBench needs is not installed.
    """

    def __init__(self) -> None:
        self.manager = task_manager()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry

    def read(self, name: str, samples: int | None) -> DataSet:
        task = load(self.manager, name)
        rows = []
        for doc in itertools.islice(task.test_docs(), samples):
            before, _, after = task.doc_to_text({**doc, "context": CONTEXT}).partition(CONTEXT)
            rows.append(_row(before, after, doc))
        return DataSet(name, tuple(rows), task.config.generation_kwargs["max_gen_toks"])


def _row(before: str, after: str, fields: dict[str, Any]) -> Row:
    answers, classes = fields["answers"], fields["all_classes"] or ()
    return Row(before, fields["context"], after, tuple(answers), tuple(classes), fields)


def task_manager() -> Any:
    """lm-eval's index of its LongBench tasks.

    Raises
    ------
    Unavailable
        lm-eval or a package that its LongBench needs is not installed.
    """
    try:
        import_module("lm_eval.tasks.longbench.metrics")
        tasks = import_module("lm_eval.tasks")
    except ImportError as error:  # of which its metrics make another, which names the packages
        raise Unavailable(
            f"LongBench from the hub, and task.scorer=lm_eval, need lm-eval: {INSTALL}. "
            "data.root=DIR reads LongBench's files from a folder and needs neither"
        ) from error
    return tasks.TaskManager(include_defaults=False, include_path=Path(tasks.__path__[0]) / "longbench")


def load(manager: Any, name: str) -> Any:
    """lm-eval's task with its data, from the hub or its cache.

    Raises
    ------
    Unavailable
        It cannot be had.
    """
    try:
        return manager.load([f"longbench_{name}"])["tasks"][f"longbench_{name}"]
    except Exception as error:  # whatever a hub, its client and a task's own code can raise
        raise Unavailable(
            f"the hub's data cannot be read: {reason(error)}; without network use data.root=DIR"
        ) from error


class OwnScorer:
    """`experiments.tasks.longbench_scores`."""

    name = "own"

    def metric(self, task: str, row: Row) -> Metric:
        return longbench_scores.metric(task, row.classes)


class LmEvalScorer:
    """lm-eval's own scores, on an answer cut where lm-eval would have stopped it."""

    def __init__(self) -> None:
        self.index = task_manager().task_index
        self.metrics = import_module("lm_eval.tasks.longbench.metrics")
        self.name = f"lm_eval {version('lm_eval')}"

    def metric(self, task: str, row: Row) -> Metric:
        definition = self.index[f"longbench_{task}"].cfg
        score = getattr(self.metrics, definition["process_results"].rpartition(".")[2])
        stops = definition["generation_kwargs"]["until"]

        def metric(prediction: str, references: tuple[str, ...]) -> float:
            for stop in stops:
                prediction = prediction.split(stop)[0]
            doc = {**row.fields, "answers": list(references), "all_classes": list(row.classes)}
            return float(score(doc, [prediction])["score"])

        return metric


SCORERS: dict[str, Callable[[], Scorer]] = {"own": OwnScorer, "lm_eval": LmEvalScorer}
