"""All experiments of a profile, one after another, and the report: what ``make reproduce`` runs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import suppress

from hydra import compose
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from bsfa.errors import InputError
from experiments import checks, environment, needs, overrides, plans, unavailable
from experiments.config import call
from experiments.models import ModelSource
from experiments.plans import Planned
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)

OWN = ("experiment", "experiments", "dry")  # settings of this experiment
REPORT = "report"
WHERE_IT_STANDS = "experiment.runner=experiments.standing.run"  # not drawn again from the same records


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=reproduce``: say what will run and what it needs; run it, unless ``dry=true``.

    Raises
    ------
    InputError
        An experiment that the profile has not, a setting that none of them has.
    Unavailable
        Once all have had their turn: those whose model, data, package or GPU is missing, and those that failed.
    """
    checks.switch("dry", cfg.dry)
    configs = compositions(cfg)
    if cfg.dry:
        show(configs)
        return
    with suppress(Unavailable):  # named when its turn has come
        show(configs)
    configs[REPORT] = compose(
        "config", [f"experiment={REPORT}", WHERE_IT_STANDS, *overrides.those_of(REPORT, _asked())]
    )
    unavailable.each(configs, lambda name: _finish(name, configs[name]))


def compositions(cfg: DictConfig) -> dict[str, DictConfig]:
    """The configuration of every experiment: the profile's settings for it, and what was asked for and it has."""
    known: dict[str, list[str]] = OmegaConf.to_container(cfg.profile.reproduce)  # type: ignore[assignment]
    if not (cfg.experiments is None or (isinstance(cfg.experiments, ListConfig) and cfg.experiments)):
        raise InputError(f"experiments={cfg.experiments} must be a list, such as [{', '.join(known)}]")
    names = list(known) if cfg.experiments is None else list(cfg.experiments)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"experiments: {unknown} is none of profile={cfg.profile.name}'s {', '.join(known)}")
    asked = _asked()
    taken = {name: overrides.those_of(name, asked) for name in names}
    for line in asked:
        if not any(line in lines for lines in taken.values()):
            raise InputError(f"{line} is a setting of none of {', '.join(names)}")
    keys = {setting.key_or_group for setting in asked.values()}
    own = {
        name: [line for line, one in overrides.parsed(known[name]).items() if one.key_or_group not in keys]
        for name in names
    }
    return {name: compose("config", [f"experiment={name}", *own[name], *taken[name]]) for name in names}


def show(configs: Mapping[str, DictConfig]) -> None:
    """Print every run, and what the runs of each model need."""
    by_model: dict[str, tuple[ModelSource, list[Planned]]] = {}

    def look(name: str) -> None:
        cfg = configs[name]
        plan: list[Planned] = call(cfg.experiment.plan, cfg)
        if plan:
            print(f"\n{plans.markdown(plan)}", flush=True)
        by_model.setdefault(str(cfg.model), (instantiate(cfg.model), []))[1].extend(plan)

    try:
        unavailable.each(configs, look)
    finally:
        for source, plan in by_model.values():
            print("", *needs.describe(source, plan), sep="\n", flush=True)


def _finish(name: str, cfg: DictConfig) -> None:
    """Run one experiment. What it fails of, memory or a defect, takes hours of work from no other.

    Raises
    ------
    Unavailable
        It did not end well; the reason in a line. A defect's traceback is in the log.
    """
    gc.collect()  # it times and measures memory: nothing may be left of the model before, nor of an error that held it
    environment.release_memory(instantiate(cfg.model).torch_device)
    log.info("reproduce: %s", name)
    try:
        call(cfg.experiment.runner, cfg)
    except Unavailable:
        raise
    except (InputError, NotImplementedError) as error:
        raise Unavailable(str(error)) from error
    except Exception as error:
        log.exception("reproduce: %s failed", name)
        said = unavailable.reason(error)
        raise Unavailable(f"failed, the log has its traceback: {type(error).__name__}: {said}") from error


def _asked() -> dict[str, Override]:
    """What the command line says, but for this experiment's own settings."""
    return {line: setting for line, setting in overrides.asked().items() if setting.key_or_group not in OWN}
