"""From what was given to the settings of a run."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_ext.app import UserError
from mnist_ext.app.training.settings import RECIPES, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What may be given anew when a run goes on: nothing that would change its numbers so far.
_RESUMABLE = ("epochs", "data_dir", "threads", "target_accuracy")


def config_of(given: dict[str, Any], dry_run: bool = False) -> TrainConfig:
    """Return the settings of a new run.

    Args:
        given: settings by name, which override the recipe and the defaults.
        dry_run: one batch of one epoch.

    Raises:
        UserError: the settings contradict each other.
    """
    recipe = given.get("recipe", TrainConfig.recipe)
    settings = {**RECIPES[recipe], **given}
    if dry_run:
        settings.update(epochs=1, limit_batches=1)
    config = TrainConfig(**settings)
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0; add one or --no-nesterov")
    if config.one_call and config.impl != "ext":
        raise UserError("--one-call needs --impl ext; leave it out")
    return config


def resumed_config(state: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run that goes on.

    Args:
        state: the values in its checkpoint.
        given: settings by name that are to change.

    Raises:
        UserError: a setting cannot change, or the checkpoint has not such settings.
    """
    saved = state["settings"]
    try:
        config = TrainConfig(**{**saved, "hidden": tuple(saved["hidden"])})
    except (TypeError, KeyError):
        raise UserError(
            "the checkpoint is of another version of mnist_ext: its settings differ"
        ) from None
    for name, value in given.items():
        fixed = name not in _RESUMABLE or (name == "epochs" and config.scheduler != "none")
        if fixed and value != getattr(config, name):
            reason = f" under --scheduler {config.scheduler}" if name == "epochs" else ""
            raise UserError(
                f"--{name.replace('_', '-')} cannot change when a run goes on{reason}: it is "
                f"{getattr(config, name)!r}; leave it out"
            )
    begun = state["epoch"] + (state["step"] > 0)
    if given.get("epochs", begun) < begun:
        raise UserError(
            f"--epochs {given['epochs']} is below what is done: the run has begun epoch {begun}; "
            f"give {begun} or more, or leave it out"
        )
    return TrainConfig(**{**asdict(config), "hidden": config.hidden, **given})


def read_toml(path: str) -> list[str]:
    """Return the settings in a TOML file as arguments for the command line.

    Raises:
        UserError: the file cannot be read, is no TOML, or has a key or value that is no setting.
    """
    try:
        values = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
        return [_argument(path, key, value) for key, value in values.items()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no TOML file: {error}") from None
    except (ValueError, RecursionError):
        # Python's limits: digits of a number, and tables or lists in one another.
        raise UserError(
            f"{path} is no TOML file of settings: a number in it is too long, or it is nested too "
            "deeply"
        ) from None


def _argument(path: str, key: str, value: Any) -> str:
    field = TrainConfig.__dataclass_fields__.get(key.replace("-", "_"))
    if field is None:
        names = ", ".join(name.replace("_", "-") for name in TrainConfig.__dataclass_fields__)
        raise UserError(f"{path}: unknown key {key!r}: use one of {names}")
    option = field.name.replace("_", "-")
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key}: expected true or false, got {value!r}")
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{path}: {key}: expected a number or a text, got {value!r}")
    return f"--{option}={value}"
