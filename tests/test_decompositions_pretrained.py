"""A saved dictionary is whole or absent, and nothing else is taken for one."""

import json

import pytest
import torch
from decomposition_parts import ARCHITECTURES, dictionary, inputs, settled
from safetensors.torch import load_file, save_file

from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError


@pytest.fixture
def saved(tmp_path):
    settled(**ARCHITECTURES["skip_cross_layer_transcoder"]).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dictionary_is_json_and_safetensors_and_names_its_wiring(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert (config["format_version"], config["target"]) == (2, "toy")
    assert config["groups"][1] == {
        "name": "L1",
        "reads": ["L1.mlp_in"],
        "writes": ["L1.mlp_out", "L2.mlp_out"],
        "n_features": 24,
        "encoder": None,
        "ranks": [],
        "attention": None,
    }
    assert config["activation"]["k"] == [3, 3, 3]


def test_saving_again_replaces_and_leaves_nothing_beside(saved):
    other = settled(seed=3, **ARCHITECTURES["transcoder"])
    other.save_pretrained(saved)
    assert SparseDictionary.from_pretrained(saved).spec == other.spec
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_after_a_save_that_broke_off_leaves_nothing_of_it(tmp_path, monkeypatch):
    def broken(*args, **settings) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr("nndecomp.decompositions.pretrained.save_file", broken)
        settled().save_pretrained(tmp_path / "saved")
    settled().save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_saving_never_replaces_a_directory_of_something_else(saved):
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(AssertionError, match=r"also holds thesis\.tex"):
        settled().save_pretrained(saved)
    assert (saved / "thesis.tex").exists()


def test_a_loaded_dictionary_can_be_trained_on(saved):
    loaded = SparseDictionary.from_pretrained(saved)
    loaded(inputs(loaded))[0].sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_bf16_weights_come_back_as_bf16(tmp_path):
    made = dictionary().to(torch.bfloat16)
    made.save_pretrained(tmp_path / "half")
    assert SparseDictionary.from_pretrained(tmp_path / "half").b_dec.dtype == torch.bfloat16


def test_an_unknown_version_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(SettingError, match="format_version 99, but this version of nndecomp reads 2"):
        SparseDictionary.from_pretrained(saved)


def test_a_configuration_of_something_else_is_refused(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(SettingError, match="has format None"):
        SparseDictionary.from_pretrained(saved)


def test_weights_of_another_shape_or_name_are_refused_by_name(saved):
    weights = load_file(saved / "model.safetensors")
    weights["groups.0.b_enc"] = torch.zeros(7)
    del weights["b_dec"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(SettingError, match=r"b_dec is missing, expected \(18,\); groups.0.b_enc is \(7,\), expected"):
        SparseDictionary.from_pretrained(saved)


def test_a_directory_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(SettingError, match="holds no model.safetensors"):
        SparseDictionary.from_pretrained(saved)


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(SettingError, match="neither a directory nor a Hub id"):
        SparseDictionary.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="neither a directory nor a Hub id"):
        SparseDictionary.from_pretrained("./some/where")


def test_what_is_pushed_to_the_hub_can_be_loaded_from_it(tmp_path, monkeypatch):
    """The Hub client's own calls are stood in for by a directory: there is no network in tests."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    def create_repo(self, repo_id: str, **settings) -> None:
        (tmp_path / repo_id).mkdir(parents=True)

    def upload_folder(self, repo_id: str, folder_path, commit_message: str):
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **which: str(tmp_path / repo_id))
    made = settled()
    assert made.push_to_hub("someone/transcoders") == "https://hub/someone/transcoders"
    loaded = SparseDictionary.from_pretrained("someone/transcoders")
    assert torch.equal(loaded(inputs(made))[0], made(inputs(made))[0])
