"""The models of the rows of tables, as the code builds and counts them. Imports neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sis_lightning.option_effects import Effect
from sis_lightning.run.recipe import Declared
from sis_lightning.run.record import read_with_checksum, write_with_checksum


@dataclass(frozen=True)
class Model:
    """The model of an experiment, as the current code builds and counts it.

    Attributes:
        recipe: Digest of the resolved configuration, without the seed and without options that do not affect the
            result.
        slug: Short name of the backbone.
        parameters: Number of parameters of the whole model.
        macs: Multiply-accumulates of the whole model for one image.
        image: Height and width of that image in px.
        source: Digest of the YAML and the options that the configuration was resolved from.
        pretraining: `recipe` of the experiment whose weights the backbone starts from; empty without one.
    """

    recipe: str
    slug: str
    parameters: int
    macs: int
    image: tuple[int, int]
    source: str = ""
    pretraining: str = ""


@dataclass(frozen=True)
class Models:
    """The models of all experiments, as the code builds and counts them: `models.json` of a results folder.

    Attributes:
        code: Digest of the code that determines it.
        operators: Names of all registered operators, the paper's first.
        by_key: Models by the keys of the experiments; None for an experiment that is impossible, such as several steps
            of an operator without recurrence.
        declared: The effects that tasks and DataModules of the experiments declare for their options, by class path.
    """

    code: str
    operators: tuple[str, ...]
    by_key: Mapping[str, Model | None]
    declared: Declared = field(default_factory=dict)

    @classmethod
    def none(cls) -> Models:
        """No models."""
        return cls("", (), {})

    @classmethod
    def read(cls, path: Path) -> Models:
        """Reads the file; without a file, or with one of an earlier release, there are no models.

        Raises:
            DataError: If the file does not match its checksum.
        """
        if not path.is_file():
            return cls.none()
        content = read_with_checksum(path, "sis-lightning tables count")
        if "declared" not in content:
            return cls.none()
        models = {
            key: Model(**{**value, "image": tuple(value["image"])}) if value else None
            for key, value in content["models"].items()
        }
        declared = {
            path: {key: Effect(effect) for key, effect in effects.items()}
            for path, effects in content["declared"].items()
        }
        return cls(content["code"], tuple(content["operators"]), models, declared)

    def write(self, path: Path) -> None:
        """Writes the file, with a checksum."""
        models = {key: asdict(model) if model else None for key, model in self.by_key.items()}
        declared = {
            path: {key: effect.value for key, effect in effects.items()} for path, effects in self.declared.items()
        }
        content = {"code": self.code, "operators": list(self.operators), "models": models, "declared": declared}
        write_with_checksum(path, content)
