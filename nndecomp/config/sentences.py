"""Hydra's and OmegaConf's complaints about settings, each as one sentence that says what would be right."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from nndecomp.config.schema import RunConfig

# What composing raises for a bad setting. ValueError: a group given a number. AssertionError: only OmegaConf's, for
# `compare.k=[8]` where compare is null.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, AssertionError)

NULL_GROUP = "Unexpected type for root: NoneType"


def settings(schema: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every setting's dotted name, groups included."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        yield prefix + field.name
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(kind) and isinstance(kind, type):
                yield from settings(kind, f"{prefix}{field.name}.")


def group_of(key: str) -> str:
    return key.rpartition(".")[0]


def unknown_setting(key: str) -> str:
    """`key` is no setting: what was probably meant, and what there is beside it."""
    names = list(settings())
    if group_of(key) == "presets":
        return f"{key} cannot be added to an empty presets without a plus; write '+presets={{<name>: [<file of conf/decomposition>]}}'"
    beside = [name for name in names if group_of(name) == group_of(key)] or [n for n in names if "." not in n]
    last = key.rpartition(".")[2]
    # A right name in the wrong group, else the nearest spelling.
    likely = [name for name in names if name.rpartition(".")[2] == last] or get_close_matches(key, names, n=1)
    return f"{key} is not a setting; " + (f"did you mean {likely[0]}?" if likely else f"there are: {', '.join(beside)}")


def missing_option(error: MissingConfigException, conf: Path) -> str:
    """A file of a group, or a primary config, that is not there."""
    asked = error.missing_cfg_file
    assert isinstance(asked, str), f"one config is missing at a time, not {asked}"
    group, _, option = asked.removesuffix(".yaml").rpartition("/")
    there = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    guess = get_close_matches(option, there, n=1)
    return (
        f"{group}={option} is not possible: no file conf/{asked.removesuffix('.yaml')}.yaml; "
        f"{f'did you mean {guess[0]}? There' if guess else 'there'} are: {', '.join(there)}"
    )


def root(error: BaseException) -> BaseException:
    """What OmegaConf said, beneath what Hydra wrapped around it."""
    beneath = error.__cause__ or error.__context__
    return beneath if isinstance(beneath, OmegaConfBaseException) else error


def sentence(error: BaseException, conf: Path) -> str:
    """One line. `conf` is the directory of the YAML files."""
    first = root(error)
    said = re.split(r"\n", str(first))[0].strip()
    yaml = re.match(r"In '([^']+)': .* raised while composing config", str(error))
    where = f"conf/{yaml[1]}.yaml: " if yaml else ""
    match first:
        case MissingConfigException():
            return missing_option(first, conf)
        case OverrideParseException():
            return f"{first.override} cannot be read as setting=value ({said}); quote values with special characters"
        case ConfigKeyError() | ConfigAttributeError() if first.full_key:
            return where + unknown_setting(first.full_key)
        case ValidationError():
            given = re.search(r"override (\S+=.*)", str(error))
            asked = given[1] if given else first.full_key
            if "is not a ListConfig" in said or "type hint 'typing.List" in said:
                return f"{where}{asked} is not a list; write {first.full_key}=[...]"
            return f"{where}{asked} is not possible: {first.full_key}: {said}"
        case MissingMandatoryValue():
            return f"{where}{first.full_key} has no value; write {first.full_key}=..."
        case YAMLError():
            return f"a file in conf/ is not YAML: {' '.join(str(first).split())}"
        case AssertionError():
            return "a setting reaches into a group that is null in this experiment: compare.* or pretrain.*"
        case _:
            return where + " ".join(str(first).split())
