"""Laws of streamed statistics, and of rows of a real model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from activation_parts import READ, WRITE, Counting, settings
from experiment_parts import EXPERIMENTS
from torch import Tensor

from nndecomp.activations.buffer import ShuffleBuffer
from nndecomp.activations.harvest import Harvester, kept
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.statistics import RunningStatistics, affine, measure, normalisation, site_means, site_scales
from nndecomp.activations.store import open_store
from nndecomp.activations.store_writer import write_store
from nndecomp.activations.stream import RowStream, StoreStream
from nndecomp.config.compose import compose
from nndecomp.config.schema import DType, Normalisation, TargetConfig, TargetKind, TokensConfig, TokensKind
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.types import Layout, Point, Site

CPU = torch.device("cpu")
N_VOCAB = 8192


def statistics_of(*batches: Tensor) -> RunningStatistics:
    statistics = RunningStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_numpy_in_float64(dtype: torch.dtype) -> None:
    rows = (torch.randn(5000, 7) * torch.arange(1, 8) + 100).to(dtype)
    statistics = statistics_of(rows[:1], rows[1:2000], rows[2000:2000], rows[2000:])
    exact = rows.double().numpy()
    assert statistics.count == 5000
    np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.variance, exact.var(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.mean_square, (exact**2).mean(0), rtol=1e-12)


def test_variance_survives_a_mean_a_million_times_larger() -> None:
    rows = torch.tensor([[1e6 - 1], [1e6], [1e6 + 1]]).repeat(10000, 1)
    assert statistics_of(rows).variance.item() == pytest.approx(2 / 3, rel=1e-9)


def test_statistics_do_not_depend_on_how_rows_are_cut() -> None:
    rows = torch.randn(3000, 3)
    whole, cut = statistics_of(rows), statistics_of(*rows.split(77))
    assert torch.allclose(whole.mean, cut.mean, rtol=1e-13) and torch.allclose(whole.m2, cut.m2, rtol=1e-13)


def test_restored_statistics_go_on() -> None:
    rows, restored = torch.randn(100, 3), RunningStatistics(3)
    begun = statistics_of(rows[:60])
    restored.load_state_dict(begun.state_dict())
    for statistics in (begun, restored):
        statistics.update(rows[60:])
    assert torch.equal(begun.mean, restored.mean) and torch.equal(begun.m2, restored.m2) and restored.count == 100


def test_rows_divided_by_the_scale_have_mean_square_one() -> None:
    layout = Layout.of({READ: 2, WRITE: 3})
    rows = torch.cat([torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 2.0, 2.0]])], dim=1)
    scales = site_scales(statistics_of(rows), layout)
    assert scales == {READ: pytest.approx(12.5**0.5), WRITE: pytest.approx(2.0)}
    rows = torch.randn(1000, 5) * 7 + 1
    scales = site_scales(statistics_of(rows), layout)
    for site, span in layout.spans.items():
        scaled = rows[:, span] / scales[site]
        assert scaled.square().sum(1).mean().item() == pytest.approx(layout.widths[layout.sites.index(site)], rel=1e-5)


@pytest.mark.parametrize("kind", list(Normalisation))
def test_normalised_rows_have_the_mean_and_the_size_that_the_setting_says(kind: Normalisation) -> None:
    layout = Layout.of({READ: 2, WRITE: 3})
    rows = torch.randn(4000, 5) * torch.tensor([1.0, 2.0, 10.0, 20.0, 0.0]) + torch.tensor([0.0, 1.0, 5.0, -5.0, 3.0])
    scales = normalisation(statistics_of(rows), layout, kind)
    parts = {site: affine(scale, layout.width_of(site)) for site, scale in scales.items()}
    made = {site: (rows[:, span] - parts[site].mean) / parts[site].scale for site, span in layout.spans.items()}
    squares = {site: made[site].square().mean().item() for site in layout.sites}
    centred = all(bool((part.mean(0).abs() < 1e-5).all()) for part in made.values())
    assert centred == (kind in (Normalisation.centred, Normalisation.coordinate))
    match kind:
        case Normalisation.none:
            assert all(torch.equal(made[site], rows[:, span]) for site, span in layout.spans.items())
        case Normalisation.dataset | Normalisation.centred:
            assert list(squares.values()) == pytest.approx([1, 1], rel=1e-5)
        case Normalisation.shared:
            assert (2 * squares[READ] + 3 * squares[WRITE]) / 5 == pytest.approx(1, rel=1e-5)
            assert squares[WRITE] / squares[READ] == pytest.approx(
                (rows[:, 2:].square().mean() / rows[:, :2].square().mean()).item(), rel=1e-4
            )
        case Normalisation.coordinate:
            columns = torch.cat(list(made.values()), 1).square().mean(0)
            torch.testing.assert_close(columns, torch.tensor([1.0, 1, 1, 1, 0]), rtol=1e-5, atol=1e-6)


def test_masked_positions_never_enter_the_scales() -> None:
    """A fault of Language-Model-SAEs: its norms are estimated without the mask, so that BOS and padding swamp them."""

    def tokens() -> Counting:
        return Counting(16, padded=True, bos=True)

    class Loud(LlamaSimpleMLPTarget):
        """What stands at BOS and at padding is a million times as large."""

        def record(self, tokens: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
            batch = Counting(16, padded=True, bos=True).next_batch(2)
            masked = ~batch.mask | batch.is_bos
            return {
                site: v * torch.where(masked, 1e6, 1.0)[..., None] for site, v in super().record(tokens, sites).items()
            }

    plain = llama()
    loud = Loud("loud", plain.model, Vocabulary())
    sites = [Site(0, Point.mlp_in), Site(1, Point.mlp_out)]
    for kind in (Normalisation.dataset, Normalisation.coordinate):
        scales = []
        for target in (plain, loud):
            source = Harvester(target, tokens(), sites, settings(drop_bos=True), seq_len=16)
            scales.append(normalisation(measure(source, 1), source.layout, kind))
        for site in sites:
            ours, theirs = (affine(each[site], 24) for each in scales)
            assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.mean, theirs.mean)


def test_the_scales_are_of_as_many_rows_as_asked_for_and_only_rows_that_count_are_counted() -> None:
    tokens = Counting(16, padded=True, bos=True)
    source = Harvester(llama(), tokens, [Site(0, Point.mlp_in)], settings(drop_bos=True), seq_len=16)
    replay = Counting(16, padded=True, bos=True)
    n_kept, n_masked = 0, 0
    while n_kept < 100:
        batch = replay.next_batch(source.cfg.batch_seqs)
        keep = kept(batch, source.cfg)
        n_kept, n_masked = n_kept + int(keep.sum()), n_masked + int((~keep).sum())
    assert measure(source, 100).count == n_kept and n_masked > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_at_their_own_scale_measure_it_over_a_million_tokens(name: str) -> None:
    cfg = compose(name)
    if cfg.training.n_tokens >= 1_000_000:
        assert cfg.activations.normalisation_tokens >= 1_000_000


def test_means_are_those_of_the_rows_that_count() -> None:
    source = Harvester(
        llama(), Counting(16, padded=True, bos=True), [Site(1, Point.mlp_out)], settings(drop_bos=True), seq_len=16
    )
    replay = Counting(16, padded=True, bos=True).next_batch(2)
    (site,) = source.layout.sites
    exact = llama().record(replay.tokens, [site])[site][kept(replay, source.cfg)].double().mean(0)
    assert torch.allclose(site_means(measure(source, 1), source.layout)[site].double(), exact, atol=1e-7)


def llama() -> LlamaSimpleMLPTarget:
    config = LlamaSimpleMLPConfig(n_layers=3, d_model=24, d_mlp=40, n_heads=2, n_kv_heads=1, n_ctx=32, n_vocab=N_VOCAB)
    return LlamaSimpleMLPTarget("llama", LlamaSimpleMLP(config, torch.Generator().manual_seed(0)), Vocabulary())


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(N_VOCAB)}


SITES = [Site(2, Point.mlp_out), Site(0, Point.mlp_in), Site(0, Point.mlp_hidden), Site(1, Point.z, head=1)]


def source_of(dtype: DType = DType.float32, seq_len: int = 16) -> Harvester:
    return Harvester(
        llama(),
        Counting(seq_len, padded=True, bos=True),
        SITES,
        settings(drop_bos=True, dtype=dtype, buffer_tokens=200),
        seq_len=seq_len,
    )


def test_rows_of_a_real_model_are_its_recorded_activations() -> None:
    source, batch = source_of(), Counting(16, padded=True, bos=True).next_batch(2)
    rows, keep = source.next_rows(), kept(batch, source.cfg)
    assert source.layout.widths == (12, 24, 40, 24), "z of a head, mlp_in, mlp_hidden, mlp_out"
    for site, span in source.layout.spans.items():
        assert torch.equal(rows[:, span], llama().record(batch.tokens, [site])[site][keep])


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16])
def test_a_live_stream_and_a_store_serve_the_same_rows(tmp_path: Path, dtype: DType) -> None:
    n_rows = 14 * 20  # what 10 forward passes keep: 15 + 14, 13 + 15, 14 + 13, ...
    source = source_of(dtype)
    target = TargetConfig(kind=TargetKind.llama_simple_mlp, path="llama")
    tokens = TokensConfig(kind=TokensKind.files, path="counting", seq_len=16)
    named = row_settings(target, None, tokens, source.cfg, source.target.tokenizer)
    write_store(source, tmp_path, named, n_rows=n_rows, seed=0, shard_rows=256)
    store = open_store(tmp_path, SITES, named)
    store.check_target(llama())
    live: RowStream = ShuffleBuffer(source_of(dtype), 200, 20, seed=0)
    read: RowStream = StoreStream(store, 20, 0, 256, CPU)
    assert live.layout == read.layout
    stored = store.rows(0, n_rows).float()
    served = torch.cat([live.next_batch() for _ in range(150)])
    key = lambda rows: {tuple(row) for row in rows.tolist()}  # noqa: E731
    assert key(stored) == key(torch.cat([read.next_batch() for _ in range(n_rows // 20)]))
    assert key(stored) <= key(served), "a row of the store was never served live"


def test_the_buffer_serves_batches_of_a_real_model_without_gradients() -> None:
    batch = ShuffleBuffer(source_of(), 200, 50, 0).next_batch()
    assert batch.shape == (50, 100) and not batch.requires_grad and not batch.is_inference()
    weight = torch.randn(100, 3, requires_grad=True)
    (batch @ weight).sum().backward()  # rows of inference mode could not be saved for backward
