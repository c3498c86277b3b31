"""A dictionary on disk and on the Hugging Face Hub: config.json (what it is) and model.safetensors (its weights).

config.json         format, format_version, and `DictionarySpec.to_json`: target, sites with widths, groups with
                    what they read and write, activation function with k, scope and bandwidth
model.safetensors   groups.<g>.{encoder.W_enc, encoder.b_enc, W_dec[, W_skip]}, b_dec, and activation.threshold: of batchtopk
                    (active is what strictly exceeds it, one a group or one for all) or .<g> of jumprelu (one a
                    feature); all in units of raw activations, W_enc and W_dec are [feature, d]
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nndecomp.checkpoint import write_directory
from nndecomp.decompositions.spec import DictionarySpec
from nndecomp.errors import SettingError

FORMAT = "nndecomp.SparseDictionary"
FORMAT_VERSION = 2
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


Loaded = TypeVar("Loaded", bound="Pretrained")


class Pretrained(nn.Module):
    """Saving and loading, for a module that its spec alone can build."""

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__()
        self._spec = spec

    @property
    def spec(self) -> DictionarySpec:
        """What the module is now."""
        return self._spec

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the directory; it appears, or replaces the one before, as a whole."""
        write_pretrained(Path(directory), FORMAT, FORMAT_VERSION, self.spec.to_json(), self.state_dict())

    @classmethod
    def from_pretrained(
        cls: type[Loaded], source: str | Path, device: torch.device | str = "cpu", revision: str | None = None
    ) -> Loaded:
        """In eval mode, from a local directory or a Hub id; `revision` is a branch, tag or commit of the latter.

        Raises SettingError if the source is not a dictionary of this format and version, or its weights do not fit
        its configuration.
        """
        directory = source_directory(source, revision)
        module = cls(DictionarySpec.from_json(config_of(directory, FORMAT, FORMAT_VERSION)))
        weights = read_weights(directory)
        check_fit(source, weights, module.state_dict())
        module.load_state_dict(weights, assign=True)
        return module.to(device).eval()

    def push_to_hub(self, repo_id: str, private: bool = False, message: str = "Upload dictionary") -> str:
        """Upload to the Hugging Face Hub, as the user who is logged in there; returns the commit's address."""
        from huggingface_hub import HfApi  # late: slow to import, and most runs never upload

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as beside:
            self.save_pretrained(Path(beside) / "dictionary")
            commit = api.upload_folder(repo_id=repo_id, folder_path=Path(beside) / "dictionary", commit_message=message)
        return str(commit.commit_url)


def source_directory(source: str | Path, revision: str | None) -> Path:
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    # Below a directory that exists, a path is a local one, though `output/<run>` has the form of a Hub id.
    local = directory.parent.is_dir() or str(source).startswith((".", "~", "/", "output/"))
    if local or isinstance(source, Path) or source.count("/") != 1:
        raise SettingError(f"{source} is neither a directory nor a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # late: slow to import, and local directories do not need it

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (OSError, ValueError) as refused:
        raise SettingError(
            f"{source} (revision={revision}) is no directory, and the Hub gives no dictionary of that id: "
            "it is not there, or there is no connection to the Hub"
        ) from refused


def config_of(directory: Path, format: str, version: int) -> dict[str, Any]:
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise SettingError(f"{directory} holds no {name}: it is not a saved dictionary")
    config = json.loads((directory / _CONFIG).read_text())
    if config.get("format") != format:
        raise SettingError(f"{directory}/{_CONFIG} has format {config.get('format')!r}, expected {format!r}")
    if config["format_version"] != version:
        raise SettingError(
            f"{directory}/{_CONFIG} has format_version {config['format_version']}, "
            f"but this version of nndecomp reads {version}"
        )
    return config


def write_pretrained(
    directory: Path, format: str, version: int, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Both files; the directory appears, or replaces the one before, as a whole."""
    whole = {"format": format, "format_version": version, **config}
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}

    def fill(partial: Path) -> None:
        save_file(plain, partial / _WEIGHTS, metadata={"format": "pt"})
        (partial / _CONFIG).write_text(json.dumps(whole, indent=2) + "\n")

    if directory.exists():
        _check_ours(directory)
    write_directory(directory, fill)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Cloned, so that they lie in memory as fresh ones do: where they do not, some products are summed in another order."""
    return {name: tensor.clone() for name, tensor in load_file(directory / _WEIGHTS).items()}


def check_fit(source: str | Path, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """SettingError unless names and shapes are those of the module that config.json describes."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing of that name')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise SettingError(f"weights in {source} do not fit their config.json: {'; '.join(wrong)}")


def _check_ours(directory: Path) -> None:
    foreign = sorted({path.name for path in directory.iterdir()} - {_CONFIG, _WEIGHTS})
    assert not foreign, f"{directory} would be replaced as a whole, but also holds {', '.join(foreign)}"
