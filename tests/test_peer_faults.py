"""What is known to be wrong in other libraries is not wrong here: one test a fault that can occur.

Each docstring names the fault. Faults that a law elsewhere in these tests rules out already are in `COVERED`, with that
law. Names: DL = dictionary_learning (the branches of saprmarks and jkminder), DFC = dfc_learning, LMS = Language-Model-SAEs,
CLT = crosslayer-transcoder, clt-training and crosslayer-coding, SL = SAELens, SB = SAEBench, SP = sparsify.
"""

import ast
import copy
from pathlib import Path

import pytest
import torch
import yaml
from decomposition_parts import (
    ACTIVATIONS,
    ARCHITECTURES,
    GLU,
    PURSUIT,
    D,
    F,
    config,
    dictionary,
    inputs,
    objective,
    planted,
    train,
)
from training_parts import QUIET, Regression, Rows, training

from nndecomp.activations.buffer import check_capacity
from nndecomp.activations.statistics import RunningStatistics
from nndecomp.config.compose import compose
from nndecomp.config.registry import CONF
from nndecomp.config.schema import (
    Activation,
    ActivationsKind,
    CodeNormalisation,
    Penalty,
    TrainingConfig,
)
from nndecomp.decompositions import losses
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.errors import SettingError
from nndecomp.training import loop
from nndecomp.training.log import Log
from nndecomp.training.loop import Trainee
from nndecomp.training.state import saved_steps

TESTS = Path(__file__).parent
SAE, CROSSCODER = ARCHITECTURES["sae"], ARCHITECTURES["crosscoder"]

# The fault -> the law that rules it out.
COVERED = {
    # --- dead features ---
    "DL: aux-k through codes that are 0, so that dead encoders get no gradient; SP: aux-k never reaches the encoder": (
        "test_decompositions_objective.py::test_aux_k_reaches_dead_encoders_and_no_living_feature"
    ),
    "DL, CLT, LMS: aux-k of a residual that is not detached, decoded with the bias, or not divided by its variance": (
        "test_dead_features.py::test_aux_k_is_its_formula"
    ),
    "DL: aux-k is 0 / 0 where nothing is left over": (
        "test_dead_features.py::test_aux_k_of_a_perfect_reconstruction_is_0_and_finite"
    ),
    "CLT: features are dead after batches, not tokens": (
        "test_decompositions_objective.py::test_liveness_counts_tokens_since_each_feature_fired"
    ),
    "DL: resampling of an annealed p writes to a copy, and changes nothing": (
        "test_dead_features.py::test_resampling_changes_all_dead_rows_and_no_other"
    ),
    "DL: new encoder rows are as long as their input": (
        "test_dead_features.py::test_a_resampled_feature_points_at_a_badly_reconstructed_input"
    ),
    "DL: inputs are drawn by their error and not its square": (
        "test_dead_features.py::test_tokens_are_drawn_by_the_square_of_their_squared_error"
    ),
    "DL: moments are reset by a parameter's number, which is another parameter's elsewhere": (
        "test_dead_features.py::test_the_optimiser_forgets_rows_that_were_written_anew"
    ),
    "DFC: dead features of one model learn from the residual of the other": (
        "test_dead_features.py::test_dead_features_explain_what_is_left_where_their_group_writes_and_nothing_else"
    ),
    # --- thresholds and selection ---
    "DL: a threshold that was never learned turns batchtopk into relu": (
        "test_decompositions_activation.py::test_evaluating_before_a_threshold_is_known_is_an_error"
    ),
    "DL: one row without positive codes makes the threshold infinite for ever": (
        "test_decompositions_activation.py::test_a_batch_without_positive_values_leaves_the_threshold_alone"
    ),
    "CLT, SL: the average of thresholds starts at 0, which biases it low": (
        "test_decompositions_activation.py::test_the_inference_threshold_starts_at_the_first_smallest_value_and_moves_from_there"
    ),
    "DL: validation feeds the threshold its own survivors; liveness is counted while logging": (
        "test_decompositions_contract.py::test_evaluation_changes_no_state"
    ),
    "DL, SL: what batchtopk keeps in evaluation depends on the batch; BatchTopK at k=100 has L0 106": (
        "test_evaluation_real.py::test_batchtopk_is_measured_the_same_in_batches_of_any_size_and_not_without_a_threshold"
    ),
    "DL: fewer positive entries than k * tokens, or k * tokens above all entries, crash batchtopk": (
        "test_codes.py::test_batchtopk_keeps_only_positive_values_where_there_are_too_few"
    ),
    "DL: k is annealed one step late, and the first step uses the last k": (
        "test_decompositions_objective.py::test_k_moves_in_a_straight_line_from_k_start_to_k_and_stays"
    ),
    "DL: a threshold in units of z c is compared with z": (
        "test_decompositions_activation.py::test_thresholds_are_in_units_of_codes_times_c"
    ),
    "SL (565): free decoder norms distort which features are among the k largest": (
        "test_decompositions_activation.py::test_selection_sees_pre_activations_times_c_and_codes_are_not_scaled"
    ),
    "DL: reported codes of gated and decoupled dictionaries are multiplied by c twice": (
        "test_decompositions_activation.py::test_reported_codes_are_multiplied_by_c_once"
    ),
    "DL: the gate and the magnitudes of a gated dictionary see another input": (
        "test_decompositions_activation.py::test_a_gate_decides_and_a_second_branch_says_how_much"
    ),
    "DL, SL (570): of [batch, pos, d] batchtopk keeps k * batch": (
        "test_decompositions_activation.py::test_sequences_that_were_not_flattened_are_refused"
    ),
    "SL: what is exported as JumpReLU is active elsewhere than what was trained": (
        "test_conversion.py::test_batchtopk_becomes_jumprelu_exactly_folded_or_not"
    ),
    # --- JumpReLU ---
    "DL: theta becomes negative, and training and inference disagree on the sign": (
        "test_decompositions_activation.py::test_jumprelu_thresholds_never_become_negative"
    ),
    "SL, DL: theta in bf16 never moves": (
        "test_decompositions_activation.py::test_thresholds_stay_in_fp32_whatever_the_module_is_cast_to"
    ),
    "CLT: gradient reaches pre-activations below the threshold": (
        "test_decompositions_activation.py::test_what_reaches_pre_activations_is_what_the_gradient_is_named_after"
    ),
    # --- dedicated features ---
    "DFC: exclusive features are starved where training starts": (
        "test_dedicated_features.py::test_exclusive_features_fire_as_often_as_shared_ones_where_training_starts"
    ),
    "DFC: the initial decoder norm is lost": (
        "test_dedicated_features.py::test_features_of_all_groups_start_with_the_same_decoder_norm"
    ),
    "DFC: resampling, copies and optimisers write to forbidden weights": (
        "test_dedicated_features.py::test_weights_in_the_other_model_do_not_exist_whatever_writes_to_weights"
    ),
    "DFC: a state of another partition loads": (
        "test_dedicated_features.py::test_sizes_are_whole_numbers_and_other_sizes_do_not_load"
    ),
    "DFC: a loaded dictionary selects by another code normalisation": (
        "test_dedicated_features.py::test_settings_of_the_reference_come_back_from_disk"
    ),
    "DFC: the auxiliary loss of one model is divided by the variance of both": (
        "test_dedicated_features.py::test_exclusive_features_learn_from_their_own_model_alone_dead_or_alive"
    ),
    "DFC: a second model of another width cannot be had": (
        "test_dedicated_features.py::test_without_shared_features_it_is_two_saes"
    ),
    "DL: decoupled penalties are those of the crosscoder": (
        "test_dedicated_features.py::test_a_penalty_cannot_weigh_one_code_by_each_site_on_its_own"
    ),
    # --- starts ---
    "DL: b_dec starts at the middle of raw rows, where training sees normalised ones": (
        "test_decompositions_objective.py::test_the_decoder_bias_starts_at_the_mean_of_the_first_batch"
    ),
    "DL: the geometric median is 0 / 0 where a point is the guess": (
        "test_start.py::test_a_point_at_the_guess_is_no_division_by_zero"
    ),
    # --- saving ---
    "DL: a run that broke off leaves a file that cannot be loaded, or crashes where rows are not normalised": (
        "test_decompositions_objective.py::test_saved_state_continues_bit_for_bit"
    ),
    "DL, DFC: pushing to the Hub crashes": (
        "test_decompositions_pretrained.py::test_what_is_pushed_to_the_hub_can_be_loaded_from_it"
    ),
    "DL: the norm factor, k after annealing, or the code normalisation is not saved": (
        "test_decompositions_objective.py::test_what_is_saved_is_finished_as_it_was_with_its_own_scales_and_k"
    ),
    "DL: JumpReLU, crosscoders and interrupted runs cannot be loaded; DFC: saving crashes": (
        "test_decompositions_contract.py::test_saving_and_loading_keeps_every_bit"
    ),
    "LMS: folding the scales in changes what JumpReLU, crosscoders and cross-layer top-k compute (B4)": (
        "test_fold.py::test_folding_changes_units_and_nothing_else"
    ),
    "CLT: a standardiser that is not saved: what was trained cannot be run on raw activations": (
        "test_decompositions_contract.py::test_a_finished_dictionary_equals_the_one_in_training_on_raw_rows"
    ),
    "SL, LMS, DL: no bit-exact resume: moments, counters, rows in the buffer or random numbers are lost (B12)": (
        "test_training_dictionaries.py::test_dictionaries_stopped_twice_end_as_if_never_stopped"
    ),
    "SL: a signal to stop neither saves nor ends the run": (
        "test_training_loop.py::test_a_signal_saves_the_run_and_ends_it_with_a_status_of_its_own"
    ),
    # --- schedules and losses ---
    "DL: the first step has a learning rate of 0; LMS: a decay of no steps divides by 0, a cosine ignores its end": (
        "test_training_parts.py::test_the_learning_rate_follows_its_table"
    ),
    "CLT: the penalty is a sum over tokens, so that its coefficient depends on the batch": (
        "test_losses.py::test_penalties_are_sums_over_features_and_means_over_tokens"
    ),
    "CLT: a step whose loss is not finite is skipped in silence": (
        "test_training_loop.py::test_a_number_that_is_not_finite_stops_the_run_by_name_and_is_never_saved"
    ),
    "LMS: metrics of a CLT, and masks with a crosscoder, crash training (B2, B3)": (
        "test_decompositions_contract.py::test_the_loss_halves_in_100_steps_on_planted_data"
    ),
    "LMS: no combination of architecture, activation function and loss is ever trained with masks and metrics on": (
        "test_smoke_matrix.py::test_a_part_of_the_matrix_trains"
    ),
    "LMS: a mixture of transforms is decoded without the input that it transforms (B15)": (
        "test_molt.py::test_reconstruction_needs_the_input_it_transforms"
    ),
    "LMS: parameters that no gradient reaches (B7)": (
        "test_decompositions_contract.py::test_every_parameter_gets_a_gradient"
    ),
    "LMS: a sparse decode that takes its matrix transposed (B19)": (
        "test_codes.py::test_decoding_and_its_gradients_equal_the_dense_product"
    ),
    "LMS: the frequency penalty crashes; CLT's averages one feature's frequency over layers (B1)": (
        "test_losses.py::test_the_frequency_penalty_is_of_each_feature_and_not_of_tokens"
    ),
    "LMS: the pre-activation loss compares theta with z where theta is a threshold of z c": (
        "test_losses.py::test_thresholds_are_compared_in_the_units_they_have"
    ),
    "DL: the last p is never reached": (
        "test_losses.py::test_p_falls_in_equal_steps_and_the_last_is_reached_before_the_end"
    ),
    "DL: matryoshka divides by the number of prefixes twice": "test_matryoshka.py::test_the_loss_is_the_weighted_sum_over_prefixes",
    "SP: its kl is the cross-entropy under the clean prediction, without that prediction's entropy": (
        "test_training_end_to_end.py::test_the_divergence_is_not_the_cross_entropy_under_the_clean_prediction"
    ),
    # --- rows ---
    "DL: half of the last buffer is never served; CLT: workers overlap": (
        "test_activations_stream.py::test_every_row_is_served_exactly_once"
    ),
    "DL: the input of a module is asked for and its output given": (
        "test_activations_statistics.py::test_rows_of_a_real_model_are_its_recorded_activations"
    ),
    "DL: shuffling each site by itself takes apart rows of one token": (
        "test_activations_statistics.py::test_a_live_stream_and_a_store_serve_the_same_rows"
    ),
    "DL: a write that fails is lost, and the writer waits for ever": (
        "test_store.py::test_killed_at_any_moment_writing_goes_on_to_the_same_bytes"
    ),
    "DL: at the end of the data an iterator ends in the middle of a step": (
        "test_store.py::test_an_epoch_serves_every_row_once_and_the_next_in_another_order"
    ),
    "DL: a store knows no model, text or site": "test_store.py::test_a_store_of_other_rows_is_refused_by_the_setting_that_differs",
    "LMS: the scale is measured with BOS and padding among the rows": (
        "test_activations_statistics.py::test_means_are_those_of_the_rows_that_count"
    ),
    "DL, SL: the model runs on after the last site that is read": (
        "test_targets_hooks.py::test_recording_stops_after_the_last_site_and_gives_the_same_activations"
    ),
    # --- evaluation ---
    "SL: a transcoder is scored as an SAE of its input; SL: W_skip is dropped": (
        "test_evaluation_real.py::test_a_perfect_transcoder_costs_nothing_in_every_mode_with_and_without_skip"
    ),
    "SB, SL: explained variance depends on the scale, and a constant scores 0.83": (
        "test_evaluation_numbers.py::test_fvu_is_one_for_the_mean_zero_for_perfection_and_blind_to_scale"
    ),
    "DL: explained variance does not see a constant offset, and averages ratios of batches": (
        "test_evaluation_numbers.py::test_fvu_sees_a_constant_offset_and_pooled_sums_do_not_depend_on_the_batching"
    ),
    "DL: the share of features alive is 1 / F whatever they do": "test_evaluation_numbers.py::test_density_summary_by_hand",
    "LMS: loss recovered is inverted (B9); CLT: the KL is reversed": (
        "test_evaluation.py::test_ce_and_kl_are_those_of_a_slow_loop"
    ),
    "DL: positions that training left out are replaced in evaluation": (
        "test_evaluation.py::test_positions_that_do_not_count_keep_their_value"
    ),
    "CLT: evaluation on rows of training": "test_tokens.py::test_training_and_heldout_documents_are_disjoint_and_together_all",
    # --- settings ---
    "LMS: the command line cannot read its own settings (B10)": "test_conf.py::test_every_option_of_every_group_composes",
    "LMS: a file name is joined twice, and a local path taken for another (B14)": (
        "test_decompositions_pretrained.py::test_a_path_that_is_not_there_is_not_taken_for_a_hub_id"
    ),
}


@pytest.mark.parametrize("law", COVERED.values(), ids=[law.split("::")[1] for law in COVERED.values()])
def test_the_law_that_rules_a_fault_out_exists(law: str):
    file, name = law.split("::")
    functions = [node for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in {function.name for function in functions}, f"{file} has no {name}"


# --- statistics and starts ---


def test_statistics_of_bf16_rows_do_not_saturate():
    """DL: Welford sums kept in the cache's dtype saturate in bf16: after 2M rows a true std of 3.0 reads 1.43."""
    draw = torch.Generator().manual_seed(0)
    statistics = RunningStatistics(1)
    for _ in range(40):
        statistics.update((3 * torch.randn(50_000, 1, generator=draw)).bfloat16())
    assert statistics.count == 2_000_000
    assert float(statistics.variance.sqrt()) == pytest.approx(3.0, rel=2e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_seed_alone_decides_where_a_dictionary_starts(activation):
    """DL: the seed of JumpReLU is stored and never used; BatchTopK reseeds the global generator."""
    torch.manual_seed(1)
    first = dictionary(seed=3, **SAE | ACTIVATIONS[activation]).state_dict()
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    again = dictionary(seed=3, **SAE | ACTIVATIONS[activation]).state_dict()
    assert torch.equal(torch.rand(1), expected)
    other = dictionary(seed=4, **SAE | ACTIVATIONS[activation]).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items() if tensor.isfinite().all())
    assert not torch.equal(first["groups.0.encoder.W_enc"], other["groups.0.encoder.W_enc"])


@pytest.mark.parametrize("encoder", [{}, GLU], ids=["linear", "glu"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_starts_finite_and_encoders_of_all_groups_alike(architecture, encoder):
    """LMS: biases that are never initialised hold what was in memory (B5). DFC: a subclass loses the initial norm."""
    made = dictionary(**ARCHITECTURES[architecture] | encoder)
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    biases = [parameter for name, parameter in made.named_parameters() if name.split(".")[-1].startswith("b_")]
    assert biases and not any(bias.any() for bias in biases), "all biases start at 0, those of a gate too"
    for bank in made.banks:
        torch.testing.assert_close(bank.W_enc.norm(dim=1), torch.ones(bank.n_features))
        if isinstance(bank, TransformGroup):  # its norms are those of products of random matrices
            continue
        assert bank.W_dec.norm(dim=1).std() < 1e-5 < bank.W_dec.norm(dim=1).min(), "decoder rows start with one norm"


# --- JumpReLU ---


def test_the_threshold_of_an_l0_penalty_sees_both_sides_of_the_kernel():
    """DL (issue 55): the step is taken of activations that have jumped, so those just below theta fall out of the window."""
    jump = JumpRelu([1], 0.5, 0.2)
    below_and_above = torch.tensor([[0.45], [0.55]])
    jump.active(below_and_above, 0, None).sum().backward()
    assert jump.threshold[0].grad == pytest.approx(-2 / 0.2), "each of the two counts 1 / bandwidth"


def test_inactive_features_with_a_small_threshold_are_not_pushed_away_from_zero():
    """DL: with theta < bandwidth / 2 every inactive code, being 0, lies in the window: an accidental barrier."""
    jump = JumpRelu([1], 0.04, 0.2)
    jump.active(torch.full((100, 1), -3.0), 0, None).sum().backward()
    assert jump.threshold[0].grad == 0


def test_a_dictionary_with_jumprelu_in_bf16_trains_its_thresholds():
    """SL (issue 728): steps of Adam on a threshold in bf16 round away. Here a threshold of 1 moves by 1e-3."""
    made = objective(
        **SAE | ACTIVATIONS["jumprelu"] | {"jumprelu_threshold": 1.0}, penalty=Penalty.l0, penalty_coefficient=0.1
    )
    with torch.autocast("cpu", torch.bfloat16):
        train(made, 3, lr=1e-3)
    moved = (made.dictionary.activation.threshold[0].detach() - 1.0).abs()
    assert 0 < float(moved.max()) < 4e-3


# --- schedules and settings ---


def test_betas_that_are_whole_numbers_train():
    """DL: Gated passes the int 0 to Adam, which current torch refuses."""
    made = objective(**SAE)
    trainee = Trainee("sae", made, compose("exp_001_train_transcoder_pile", ["training.betas=[0,0.999]"]).training)
    trainee.step(planted(made.layout, 256), 0)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_every_step_of_a_schedule_without_warmup_or_plateau_changes_weights(shares):
    """DL: warmup=0 divides by zero, and the first step has a rate of 0."""
    made = objective(**SAE)
    cfg = TrainingConfig(n_tokens=512, batch_tokens=256, lr=1e-3, lr_warmup=shares[0], lr_decay=shares[1])
    trainee = Trainee("sae", made, cfg)
    for step in range(2):
        before = made.dictionary.banks[0].W_enc.detach().clone()
        trainee.step(planted(made.layout, 256), step)
        assert not torch.equal(made.dictionary.banks[0].W_enc, before)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k_start": 10}, "go together"),
        ({"activation": Activation.relu, "k": None, "k_start": 10, "k_anneal": 0.5}, "no effect"),
        ({"k": 25}, "must lie between 1 and"),
        ({"penalty": Penalty.lp, "penalty_coefficient": 1.0, "p_end": 0.0}, "must be positive"),
        ({"penalty_coefficient": 1.0}, "no effect"),
        ({"penalty": Penalty.tanh}, "must be positive"),
    ],
    ids=["k_start alone", "k without selection", "k above F", "p of 0", "coefficient alone", "no coefficient"],
)
def test_settings_with_which_peers_crash_or_do_something_else_are_refused(settings, sentence):
    """DL: k_max with no annealing trains at k_max for ever; more active features than there are crash; the default p_end=0
    divides by 0. LMS: settings without effect are accepted; a coefficient of null means 1."""
    with pytest.raises(SettingError, match=sentence):
        config(**settings)


class _BreaksOff(Regression):
    """After nine steps."""

    def loss(self, batch, progress):
        if self.n_seen == 9:
            raise InterruptedError
        return super().loss(batch, progress)


def test_checkpoints_come_at_the_steps_that_are_asked_for(tmp_path):
    """LMS: thresholds in tokens are compared with steps, so that a run of 1000 steps is never saved (B11)."""
    with pytest.raises(InterruptedError), Log(tmp_path, QUIET, name="a") as log:
        loop.train(
            {"a": _BreaksOff()}, Rows(), training(1000, checkpoint_every=4), tmp_path, log=log, description="test"
        )
    assert saved_steps(tmp_path / "checkpoint") == [8]


@pytest.mark.parametrize(
    "override", ["activations.buffer_tokens=3e4", "activations.batch_seqs=2.5", "decomposition.k=1.5"]
)
def test_numbers_that_must_be_whole_are_refused_where_they_are_not(override):
    """DL: the default number of contexts is a float, on which the first buffer crashes."""
    with pytest.raises(SettingError, match=override.split("=")[0]):
        compose("exp_002_train_transcoder_ss", [override])


@pytest.mark.parametrize("path", sorted(CONF.glob("exp_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", [None, "tiny", "smoke"])
def test_the_buffer_of_every_experiment_holds_its_batches(path, scale):
    """SL: the default buffer of 2560 tokens is refused by the default batch of 4096."""
    cfg = compose(path.stem, [] if scale is None else [f"+scale={scale}"])
    if cfg.activations.kind is ActivationsKind.live and cfg.pretrain is None:
        rows_at_most = cfg.activations.batch_seqs * cfg.tokens.seq_len
        check_capacity(cfg.activations.buffer_tokens, cfg.training.batch_tokens, rows_at_most)


def test_scales_are_measured_over_at_least_a_million_tokens_by_default():
    """CLT: one batch of 1000 tokens; LMS: 8 batches."""
    live = yaml.safe_load((CONF / "activations" / "live.yaml").read_text())
    assert (
        live.get("normalisation_tokens", compose("exp_001_train_transcoder_pile").activations.normalisation_tokens)
        >= 10**6
    )


def test_libraries_that_break_their_callers_have_an_upper_bound():
    """LMS: transformer-lens without one, whose version 4 removed what was imported (B17)."""
    lines = (TESTS.parent / "pyproject.toml").read_text()
    assert 'transformer_lens = ["transformer-lens>=3.9,<5"]' in lines


# --- several groups, several sites ---


def test_features_that_an_architecture_forbids_stay_absent_through_copies_training_and_saving(tmp_path):
    """DFC: masks are hooks on gradients, which copies lose, and weights that resampling writes. Here they do not exist."""
    made = objective(**ARCHITECTURES["causal_crosscoder"])
    copied = copy.deepcopy(made)
    train(copied, 5)
    finished = copied.finished()
    x = inputs(finished)
    last = finished.write_layout.spans[finished.writes[0]]
    changed = x.clone()
    changed[:, finished.read_layout.spans[finished.reads[-1]]] += 1
    torch.testing.assert_close(finished(changed)[0][:, last], finished(x)[0][:, last])
    assert sum(bank.W_dec.numel() for bank in finished.banks) == F * D * (3 + 2 + 1)


@pytest.mark.parametrize("kind", CodeNormalisation)
def test_code_normalisation_comes_back_from_disk(kind, tmp_path):
    """DFC, DL: `mixed` weights are not saved, and a reloaded dictionary selects by another normalisation."""
    weights = {"mixed_weights": [0.7, 0.3]} if kind is CodeNormalisation.mixed else {}
    settings = CROSSCODER | ACTIVATIONS["topk"] | {"code_normalisation": kind} | weights
    made = dictionary(**settings).eval()
    made.save_pretrained(tmp_path / "made")
    loaded = type(made).from_pretrained(tmp_path / "made")
    assert loaded.spec.activation.code_normalisation is kind
    assert loaded.spec.activation.mixed_weights == tuple(weights.get("mixed_weights", (1.0, 0.1)))
    assert torch.equal(loaded(inputs(made))[0], made(inputs(made))[0])


def exclusive(**settings):
    return ARCHITECTURES["dedicated_feature_crosscoder"] | ACTIVATIONS["batchtopk"] | settings


def test_no_group_of_a_dedicated_feature_crosscoder_is_starved_where_it_starts():
    """DFC: an exclusive feature sums one model instead of two and has half the code norm, so that none ever fires."""
    made = dictionary(**exclusive()).train()
    codes = made.encode(inputs(made, 4000))
    shares = [float(group.counts().float().mean()) for group in codes]
    assert shares == pytest.approx([3.0, 3.0, 3.0])
    fired = [float((group.firings() > 0).float().mean()) for group in codes]
    assert min(fired) > 0.9, f"shares of features that ever fire: {fired}"


def test_exclusive_features_never_see_or_write_the_other_model(tmp_path):
    """DFC: loading another partition masks the wrong columns, deepcopy loses the masks, and saving crashes."""
    made = objective(**exclusive())
    copied = copy.deepcopy(made)
    train(copied, 5)
    copied.finished().save_pretrained(tmp_path / "made")
    loaded = type(made.dictionary).from_pretrained(tmp_path / "made")
    x = inputs(loaded)
    of_b = slice(loaded.read_layout.spans[loaded.reads[3]].start, None)
    assert [str(site.model) for site in loaded.reads] == ["A", "A", "A", "B", "B"]
    changed = x.clone()
    changed[:, of_b] += 1
    assert torch.equal(loaded.encode(changed)[0].dense(), loaded.encode(x)[0].dense()), "A's features read B"
    assert not torch.equal(loaded.encode(changed)[2].dense(), loaded.encode(x)[2].dense())
    assert [(bank.reads.stop - bank.reads.start, bank.W_dec.shape[1]) for bank in loaded.banks] == [
        (3 * D, 3 * D),
        (3 * D + 2 * 4, 3 * D + 2 * 4),
        (2 * 4, 2 * 4),
    ], "models of different width"


def test_groups_have_the_number_of_features_that_was_asked_for():
    """DFC: sizes are shares of F, rounded down: 57% of 100 are 56."""
    made = dictionary(**exclusive(n_exclusive=[57, 3], n_features=40))
    assert [bank.n_features for bank in made.banks] == [57, 40, 3]


def test_pursuing_a_residual_of_zero_ends_without_nan():
    """DL: grad pursuit divides 0 by 0 once the residual is exactly 0."""
    made = dictionary(**SAE | PURSUIT["matching_pursuit"]).eval()
    with torch.no_grad():
        made.banks[0].W_dec[:D] = torch.eye(D)
    y_hat, codes = made(torch.cat([torch.zeros(1, D), 2 * torch.eye(D)]))
    assert y_hat.isfinite().all() and codes[0].dense().isfinite().all()
    assert int(codes[0].counts()[0]) == 0


def test_decoder_norms_are_per_site_and_not_ones():
    """LMS: decoder norms of a CLT are placeholders of 1. DL: the norm of a crosscoder is that of one layer."""
    made = dictionary(**CROSSCODER)
    bank = made.banks[0]
    with torch.no_grad():
        bank.W_dec.copy_(torch.ones_like(bank.W_dec) * torch.tensor([1.0, 2.0, 2.0]).repeat_interleave(D))
    one = D**0.5
    expected = {"none": 1.0, "sae": 3 * one, "crosscoder": 5 * one, "mixed": (3 + 0.1 * 5) * one}
    for name, value in expected.items():
        c = bank.scale(CodeNormalisation(name), (1.0, 0.1))
        torch.testing.assert_close(c.detach(), torch.full((F,), value))


def test_rows_are_scaled_once():
    """DL: the decoupled crosscoder normalises its input twice."""
    for kind in (CodeNormalisation.none, CodeNormalisation.decoupled):
        settings = CROSSCODER | ACTIVATIONS["topk"] | {"code_normalisation": kind}
        sites = dictionary(**settings).read_layout.sites
        made = objective(scales=dict.fromkeys(sites, 10.0), **settings)
        rows = 10 * inputs(made.dictionary, 50) + 3
        made.eval()
        loss, metrics = made.loss(rows, 1.0)
        y_hat, _ = made.dictionary.eval()(rows / 10)
        torch.testing.assert_close(metrics["fvu"], losses.fvu(rows / 10 - y_hat, rows / 10, made.layout))
