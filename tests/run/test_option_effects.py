"""Every option says what it changes, and what a resume, a checkpoint and a recipe accept follows from that."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import pytest
from lightning.pytorch import Trainer

from sis_lightning.datamodules import SISDataModule
from sis_lightning.option_effects import Effect, effects_of
from sis_lightning.run.options import TRAINER_EFFECTS, RunOptions
from sis_lightning.run.recipe import changed_recipe, declared_effect, effect_of, effective_changes, recipe, settled
from sis_lightning.run.run import Run
from sis_lightning.tasks import BaseTask

SEG = ["--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml"]


def classes(base: type) -> Iterator[type]:
    yield base
    for cls in base.__subclasses__():
        if cls.__module__.startswith("sis_lightning."):
            yield from classes(cls)


def own_arguments(cls: type) -> set[str]:
    """The arguments of a constructor, without those that `**kwargs` passes on to its bases."""
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {parameter.name for parameter in parameters if parameter.kind not in kinds} - {"self"}


@pytest.mark.parametrize("cls", [*classes(BaseTask), *classes(SISDataModule)], ids=lambda cls: cls.__name__)
def test_every_argument_of_a_class_has_an_effect(cls):
    if "__init__" not in vars(cls):
        return
    unclassified = own_arguments(cls) - set(effects_of(cls))
    assert not unclassified, f"declare their effects in {cls.__name__}.option_effects"
    # What is declared exists: a renamed argument must not leave its effect behind.
    known = {name for base in cls.__mro__ if "__init__" in vars(base) for name in own_arguments(base)}
    declared = {key.partition(".")[0] for key in vars(cls).get("option_effects", {})}
    assert declared <= known


def test_every_option_of_trainer_and_run_has_an_effect():
    assert set(TRAINER_EFFECTS) == set(inspect.signature(Trainer).parameters)
    assert set(RunOptions.option_effects) == {field.name for field in dataclasses.fields(RunOptions)}


def test_every_option_of_a_resolved_run_has_an_effect():
    config = Run.from_arguments(SEG).config
    assert effect_of("model.init_args.backbone.depth", config) is Effect.NETWORK
    assert effect_of("model.init_args.optimizer.init_args.lr", config) is Effect.RESULT
    assert effect_of("data.init_args.root", config) is Effect.NOTHING
    assert effect_of("trainer.max_steps", config) is Effect.RESULT
    assert effect_of("trainer.log_every_n_steps", config) is Effect.NOTHING
    assert effect_of("data.class_path", config) is Effect.RESULT
    # Whether batch norm is over all devices: a record of the other kind is one of another recipe.
    assert effect_of("trainer.sync_batchnorm", config) is Effect.RESULT
    assert effect_of("trainer.devices", config) is Effect.NOTHING
    trainer = config["trainer"]
    otherwise = {**config, "trainer": {**trainer, "sync_batchnorm": not trainer["sync_batchnorm"]}}
    assert recipe(otherwise) != recipe(config)
    assert effect_of("unknown", config) is Effect.RESULT


@pytest.mark.parametrize(
    ("precision", "effect"),
    [
        (None, Effect.NUMERICS),
        ("bf16-mixed", Effect.NUMERICS),
        ("32-true", Effect.NUMERICS),
        ("16-true", Effect.RESULT),
    ],
)
def test_weights_in_16_bits_are_another_recipe(precision, effect):
    assert effect_of("trainer.precision", {}, precision) is effect


@pytest.mark.parametrize(
    ("plugins", "effect"),
    [
        (None, Effect.NUMERICS),
        ([{"class_path": "lightning.pytorch.plugins.MixedPrecision"}], Effect.NUMERICS),
        ({"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}, Effect.NUMERICS),
        ([{"class_path": "lightning.pytorch.plugins.HalfPrecision"}], Effect.RESULT),
        ("BitsandbytesPrecision", Effect.RESULT),
    ],
)
def test_plugins_that_change_the_weights_are_another_recipe(plugins, effect):
    assert effect_of("trainer.plugins", {}, plugins) is effect


def test_the_longest_declared_key_decides():
    effects = {"detector": Effect.NETWORK, "detector.score": Effect.RESULT}
    assert declared_effect(effects, ["detector", "size"]) is Effect.NETWORK
    assert declared_effect(effects, ["detector", "score", "deep"]) is Effect.RESULT
    assert declared_effect(effects, ["other"]) is Effect.RESULT


def test_recipe_and_resume_follow_from_the_effects():
    base = Run.from_arguments(SEG).config
    elsewhere = Run.from_arguments([*SEG, "--data.root", "there", "--data.num_workers", "0", "--task", "mine"]).config
    assert settled(elsewhere) == settled(base)
    assert effective_changes(base, elsewhere) == []
    mixed = Run.from_arguments([*SEG, "--trainer.precision", "bf16-mixed", "--seed_everything", "5"]).config
    assert recipe(mixed) == recipe(base)
    assert settled(mixed) != settled(base)
    assert {key for key, _, _ in effective_changes(base, mixed)} == {"trainer.precision", "seed_everything"}
    assert changed_recipe(base, mixed) == ([], [("trainer.precision", None, "bf16-mixed")])
    coarse = Run.from_arguments([*SEG, "--trainer.precision", "bf16-true"]).config
    assert [key for key, _, _ in changed_recipe(base, coarse)[0]] == ["trainer.precision"]
    assert recipe(Run.from_arguments([*SEG, "--model.background_weight", "0.5"]).config) != recipe(base)
