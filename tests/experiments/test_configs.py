from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

import run  # noqa: F401  registers the resolvers
from bsfa import InputError
from bsfa.methods import Method
from experiments.calibrate import calibrations
from experiments.methods import ABOUT, variants
from experiments.models import ModelSource
from experiments.records import Store

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = [f"{file.parent.relative_to(CONF)}={file.stem}" for file in sorted(CONF.glob("*/*.yaml"))]
EXPERIMENTS, METHODS, PROFILES = (
    [option for option in OPTIONS if option.startswith(f"{group}=")] for group in ("experiment", "method", "profile")
)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def targets(config: DictConfig) -> Iterator[DictConfig]:
    """Every part of a config that names a class."""
    for value in config.values():
        if isinstance(value, DictConfig):
            if "_target_" in value:
                yield value
            yield from targets(value)


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith("task=")])
def test_every_option_composes_and_fits_the_class_it_names(option):
    config = composed(*(["profile=quick"] if "profile" not in option else []), option)
    assert callable(get_method(config.experiment.runner))
    OmegaConf.to_container(config, resolve=True)
    for part in targets(config):
        kind = get_class(part._target_)
        about = ABOUT if issubclass(kind, Method) else ("_target_", "_convert_")
        settings = {key: value for key, value in part.items() if key not in about}
        inspect.signature(kind).bind(**settings)
        if issubclass(kind, Method) and part.knob:
            assert part.knob in settings


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_experiment_has_a_size_for_every_profile(experiment, profile):
    config = composed(experiment, profile)
    for calibration in calibrations(config):
        assert set(config.profile.k) <= set(calibration.k_values)
    if "task" in config:
        task = instantiate(config.task)
        assert calibrations(config)[0].length == task.longest()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_list_of_variants_that_no_one_else_is(method, tmp_path, model_folder):
    config = composed("profile=quick", method, f"model.path={model_folder}")
    found = variants(config, Store(tmp_path), instantiate(config.model))
    assert found
    assert len({variant.label for variant in found}) == len(found)
    assert len({str(variant.identity()) for variant in found}) == len(found)


def test_a_list_of_strengths_and_a_list_of_texts_are_swept(tmp_path, model_folder):
    config = composed(
        "profile=quick",
        "method=bsfa",
        "method.k=[2,4,4]",
        "calibration.data=[prose,noise,prose]",
        f"model.path={model_folder}",
    )
    labels = [variant.label for variant in variants(config, Store(tmp_path), instantiate(config.model))]
    assert labels == ["bsfa k=2 (prose)", "bsfa k=2 (noise)", "bsfa k=4 (prose)", "bsfa k=4 (noise)"]


def test_a_file_that_a_method_reads_counts_by_what_it_holds(tmp_path, model_folder):
    def identity(file: Path, content: str) -> dict:
        file.write_text(content)
        config = composed("profile=quick", "method=minference", f"method.patterns={file}", f"model.path={model_folder}")
        [found] = variants(config, Store(tmp_path), instantiate(config.model))
        return found.identity()

    (tmp_path / "elsewhere").mkdir()
    first = identity(tmp_path / "patterns.json", "[1]")
    assert identity(tmp_path / "elsewhere" / "patterns.json", "[1]") == first
    assert identity(tmp_path / "patterns.json", "[2]") != first


def test_the_settings_a_user_types_reach_what_they_name():
    config = composed(
        "experiment=niah",
        "profile=quick",
        "method.k=[2]",
        "task.lengths=[300,900]",
        "task.depths=7",
        "task.samples=3",
        "task.seed=5",
        "model.path=/somewhere",
        "results=/elsewhere",
        "tracker.mode=online",
    )
    task = instantiate(config.task)
    assert (task.lengths, task.depths, task.samples, task.seed) == ([300, 900], 7, 3, 5)
    assert config.method.members.bsfa.k == [2]
    assert config.calibration.length == 900
    assert config.tracker.folder == "/elsewhere"
    assert config.model.path == "/somewhere"


def test_w_and_b_sends_nothing_unless_it_is_asked_to():
    assert composed().tracker.mode == "offline"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.samples=0", "calibration.samples=0"),
        ("calibration.length=long", "calibration.length=long"),
        ("calibration.k_values=4", "calibration.k_values=4 must be a list"),
        ("calibration.k_values=[0]", r"calibration.k_values=\[0\]"),
        ("calibration.data=lorem", "lorem is none of prose, noise, mixed, nor a text file"),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused_by_name(override, message):
    with pytest.raises(Exception, match=message) as refusal:
        calibrations(composed("profile=quick", override))
    assert isinstance(refusal.value.__cause__, InputError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int4"}, "int4 is none of float32, bfloat16, float16"),
        ({"device": "abacus"}, "model.device=abacus"),
    ],
)
def test_a_model_setting_that_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        ModelSource(**{"name": "tiny", "dtype": "float32", "device": "cpu"} | settings)
