"""A parameter decomposition on disk: config.json (what it is) and model.safetensors (its weights).

config.json         format, format_version, target (its name), maps in order: path, kind, d_in, d_out, n_components and the
                    Frobenius norm of the map's matrix, where components are another map's, transposed, its path as tied_to,
                    and the importance functions' settings
model.safetensors   banks.<i>.{V, U} of map i, and importance.*
"""

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nndecomp.config.checks import require
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.pretrained import check_fit, config_of, read_weights, source_directory, write_pretrained
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.targets.maps import LinearMap, map_named

FORMAT = "nndecomp.ParameterDecomposition"
FORMAT_VERSION = 1
# Of the norm of a map's matrix: what precision and device may change.
TOLERANCE = 1e-2


def save_parameters(decomposition: ParameterDecomposition, directory: Path, target: str) -> None:
    """Write the directory; it appears, or replaces the one before, as a whole."""
    importance = {
        key: value.value if isinstance(value, Enum) else value for key, value in asdict(decomposition.cfg).items()
    }
    config = {
        "target": target,
        "maps": [
            _fact(each, C) | ({"tied_to": decomposition.tie[each.name]} if each.name in decomposition.tie else {})
            for each, C in decomposition.sizes.items()
        ],
        "importance": importance,
    }
    write_pretrained(directory, FORMAT, FORMAT_VERSION, config, decomposition.state_dict())


def _fact(linear: LinearMap, C: int) -> dict[str, Any]:
    return {
        "name": linear.name,
        "kind": linear.kind.value,
        "d_in": linear.d_in,
        "d_out": linear.d_out,
        "n_components": C,
        "norm": float(linear.matrix().norm()),
    }


def load_parameters(source: str | Path, model: nn.Module) -> ParameterDecomposition:
    """In eval mode, of the maps of `model`. SettingError if the source is no parameter decomposition, or one of another model."""
    directory = source_directory(source, None)
    config = config_of(directory, FORMAT, FORMAT_VERSION)
    maps: dict[LinearMap, int] = {}
    tie: dict[str, str] = {}
    for fact in config["maps"]:
        linear = map_named(model, fact["name"])
        require(linear is not None, f"{source} decomposes {fact['name']}, a linear map that this model does not have")
        assert linear is not None, "checked above"
        if "tied_to" in fact:
            tie[fact["name"]] = fact.pop("tied_to")
        here, norm = _fact(linear, fact["n_components"]), fact.pop("norm")
        own = here.pop("norm")
        require(here == fact, f"{source} decomposes {fact['name']} as {fact}, but this model's is {here}")
        require(
            abs(own - norm) <= TOLERANCE * norm,
            f"{source} decomposes a {fact['name']} of norm {norm:.4g}, but this model's has norm {own:.4g}: it is another "
            f"model than {config['target']}",
        )
        maps[linear] = fact["n_components"]
    settings = config["importance"]
    importance = ImportanceConfig(**{**settings, "kind": ImportanceKind(settings["kind"])})
    decomposition = ParameterDecomposition(maps, importance, seed=0, tie=tie)
    weights = read_weights(directory)
    check_fit(source, weights, decomposition.state_dict())
    with torch.no_grad():
        decomposition.load_state_dict(weights)
    return decomposition.eval()
