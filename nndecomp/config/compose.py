"""From Hydra's tree, a saved file, or a name and overrides, to one checked RunConfig."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig, OmegaConf

from nndecomp.config.registry import CONF, register
from nndecomp.config.schema import DecompositionConfig, RunConfig
from nndecomp.config.sentences import COMPOSITION_ERRORS, NULL_GROUP, sentence
from nndecomp.errors import SettingError


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what Hydra and OmegaConf say about a bad setting into a SettingError of one sentence."""
    try:
        yield
    except SettingError:
        raise
    except COMPOSITION_ERRORS as error:
        if isinstance(error, AssertionError) and NULL_GROUP not in str(error):
            raise  # a fault of ours or of Hydra's, not a setting
        raise SettingError(sentence(error, CONF)) from error


def resolve(raw: DictConfig) -> RunConfig:
    """Plain dataclasses: interpolations filled in, invariants checked (SettingError)."""
    with refusing():
        # Merged into the schema once more: `+group.typo=1` on the command line would otherwise be let in.
        checked = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(raw, resolve=True))
        cfg = OmegaConf.to_object(checked)
    assert isinstance(cfg, RunConfig), f"composed a {type(cfg).__name__}"
    return cfg


def changed(cfg: DecompositionConfig, settings: Mapping[str, Any]) -> DecompositionConfig:
    """The same decomposition with some settings, as YAML has them, in place of its own; checked as it is."""
    with refusing():
        new = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cfg), OmegaConf.create(dict(settings))))
    assert isinstance(new, DecompositionConfig), f"merged a {type(new).__name__}"
    return new


@contextmanager
def _beside_a_running_app() -> Iterator[None]:
    """Hydra knows one application at a time; an experiment that composes further settings is itself one."""
    running, runtime = GlobalHydra.instance().hydra, JobRuntime.instance()
    named = runtime.conf.copy()  # what the application is called, after which its log is
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, runtime.conf = running, named


def compose_tree(name: str, overrides: Sequence[str] = (), with_hydra: bool = False) -> DictConfig:
    """Hydra's tree for conf/<name>.yaml; `with_hydra` keeps the node that says where and how jobs run."""
    register()
    with refusing(), _beside_a_running_app(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(name, list(overrides), return_hydra_config=with_hydra)


def compose(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of an experiment, in Python: `compose("exp_000_quickstart", ["+scale=tiny"])`."""
    return resolve(compose_tree(name, overrides))


def load(path: Path) -> RunConfig:
    """The settings a run was started with: its config.yaml."""
    saved = OmegaConf.load(path)
    assert isinstance(saved, DictConfig), f"{path} holds a list, not settings"
    return resolve(saved)


def dump(cfg: RunConfig) -> str:
    """The text of config.yaml. `load` of it equals `cfg`."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """The settings in which two runs differ, as `setting: value of one, value of the other`."""

    def flat(node: object, prefix: str) -> dict[str, object]:
        match node:
            case dict():
                return {k: v for name, value in node.items() for k, v in flat(value, f"{prefix}.{name}").items()}
            case _:
                return {prefix.removeprefix("."): node}

    a, b = (flat(OmegaConf.to_container(OmegaConf.structured(cfg)), "") for cfg in (one, other))
    return [f"{key}: {a.get(key)}, {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
