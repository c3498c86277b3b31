"""Laws of trained dictionaries, on the model and text that ship: the numbers that the whole house is for."""

from itertools import pairwise

import pytest
from experiment_parts import REPO, start
from pandas import DataFrame

from nndecomp.evaluation.rows import read_rows

pytestmark = pytest.mark.slow
KS = (4, 16, 64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> DataFrame:
    """The quickstart's transcoders and neurons, three quarters of its training; all MLPs replaced, live."""
    out = tmp_path_factory.mktemp("output") / "quickstart"
    result = start(
        REPO / "experiments/exp_000_quickstart/run.py",
        "compare.architectures=[per_layer_transcoder,cross_layer_transcoder,neurons]",
        "training.n_tokens=300_000",
        f"hydra.run.dir={out}",
    )
    assert result.status == 0, result.err
    rows = read_rows(out / "rows.parquet")
    whole = rows[(rows.site == "all") & (rows.patched == "all")]
    whole = whole.set_index(["name", "inputs", "metric"]).sort_index()
    assert whole.index.is_unique
    return whole


@pytest.mark.parametrize("inputs", ["live", "clean"])
@pytest.mark.parametrize("architecture", ["per_layer_transcoder", "cross_layer_transcoder"])
def test_more_active_features_never_lose_more_beyond_the_interval(rows: DataFrame, architecture: str, inputs: str):
    for fewer, more in pairwise(KS):
        few = rows.loc[(f"{architecture}_k{fewer}", inputs, "ce_increase")]
        many = rows.loc[(f"{architecture}_k{more}", inputs, "ce_increase")]
        assert many.value <= few.high, f"k={more} loses {many.value} nats, k={fewer} at most {few.high}"


@pytest.mark.parametrize("architecture", ["per_layer_transcoder", "cross_layer_transcoder"])
def test_four_features_a_layer_are_worth_most_of_the_mlps(rows: DataFrame, architecture: str):
    lost = rows.loc[(f"{architecture}_k4", "live", "ce_increase")]
    everything = rows.loc[(f"{architecture}_k4", "none", "ce_increase_zero")]
    assert everything.low > 1, f"all MLPs are worth {everything.value} nats: too little to measure against"
    assert lost.high < 0.2 * everything.low


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("architecture", ["per_layer_transcoder", "cross_layer_transcoder"])
def test_features_beat_as_many_neurons(rows: DataFrame, architecture: str, k: int):
    features = rows.loc[(f"{architecture}_k{k}", "live", "ce_increase")]
    assert features.high < rows.loc[(f"neurons_k{k}", "live", "ce_increase")].low
