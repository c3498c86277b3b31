"""Settings: every file composes, and a setting that cannot work is refused in one sentence."""

import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from experiment_parts import EXPERIMENTS, REPO, SCALES, SWEEPS, small_target

from nndecomp import build
from nndecomp.config import compose as composing
from nndecomp.config.compose import compose, compose_tree, differences, dump, load
from nndecomp.config.jobs import command_line
from nndecomp.config.registry import CONF, job_directory
from nndecomp.config.schema import Architecture, RunConfig, TargetKind, TokensKind
from nndecomp.config.sentences import settings
from nndecomp.errors import SettingError

NAME = "exp_000_quickstart"
GROUPS = ["target", "tokens", "activations", "decomposition", "training", "evaluation", "log"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"target.path={small_target(tmp_path_factory.mktemp('target') / 'model')}"


def schemas(schema: type = RunConfig) -> Iterator[type]:
    yield schema
    for hint in get_type_hints(schema).values():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and is_dataclass(kind):
                yield from schemas(kind)


def sentence(*arguments: str, name: str = NAME) -> str:
    """What the user reads."""
    with pytest.raises(SettingError) as refused:
        for cfg in command_line(name, arguments).jobs:
            build.check(cfg)
    assert "\n" not in str(refused.value), f"more than one line: {refused.value}"
    return str(refused.value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_at_every_scale_on_the_shipped_model_and_text(name: str):
    assert compose(name).name == name
    for scale in SCALES:
        cfg = compose(name, [f"+scale={scale}"])
        assert (cfg.target.kind, cfg.target.path) == (TargetKind.llama_simple_mlp, "tiny")
        assert cfg.tokens.kind in (TokensKind.stdlib, TokensKind.stdlib_docs) and cfg.tokens.tokens_column is None


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))],
)
def test_every_option_of_every_group_composes(group: str, option: str):
    needs = {"store": ["activations.store=somewhere"], "files": ["tokens.path=somewhere"]}
    compose("config", ["name=any", f"{group}={option}", *needs.get(option, [])])


def test_the_activation_functions_without_k_compose_as_the_sweep_file_says():
    lines = (CONF / "sweep" / "activation.yaml").read_text().splitlines()
    said = [line.removeprefix("#").split() for line in lines if line.startswith("#   ")]
    made = [compose("exp_001_train_transcoder_pile", overrides).decomposition for overrides in said]
    assert [each.activation.value for each in made] == ["jumprelu", "relu"]


@pytest.mark.parametrize("axis", SWEEPS)
def test_every_sweep_axis_names_settings_or_groups_that_exist(axis: str):
    said = yaml.safe_load((CONF / "sweep" / f"{axis}.yaml").read_text())["hydra"]
    assert said["mode"] == "MULTIRUN" and len(said["sweeper"]["params"]) == 1, "one axis a file"
    (key,) = said["sweeper"]["params"]
    assert key in set(settings()) | set(GROUPS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_every_axis(name: str):
    hydra = compose_tree(name, [f"+sweep=[{','.join(SWEEPS)}]"], with_hydra=True).hydra
    assert hydra.mode.name == "MULTIRUN" and len(hydra.sweeper.params) == len(SWEEPS)


def test_axes_multiply_and_a_value_on_the_command_line_narrows_one():
    name = "exp_003_train_clt_pile"
    jobs = command_line(name, ["+sweep=[architecture,seed]"]).jobs
    assert len({(j.decomposition.architecture, j.seed) for j in jobs}) == len(jobs) == 3 * 3
    narrowed = command_line(name, ["+sweep=[k,seed]", "decomposition.k=8", "seed=1,2"]).jobs
    assert [(j.decomposition.k, j.seed) for j in narrowed] == [(8, 1), (8, 2)]


def test_the_sweep_of_exp_010_is_one_job_a_layer_and_k():
    jobs = command_line("exp_010_train_transcoder_pile_sweep", []).jobs
    pairs = [(job.decomposition.layers, job.decomposition.k) for job in jobs]
    assert sorted(pairs) == [([layer], k) for layer in range(4) for k in (8, 16, 32, 64)]


def test_asking_for_help_composes_no_jobs():
    assert command_line(NAME, ["--help"]).jobs == []
    assert command_line(NAME, ["--cfg", "job"]).jobs == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_saved_settings_come_back_equal(name: str, tmp_path: Path):
    cfg = compose(name, ["decomposition.aux_coefficient=0.5", "runs=[a,b]"])
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert load(tmp_path / "config.yaml") == cfg
    assert differences(cfg, compose(name)) == ["decomposition.aux_coefficient: 0.5, 0.03125", "runs: ['a', 'b'], []"]


def test_a_comparison_wires_architectures_as_their_own_files_do():
    for name, cfg in build.decompositions(compose(NAME)).items():
        own = compose(NAME, [f"decomposition={cfg.architecture.value}"]).decomposition
        assert (cfg.reads, cfg.writes) == (own.reads, own.writes), name
        assert (cfg.centre_input, cfg.unit_norm_decoder) == (own.centre_input, own.unit_norm_decoder), name
        assert cfg.architecture is not Architecture.neurons or cfg.activation is own.activation


# The traps of Hydra and OmegaConf.


def test_schemas_can_be_filled_from_yaml():
    for schema in schemas():
        assert not schema.__dataclass_params__.frozen, f"{schema.__name__}: OmegaConf cannot fill a frozen schema"
        assert all(field.kw_only for field in fields(schema)), f"{schema.__name__} takes settings by position"


def test_choices_are_written_as_the_names_of_enums_and_lists_stay_lists():
    for schema in schemas():
        for name, hint in get_type_hints(schema).items():
            text = str(hint)
            assert "Literal" not in text and "tuple" not in text, f"{schema.__name__}.{name}: OmegaConf has no {text}"
            for kind in (hint, *get_args(hint)):
                if isinstance(kind, type) and issubclass(kind, Enum):
                    assert all(member.name == member.value == member.name.lower() for member in kind)
    assert isinstance(compose("exp_001_train_transcoder_pile").decomposition.k, list)


def test_settings_can_be_pickled_for_a_cluster():
    assert all(schema.__module__.startswith("nndecomp.config.") for schema in schemas())


def test_experiments_lie_at_the_root_of_conf_where_sweeps_find_them():
    assert sorted(path.stem for path in CONF.rglob("exp_*.yaml")) == EXPERIMENTS
    assert all(path.parent == CONF for path in CONF.rglob("exp_*.yaml"))


def test_an_experiment_lists_its_groups_because_scales_cannot_override_an_override():
    for path in CONF.glob("exp_*.yaml"):
        said = yaml.safe_load(path.read_text())["defaults"]
        assert not [each for each in said if isinstance(each, dict) and next(iter(each)).startswith("override")], path


def test_an_experiment_says_its_command_first():
    for path in CONF.glob("exp_*.yaml"):
        assert path.read_text().startswith(f"# python experiments/{path.stem}/run.py"), path


def directories(*overrides: str) -> Any:
    return compose_tree(NAME, overrides, with_hydra=True).hydra


def test_output_lies_in_the_repository_wherever_the_command_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Path(directories().run.dir).parent == REPO / "output" / NAME
    assert Path(directories().sweep.dir).parent == REPO / "output" / NAME


def test_two_starts_in_one_second_have_two_directories():
    assert directories().run.dir != directories().run.dir
    assert directories().sweep.dir != directories().sweep.dir


def test_directories_of_a_sweep_can_be_named_before_hydra_is_configured():
    assert "${hydra:" not in (CONF / "base.yaml").read_text()


def test_a_job_is_named_by_its_overrides_so_that_a_longer_sweep_finds_it():
    assert job_directory(3, "decomposition.k=8,seed=0") == job_directory(7, "decomposition.k=8,seed=0")
    assert job_directory(3, "target.path=/a/b") == "target.path=_a_b"
    assert job_directory(3, "") == "3"
    long = [job_directory(0, "x" * 300 + last) for last in "ab"]
    assert len(set(long)) == 2 and all(len(name) < 120 for name in long)


# Settings that cannot work.


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("decomposition.kk=3", "decomposition.kk is not a setting; did you mean decomposition.k?"),
        ("+decomposition.kk=3", "decomposition.kk is not a setting; did you mean decomposition.k?"),
        ("trainning.lr=3", "trainning is not a setting; did you mean training?"),
        ("k=3", "k is not a setting; did you mean decomposition.k?"),
        (
            "presets={plain: [topk]}",
            "presets.plain cannot be added to an empty presets without a plus; "
            "write '+presets={<name>: [<file of conf/decomposition>]}'",
        ),
        ("+presets={plain: topk}", "presets={plain: topk} is not a list; write presets.plain=[...]"),
        ("seeed=3", "seeed is not a setting; did you mean seed?"),
        ("training.n_tokens=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("training.lr=[1]", "training.lr"),
        ("decomposition.activation=gelu", "expected one of [relu, gated, topk"),
        ("decomposition.k=abc", "decomposition.k='abc' is not a whole number or a list of them"),
        ("decomposition.n_features=null", "decomposition.n_features"),
        ("target=gtp2", "target=gtp2 is not possible: no file conf/target/gtp2.yaml; did you mean gpt2?"),
        ("+sweep=kk", "did you mean k?"),
        ("+scale=smal", "no file conf/scale/smal.yaml; there are: smoke, tiny"),
        ("target.kind=hf", "expected one of [llama_simple_mlp, huggingface, transformer_lens, planted, synthetic]"),
        ("pretrain.n_layers=2", "null in this experiment"),
        ("decomposition.k={", "cannot be read as setting=value"),
        ("decomposition.k=8,16", "--multirun"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        ("device=gpu", "device=gpu is not a device; write auto, cpu, cuda"),
        ("activations=store", "activations.store"),
        ("training.clip_norm=0", "training.clip_norm=0.0 must be positive; null clips nothing"),
        ("training.lr_end=2", "training.lr_end=2.0 is a share of training.lr"),
        ("training.weight_decay=-1", "training.weight_decay=-1.0 must not be negative"),
        ("training.evaluate_every=-1", "training.evaluate_every=-1 must be 0 or more"),
        ("activations.normalisation_tokens=0", "activations.normalisation_tokens=0 must be positive"),
        ("evaluation.bootstrap=-1", "evaluation.bootstrap=-1 must be 0 or more"),
        ("evaluation.inputs=[]", "evaluation.inputs=[] must name at least one"),
        ("evaluation.patched=[all,all]", "evaluation.patched=['all', 'all'] must name at least one, and each once"),
        ("evaluation.patched=[single]", "evaluation.patched=['single'] lacks all"),
        ("runs=output", "runs=output is not a list; write runs=[...]"),
        ("tokens=files", "tokens.path has no value; write tokens.path=..."),
        ("compare.k=[]", "compare.k=[] must name at least one"),
        ("compare.architectures=[neurons,neurons]", "each once"),
    ],
)
def test_a_bad_setting_is_named_in_one_sentence(argument: str, said: str, target: str):
    assert said in sentence(target, argument)


def test_a_typo_in_a_yaml_file_names_the_file_and_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(composing, "CONF", tmp_path / "conf")
    path = tmp_path / "conf" / f"{NAME}.yaml"
    path.write_text(path.read_text().replace("training:", "trainning:"))
    assert sentence() == f"conf/{NAME}.yaml: trainning is not a setting; did you mean training?"
    path.write_text(path.read_text().replace("trainning:", "training: ["))
    assert "not YAML" in sentence()


def test_a_group_of_the_run_that_is_not_there_is_named(target: str):
    assert "sequences" in sentence(target, "evaluation.n_seqs=1")


def test_what_only_the_target_can_refuse_is_refused_without_its_weights(tmp_path: Path):
    directory = small_target(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    at = f"target.path={directory}"
    few = ["decomposition.n_features=64", "compare.k=[4]"]
    one = "exp_001_train_transcoder_pile"
    like_shipped = [at, "target.kind=llama_simple_mlp", "tokens=stdlib", "tokens.seq_len=64"]

    assert "asks for layer 4" in sentence(*like_shipped, "decomposition.layers=[1,4]", name=one)
    assert "L9.mlp_in" in sentence(*like_shipped, "decomposition.reads=[L9.mlp_in]", name=one)
    assert "'mlp_inn'" in sentence(*like_shipped, "decomposition.reads=[mlp_inn]", name=one)
    assert "3 entries" in sentence(*like_shipped, "decomposition.k=[1,2,3]", name=one)
    assert "tokens.seq_len=65" in sentence(at, "tokens.seq_len=65", *few)
    assert "compare.architectures has sae" in sentence(at, "compare.architectures=[sae]", "tokens.seq_len=64", *few)
    nowhere = tmp_path / "nowhere"
    assert f"activations.store={nowhere}" in sentence(
        at, "tokens.seq_len=64", "activations=store", f"activations.store={nowhere}", *few
    )
    assert f"runs: {nowhere}" in sentence(at, "tokens.seq_len=64", f"runs=[{nowhere}]", *few)
    assert "target.path=nowhere" in sentence("target.path=nowhere")


def test_a_sweep_with_one_impossible_job_is_refused_as_a_whole(target: str):
    said = sentence("--multirun", target, "compare=null", "tokens.seq_len=64", "decomposition.k=8,9999")
    assert said == "decomposition.k=9999 must lie between 1 and decomposition.n_features=512"


def test_every_preset_is_in_the_index():
    index = (CONF / "decomposition" / "README.md").read_text()
    for path in sorted((CONF / "decomposition").glob("*.yaml")):
        assert f"`{path.stem}`" in index, f"conf/decomposition/README.md does not name {path.stem}"
