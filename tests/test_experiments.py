"""Every experiment runs, from its command line, on the model and text that ship with the package."""

import json
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas
import pytest
from experiment_parts import EXPERIMENTS, REPO, Finished, contents, start
from nbclient import NotebookClient

from nndecomp.evaluation.rows import read_rows

SWEEP, PARETO = "exp_010_train_transcoder_pile_sweep", "exp_011_pareto_trained_all_layers"
TABLE = "exp_012_model_table"
SPD = "exp_023_train_spd_pile"
# Evaluate finished runs: of one layer, and of all.
LAYERS = {"exp_005_pareto_gpt2": [3], "exp_006_pareto_pile": [3], "exp_007_pareto_pile_all_layers": None}
PEERS = "exp_025_parity_with_peers"
# Three of the four values of k, and all layers, would be the same code again.
NARROW = ["decomposition.k=8"]
# So would six worlds with three seeds.
QUICK = {
    "exp_004_train_spd_gpt2": ["spd.warmup_steps=5"],
    SPD: ["spd.warmup_steps=5", "training.evaluate_every=5"],
    "exp_028_train_at_equal_compute": ["~compare.variants.sae", "compare.seeds=[0]", "compare.k=[8]"],
    "exp_008_jacobian_faithfulness": [
        *("spd.warmup_steps=5", "evaluation.thresholds=[]"),
        *("~compare.variants.skip_transcoder", "~compare.variants.clt"),
    ],
    "exp_009_diagnose_tail": ["spd.warmup_steps=5", "tail.kept=[1.0,0.9]"],
    "exp_015_crosscoder_model_diff": ["~compare.variants.batchtopk"],
    "exp_016_dedicated_feature_crosscoder": ["~compare.variants.all_none", "~compare.variants.all_sae"],
    "exp_024_canonical_units": [
        "~compare.variants.sae",
        "~compare.variants.clt",
        "compare.seeds=[0,1]",
        "canonical.times=[1,2]",
        "canonical.n_null=1000",
        "canonical.min_tokens=20",
    ],
    "exp_019_ground_truth": [
        "ground_truth.worlds=[two_models,chain]",
        "ground_truth.seeds=[0]",
        "ground_truth.heldout_tokens=512",
    ],
    "exp_020_throughput": ["throughput.systems=[nndecomp_torch_topk]", "throughput.rounds=2"],
    "exp_026_spd_toys": ["toy.training.n_tokens=51200"],
}


def smoke(name: str, out: Path, *arguments: str) -> Finished:
    kind = "sweep" if name == SWEEP else "run"
    return start(REPO / "experiments" / name / "run.py", "+scale=smoke", f"hydra.{kind}.dir={out}", *arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def sweep(out: Path) -> Path:
    """One transcoder a layer."""
    result = smoke(SWEEP, out / SWEEP, *NARROW)
    assert result.status == 0, result.err
    return out / SWEEP


@pytest.fixture(scope="module")
def pareto(out: Path, sweep: Path) -> Path:
    result = smoke(PARETO, out / PARETO, f"runs=[{sweep}]")
    assert result.status == 0, result.err
    assert "per_layer_transcoder_batchtopk_k8_n64_seed0" in result.out, "the table names the set"
    return out / PARETO


@pytest.fixture(scope="module")
def parameters(out: Path) -> Path:
    """A parameter decomposition of all MLPs."""
    result = smoke(SPD, out / SPD, *QUICK[SPD])
    assert result.status == 0, result.err
    return out / SPD


@pytest.mark.parametrize("name", LAYERS)
def test_dictionaries_and_parameters_of_finished_runs_stand_in_one_comparison(
    name: str, out: Path, sweep: Path, parameters: Path
):
    layers = LAYERS[name]
    dictionaries = sweep if layers is None else sweep / f"decomposition.k=8,decomposition.layers={layers}"
    of_layers = [] if layers is None else [f"decomposition.layers={layers}"]
    ks = ["evaluation.topk=[2,4]", "evaluation.topk_all=[6]", "evaluation.thresholds=[0.5]", "compare.k=[8]"]
    result = smoke(name, out / name, f'runs=["{dictionaries}","{parameters}"]', *of_layers, *ks)
    assert result.status == 0, result.err
    rows = read_rows(out / name / "rows.parquet")
    compared = ",".join(map(str, layers or range(4)))
    assert set(rows.layers) == {compared}, "of other layers nothing is replaced"
    (dictionary,) = set(rows.architecture) & {"transcoder", "per_layer_transcoder"}
    found = set(zip(rows.architecture, rows.k, strict=True))
    assert {("spd", 2), ("spd", 4), ("spd", 6), (dictionary, 2), (dictionary, 4), (dictionary, 8)} <= found
    modules = rows[(rows.architecture == "spd") & (rows.metric == "l0") & (rows.inputs == "clean_gates")]
    assert set(modules.site) == {f"L{n}.{m}" for n in layers or range(4) for m in ("c_fc", "down_proj")}


def test_heldout_scores_on_the_way_end_at_those_of_the_finished_run(out: Path):
    result = smoke("exp_002_train_transcoder_ss", out / "looking", "training.evaluate_every=5")
    assert result.status == 0, result.err
    rows = map(json.loads, (out / "looking" / "metrics.jsonl").read_text().splitlines())
    looks = {row["step"]: row for row in rows if row["name"] == "heldout"}
    scores = json.loads((out / "looking" / "scores.json").read_text())
    assert list(looks) == [5, 10] and len(scores) == 4
    assert {name: looks[10][name] for name in scores} == scores
    assert all(looks[5][name] != score for name, score in scores.items())


def test_too_little_heldout_text_is_refused_before_training(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("def area(r): return r * r\n" * 999)
    result = smoke("exp_002_train_transcoder_ss", tmp_path / "run", "tokens=files", f"tokens.path={tmp_path}")
    assert result.status == 2 and "the held-out split of" in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in (SWEEP, PARETO, TABLE, SPD, *LAYERS)])
def test_every_experiment_runs_at_the_smallest_scale(name: str, out: Path):
    result = smoke(name, out / name, *QUICK.get(name, []))
    if name == PEERS and not all(map(find_spec, ("sae_lens", "dictionary_learning"))):
        assert result.status == 2 and "needs the extra `bench`" in result.err and len(result.err.splitlines()) == 1
        pytest.skip("the extra bench, which it compares with, is not installed; it was refused in one sentence")
    assert result.status == 0, result.err
    assert (out / name / "scores.json").is_file()


def test_the_sweep_trains_one_transcoder_a_layer(sweep: Path):
    jobs = sorted(path.parent for path in sweep.glob("*/scores.json"))
    assert [job.name for job in jobs] == [f"decomposition.k=8,decomposition.layers=[{layer}]" for layer in range(4)]
    for layer, job in enumerate(jobs):
        rows = read_rows(job / "rows.parquet")
        assert set(rows.layers) == {str(layer)} and set(rows.architecture) == {"transcoder"}


def test_single_layers_become_one_set_that_replaces_all_mlps(pareto: Path):
    rows = read_rows(pareto / "rows.parquet")
    baselines = {
        "neurons",
        "neurons_by_output_norm",
        "neurons_by_attribution",
        "principal_directions",
        "random_directions",
    }
    assert set(rows.architecture) == {"per_layer_transcoder", *baselines} and set(rows.layers) == {"0,1,2,3"}
    assert {"clean", "live"} <= set(rows.inputs)
    fronts = {"fronts", "fronts_clean", "fronts_live"}
    drawn = {path.stem for path in (pareto / "figures").glob("*.png")}
    assert drawn == {"pareto", "pareto_axes", "fvu_against_l0", *fronts}
    areas = pandas.read_csv(pareto / "areas.csv")
    assert baselines - {"neurons_by_attribution"} <= set(areas[areas.inputs == "live"].family)
    assert "neurons by attribution" in (pareto / "areas.md").read_text()


def test_the_table_of_a_sweep_has_a_line_a_run_and_part(sweep: Path, out: Path):
    result = smoke(TABLE, out / TABLE, f"runs=[{sweep}]")
    assert result.status == 0, result.err
    table = pandas.read_csv(out / TABLE / "table.csv")
    assert len(table) == 4 * 2 * 2, "layers, clean and live, the one part and the whole"
    assert set(table.training_tokens) == {2560} and set(table.parameters) == {
        128 * 64 * 2 + 64,
        128 * 64 * 2 + 64 + 128,
    }
    assert all(f"transcoder, layer {layer}" in result.out for layer in range(4)), "told apart by what differs"
    assert (out / TABLE / "figures" / "model_table.svg").is_file() and "| its layer alone |" in (
        out / TABLE / "table.md"
    ).read_text()


def test_layers_that_are_missing_from_the_runs_are_named(sweep: Path, out: Path):
    part = sweep / "decomposition.k=8,decomposition.layers=[1]"
    result = smoke(PARETO, out / "part", f'runs=["{part}"]')
    assert result.status == 2
    assert "has no layer 0, 2, 3 of those compared; add those runs" in result.err and len(result.err.splitlines()) == 1


def test_runs_of_another_target_are_refused(sweep: Path, out: Path):
    result = smoke(PARETO, out / "other", f"runs=[{sweep}]", "target.dtype=bfloat16")
    assert result.status == 2 and "but this run has target.path=tiny" in result.err


def test_the_notebook_draws_the_front_from_the_rows(pareto: Path):
    notebook = nbformat.read(REPO / "experiments" / PARETO / "pareto.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are stripped"
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"run = {str(pareto)!r}"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(drawn) == 6


def test_the_quickstart_compares_all_methods_clean_and_live(out: Path):
    name = "exp_000_quickstart"
    if not (out / name / "scores.json").exists():
        assert smoke(name, out / name).status == 0
    rows = read_rows(out / name / "rows.parquet")
    methods = {"per_layer_sae", "per_layer_transcoder", "cross_layer_transcoder", "neurons"}
    whole = rows[(rows.site == "all") & (rows.metric == "ce_increase")]
    assert {(a, i) for a, i in zip(whole.architecture, whole.inputs, strict=True)} == {
        (method, inputs) for method in methods for inputs in ("clean", "live")
    }
    assert {"ce_zero", "ce_mean"} <= set(rows.metric)
    scores = json.loads((out / name / "scores.json").read_text())
    assert len(scores) == len(methods) * 3 * 4, "methods, values of k, and ce_increase and fvu, clean and live"


def test_every_experiment_is_in_the_index_and_has_a_readme():
    index = (REPO / "experiments" / "README.md").read_text()
    for name in EXPERIMENTS:
        assert name in index, f"{name} is not in experiments/README.md"
        assert (REPO / "experiments" / name / "README.md").is_file(), f"{name} has no README.md"


@pytest.mark.slow
def test_a_sweep_in_processes_of_its_own_feeds_the_pareto_plot(out: Path):
    sweep = smoke(SWEEP, out / "local", "hydra/launcher=local", "decomposition.k=8,16")
    assert sweep.status == 0, sweep.err
    assert len(list((out / "local").glob("*/scores.json"))) == 8
    result = smoke(PARETO, out / "of_local", f"runs=[{out / 'local'}]")
    assert result.status == 0, result.err
    assert {8.0, 16.0} <= set(read_rows(out / "of_local" / "rows.parquet").k)


def test_jobs_of_a_command_that_share_a_stream_leave_what_each_leaves_by_itself(sweep: Path, out: Path):
    layers = ["decomposition.layers=[1],[2]", "training.share_stream=true"]
    result = smoke(SWEEP, out / "shared", *NARROW, *layers)
    assert result.status == 0, result.err
    jobs = [f"decomposition.k=8,decomposition.layers=[{layer}]" for layer in (1, 2)]
    assert "stream 1 of 1, shared by 2 of 2 jobs" in (out / "shared" / jobs[0] / "run.log").read_text() + result.err
    for job in jobs:
        assert contents(out / "shared" / job) == contents(sweep / job)
        assert (out / "shared" / job / "scores.json").read_text() == (sweep / job / "scores.json").read_text()
