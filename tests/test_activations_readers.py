"""Rows harvested once for many readers, ahead of who uses them, or shared by trainings: each is given what it would read alone."""

import threading
from typing import Any

import pytest
import torch
from activation_parts import D_MODEL, READ, WRITE, Counting, harvester, ids, settings

from nndecomp.activations.ahead import Ahead, can_run_ahead
from nndecomp.activations.buffer import RowSource, ShuffleBuffer
from nndecomp.activations.first_rows import FirstRows
from nndecomp.activations.harvest import Harvester
from nndecomp.activations.shared import SharedStream
from nndecomp.activations.stream import RowStream
from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.types import Point, Site

PASS_BYTES = 16 * 2 * D_MODEL * 4  # two sequences of 8 tokens, at two sites, in fp32


def first_rows(n_passes: int) -> FirstRows:
    return FirstRows(lambda sites: harvester(sites=sites), [READ, WRITE], n_passes * PASS_BYTES)


@pytest.mark.parametrize("n_kept", [0, 1, 3, 10])
@pytest.mark.parametrize("sites", [(READ,), (WRITE,), (READ, WRITE)])
def test_every_reader_of_the_first_rows_is_given_what_a_harvester_of_its_sites_gives(n_kept: int, sites: Any):
    first = first_rows(n_kept)
    for reader in (first.reader(sites), first.reader(sites)):
        alone = harvester(sites=sites)
        assert isinstance(reader, RowSource) and reader.layout == alone.layout
        for _ in range(5):
            assert reader.state_dict() == alone.state_dict()
            assert torch.equal(reader.next_rows(), alone.next_rows())


def test_the_first_rows_are_harvested_once():
    first = first_rows(3)
    for _ in range(2):
        reader = first.reader([WRITE])
        for _ in range(3):
            reader.next_rows()
    assert first.harvester.tokens.state_dict() == {"n_read": 6}, "three passes of two sequences, for six that were read"


def test_a_reader_goes_on_from_the_state_of_another():
    one, other = first_rows(3).reader([WRITE]), first_rows(3).reader([WRITE])
    for _ in range(2):
        one.next_rows()
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert torch.equal(one.next_rows(), other.next_rows())


def test_rows_made_ahead_are_those_made_in_line_and_its_state_leaves_out_what_is_under_way():
    ahead, line = Ahead(harvester()), harvester()
    for _ in range(4):
        assert ahead.state_dict() == line.state_dict()
        assert torch.equal(ahead.next_rows(), line.next_rows())
    again = Ahead(harvester())
    again.next_rows()  # one more is under way, and is dropped
    again.load_state_dict(ahead.state_dict())
    for _ in range(3):
        assert torch.equal(again.next_rows(), ahead.next_rows())


def test_the_next_rows_are_made_while_the_last_ones_are_used():
    class Watched:
        """Says when a pass begins."""

        def __init__(self) -> None:
            self.source, self.begun, self.threads = harvester(), threading.Semaphore(0), []
            self.layout, self.dtype, self.device = self.source.layout, self.source.dtype, self.source.device
            self.rows_at_most, self.state_dict = self.source.rows_at_most, self.source.state_dict
            self.load_state_dict = self.source.load_state_dict

        def next_rows(self) -> torch.Tensor:
            self.threads.append((threading.current_thread().name, torch.get_num_threads()))
            self.begun.release()
            return self.source.next_rows()

    watched = Watched()
    ahead = Ahead(watched)
    assert ids(ahead.next_rows()) == list(range(16))
    assert watched.begun.acquire(timeout=60) and watched.begun.acquire(timeout=60), "the second pass was never begun"
    ((name, n_threads), _) = watched.threads
    assert name != threading.current_thread().name and n_threads == torch.get_num_threads()


def test_a_pass_that_fails_ahead_fails_where_its_rows_are_asked_for():
    class Ends(Counting):
        def next_batch(self, batch_seqs: int) -> Any:
            assert self.n_read < 4, "the text ended"
            return super().next_batch(batch_seqs)

    ahead = Ahead(harvester(Ends()))
    ahead.next_rows(), ahead.next_rows()
    with pytest.raises(AssertionError, match="the text ended"):
        ahead.next_rows()


def test_on_a_cpu_nothing_runs_ahead_unless_as_many_cores_are_free_as_training_uses(monkeypatch: pytest.MonkeyPatch):
    cpu, n_threads = torch.device("cpu"), torch.get_num_threads()
    for n_cores, fits in ((n_threads, False), (2 * n_threads - 1, n_threads == 0), (2 * n_threads, True)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=n_cores: set(range(n)))
        assert can_run_ahead(cpu) is fits, f"{n_cores} cores, {n_threads} threads"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_rows_made_ahead_are_those_made_in_line():
    tokens, site = TargetConfig(kind=TargetKind.llama_simple_mlp, path="tiny"), Site(1, Point.mlp_in)
    target = load_target(tokens, torch.device("cuda"))

    def harvested(of: Target) -> Harvester:
        return Harvester(of, Counting(), [site], settings(), seq_len=8)

    line, ahead = harvested(target), Ahead(harvested(target.twin()))
    for _ in range(20):
        rows = ahead.next_rows()
        torch.randn(2048, 2048, device="cuda").matmul(torch.randn(2048, 2048, device="cuda"))
        assert torch.equal(rows, line.next_rows())


def buffer(sites: Any, capacity: int = 100) -> ShuffleBuffer:
    return ShuffleBuffer(harvester(sites=sites), capacity, 20, seed=3)


def test_trainings_that_share_a_stream_read_and_save_what_each_would_read_and_save_alone():
    shared = SharedStream(buffer([READ, WRITE]))
    views = {sites: shared.view(sites) for sites in ((READ,), (WRITE,), (READ, WRITE))}
    alone = {sites: buffer(sites) for sites in views}
    for _ in range(12):
        for sites, view in views.items():
            assert isinstance(view, RowStream) and view.layout == alone[sites].layout
            assert torch.equal(view.next_batch(), alone[sites].next_batch())
            ours, theirs = view.state_dict(), alone[sites].state_dict()
            assert ours.keys() == theirs.keys() and torch.equal(ours["rows"], theirs["rows"])
            assert ours["source"] == theirs["source"] and torch.equal(ours["order"], theirs["order"])
    assert shared.n_made == 12


def test_a_shared_stream_goes_on_from_what_its_trainings_saved_apart():
    alone = {sites: buffer(sites) for sites in ((READ,), (WRITE,))}
    for _ in range(7):
        for stream in alone.values():
            stream.next_batch()
    shared = SharedStream(buffer([READ, WRITE]))
    views = {sites: shared.view(sites) for sites in alone}
    for sites, view in views.items():
        view.load_state_dict(alone[sites].state_dict())
    for _ in range(7):
        for sites, view in views.items():
            assert torch.equal(view.next_batch(), alone[sites].next_batch())


def test_a_training_that_falls_behind_a_shared_stream_is_told():
    shared = SharedStream(buffer([READ]))
    fast, slow = shared.view([READ]), shared.view([READ])
    slow.next_batch()
    fast.next_batch(), fast.next_batch(), fast.next_batch()
    with pytest.raises(AssertionError, match="batch 1 of 3 is gone"):
        slow.next_batch()


def test_a_twin_shares_weights_and_no_hooks():
    target = load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path="tiny"), torch.device("cpu"))
    twin, site = target.twin(), Site(1, Point.mlp_in)
    theirs = {id(p): p for p in twin.module().parameters()}
    assert all(id(p) in theirs for p in target.module().parameters()), "weights are in memory once"
    tokens = torch.arange(24).view(2, 12)
    clean = target.record(tokens, [site])[site]
    with target.patch({site: torch.zeros_like}):
        assert torch.equal(twin.record(tokens, [site])[site], clean), "a patch of one is not in the other"
        assert not target.record(tokens, [site])[site].any()
