"""Options of a run from the command line, a file and ``--set``, in that order of weakness."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import typer

from pinet_fast.errors import ConfigError
from pinet_fast.training import RunConfig
from pinet_fast.training.config import CANDIDATE_MODELS

_FIELDS = {f.name for f in dataclasses.fields(RunConfig)}
_CANDIDATES = 100  # negatives of an evaluation, for models that score candidates


def given_options(context: typer.Context) -> dict[str, Any]:
    """Return the options of RunConfig that the command line names itself."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name in _FIELDS and source is not None and source.name != "DEFAULT":
            given[name] = str(value) if isinstance(value, Path) else value
    return given


def resolved(
    given: dict[str, Any], config_file: Path | None, settings: list[str] | None
) -> RunConfig:
    """Return the options of a run: the file's, then the command line's, then those of ``--set``.

    What none of them names follows from the rest: no heads for the joint baseline, and for DIN
    binary cross-entropy and 100 negatives to rank against.

    Raises:
        ConfigError: Anything wrong with a key or a value, or no log is named.
    """
    values = {} if config_file is None else read_config(config_file)
    values |= given
    values |= dict(map(read_setting, settings or ()))
    if not values.get("data"):
        raise ConfigError("--data: missing; name a Parquet or CSV log, as in --data log.csv")
    is_candidate = values.get("model") in CANDIDATE_MODELS
    values.setdefault("heads", values.get("rule", RunConfig.rule) != "joint")
    values.setdefault("loss", "bce" if is_candidate else RunConfig.loss)
    values.setdefault("eval_negatives", _CANDIDATES if is_candidate else 0)
    return RunConfig.from_dict(values)


def read_config(path: Path) -> dict[str, Any]:
    """Read options from a file.

    Raises:
        ConfigError: Missing, neither TOML nor JSON, or no table of options.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: not found; name a TOML or JSON file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: cannot be read as TOML or JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected keys and values, got {type(values).__name__}")
    return values


def read_setting(text: str) -> tuple[str, Any]:
    """Return the key and the value of ``KEY=VALUE``, of the type that the key has.

    Raises:
        ConfigError: No key, or a value of another type. Unknown keys are RunConfig's to refuse.
    """
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, as in --set lr=0.003")
    kind = get_type_hints(RunConfig).get(key, str)
    try:
        if kind is bool:
            return key, {"true": True, "false": False}[value.strip().lower()]
        return key, kind(value)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ConfigError(f"--set {text}: expected {expected} for {key}") from None


def seed_runs(config: RunConfig, out: Path, seeds: str) -> list[tuple[RunConfig | None, Path]]:
    """Return a run for each seed of ``0,1,2``, in folders of their own.

    Raises:
        ConfigError: No list of different whole numbers.
    """
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {seeds}: expected different whole numbers, as in 0,1,2")
    return [(replace(config, seed=seed), out / f"seed-{seed}") for seed in numbers]
