"""The measures and the verdict of an evaluation, against values computed by hand."""

import math

import numpy as np
import pytest

from dpokit.evaluate.measures import (
    Scores,
    compare_models,
    count_prompts,
    decide_verdict,
    describe_groups,
    name_bands,
    name_gap,
    summarize_scores,
)

SCORES = Scores(
    tuned=np.array([[-10.0, -20.0, -30.0], [-12.0, -15.0, -40.0]]),
    base=np.array([[-11.0, -18.0, -30.0], [-11.0, -15.0, -30.0]]),
    tokens=np.array([[5, 10, 10], [4, 5, 20]]),
)
PROMPTS = [b"a", b"b", b"c"]


def test_dpo_measures_follow_their_definition():
    measured = compare_models(SCORES, beta=0.5)
    assert measured["rewards/chosen"].tolist() == [0.5, -1.0, 0.0]
    assert measured["rewards/rejected"].tolist() == [-0.5, 0.0, -5.0]
    assert measured["margin"].tolist() == [1.0, -1.0, 5.0]
    assert measured["accuracy"].tolist() == [True, False, True]
    assert measured["loss"].tolist() == pytest.approx([math.log(1 + math.exp(-m)) for m in (1.0, -1.0, 5.0)])


def test_models_rank_by_their_log_probs_in_total_and_per_token():
    measured = summarize_scores(SCORES, None, PROMPTS, beta=0.5)
    assert measured["tuned"]["ranking_accuracy"]["value"] == pytest.approx(2 / 3)
    assert measured["tuned"]["ranking_accuracy_per_token"]["value"] == pytest.approx(2 / 3)  # -2 > -3, -2 > -3, -3 < -2
    assert measured["base"]["ranking_accuracy"]["value"] == 0.0  # equal is not above
    assert measured["base"]["ranking_accuracy_per_token"]["value"] == pytest.approx(2 / 3)
    assert measured["base"]["loss"]["value"] == math.log(2)
    assert measured["tuned"]["logps/chosen"]["value"] == -20.0
    assert measured["always_longer"]["value"] == pytest.approx(2 / 3)
    assert measured["difference"]["logps/chosen"]["value"] == pytest.approx(-20 + 59 / 3)


def test_a_model_alone_has_its_own_numbers():
    measured = summarize_scores(Scores(SCORES.tuned, None, SCORES.tokens), None, PROMPTS, beta=0.5)
    assert set(measured) == {"tuned", "difference", "always_longer"}
    assert measured["difference"] == {}


@pytest.mark.parametrize(("pairs", "has_interval"), [(9, False), (10, True)])
def test_drift_of_few_pairs_has_no_interval(pairs, has_interval):
    log_probs = np.zeros((2, 20))
    drift = np.where(np.arange(20) < pairs, np.arange(20) / 100, np.nan)
    scores = Scores(log_probs, log_probs, np.ones((2, 20)))
    measured = summarize_scores(scores, drift, [bytes([at]) for at in range(20)], beta=1.0)["tuned"]["kl_per_token"]
    assert measured["pairs"] == pairs
    assert measured["value"] == pytest.approx((pairs - 1) / 200)
    assert ("low" in measured and "high" in measured) is has_interval


def test_equal_lengths_count_half_for_always_longer():
    scores = Scores(np.array([[0.0, 0.0], [1.0, 1.0]]), None, np.array([[3, 7], [3, 5]]))
    assert summarize_scores(scores, None, PROMPTS[:2], beta=1.0)["always_longer"]["value"] == 0.75


def test_few_pairs_have_intervals_of_shares_alone():
    """3 prompts: a share has a wide interval, a mean none; the loss of the base is ln 2 exactly."""
    measured = summarize_scores(SCORES, None, PROMPTS, beta=0.5)
    assert measured["base"]["ranking_accuracy"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.5615, abs=1e-4)}
    assert measured["difference"]["ranking_accuracy"]["high"] == 1.0
    assert measured["base"]["loss"] == {"value": math.log(2)}
    assert set(measured["tuned"]["margin"]) == {"value"}
    (group, _) = describe_groups(compare_models(SCORES, beta=0.5), {"source": ["x", "y", "x"]}, PROMPTS)["source"]
    assert (group["accuracy"]["low"], group["accuracy"]["high"]) == pytest.approx((0.342, 1.0), abs=1e-3)


def test_groups_hold_their_pairs_and_a_single_group_is_omitted():
    columns = compare_models(SCORES, beta=0.5)
    kinds = {"source": ["x", "y", "x"], "turns": ["1", "1", "1"]}
    measured = describe_groups(columns, kinds, PROMPTS)
    assert list(measured) == ["source"]
    assert [(group["name"], group["pairs"], group["accuracy"]["value"]) for group in measured["source"]] == [
        ("x", 2, 1.0),
        ("y", 1, 0.0),
    ]


def test_bands_and_gaps_are_named_by_their_lengths():
    assert name_bands([1, 2, 3, 4, 5, 6, 7, 8]) == ["1 to 1"] + ["2 to 3"] * 2 + ["4 to 5"] * 2 + ["6 to 8"] * 3
    assert name_bands([5, 5, 5]) == ["5 to 5"] * 3
    gaps = [name_gap(126, 100), name_gap(125, 100), name_gap(100, 126)]
    assert gaps == ["chosen longer by a quarter", "about as long", "chosen shorter by a fifth"]


def value(middle: float, width: float = 0.01) -> dict:
    return {"value": middle, "low": middle - width, "high": middle + width}


@pytest.mark.parametrize(
    ("loss", "accuracy", "change", "better", "text"),
    [
        (0.60, 0.70, 0.0, True, "Better than its base: DPO loss 0.600 (0.590 to 0.610)"),
        (1.57, 0.64, 0.0, False, "Worse than its base by the DPO loss"),
        (0.69, 0.70, 0.0, None, "No difference to its base is shown"),
        (0.60, 0.505, 0.0, None, "No difference to its base is shown"),
        (0.69, 0.40, 0.0, False, "Worse than its base"),
        (0.60, 0.70, -2.0, True, "lost 2.00 nats a token"),
    ],
)
def test_the_verdict_follows_from_the_intervals(loss, accuracy, change, better, text):
    record = {
        "data": {"pairs": 300, **count_prompts(range(300))},
        "tuned": {"loss": value(loss), "accuracy": value(accuracy)},
        "difference": {"logps_per_token/chosen": value(change)},
    }
    verdict = decide_verdict(record)
    assert verdict["better"] is better
    assert text in verdict["text"]


def decide_for(margins: list[float], prompts: list[bytes]) -> dict:
    """Returns the verdict on a tuned model with these reward margins; its chosen log-probs fall by 2 nats."""
    number = len(margins)
    tuned, base = np.array([[-2.0] * number, [-2.0 - margin for margin in margins]]), np.zeros((2, number))
    measured = summarize_scores(Scores(tuned, base, np.ones((2, number))), None, prompts, beta=1.0)
    return decide_verdict(measured | {"data": {"pairs": number, **count_prompts(prompts)}})


def test_one_pair_shows_no_difference():
    verdict = decide_for([1.0], [b"a"])
    assert verdict["better"] is None
    assert verdict["text"].endswith("is shown: 1 held-out prompt is too few for a verdict, which needs 10.")


@pytest.mark.parametrize(("prompts", "better"), [(9, None), (10, True)])
def test_a_verdict_needs_ten_prompts(prompts, better):
    margins = [1.0 + at % 10 / 10 for at in range(30)]
    assert decide_for(margins, [bytes([at % prompts]) for at in range(30)])["better"] is better


def test_a_verdict_needs_effectively_ten_prompts():
    """One prompt has nearly all pairs, whose margins are alike: without this rule, most verdicts would be wrong."""
    generator, sizes = np.random.default_rng(3), [300] + [1] * 9
    prompts = [bytes([number]) for number, size in enumerate(sizes) for _ in range(size)]
    for _ in range(10):
        margins = np.repeat(generator.normal(size=10), sizes) + 0.3 * generator.normal(size=309)
        verdict = decide_for(margins.tolist(), prompts)
        assert verdict["better"] is None
        assert "10 held-out prompts are, because of their unequal numbers of pairs, effectively 1.1:" in verdict["text"]


@pytest.mark.parametrize(("better", "expected"), [(0, None), (40, True), (-40, False)])
def test_a_tie_counts_half(better, expected):
    margins = [math.copysign(1.0 + at / 50, better) for at in range(abs(better))]
    verdict = decide_for(margins + [0.0] * (100 - abs(better)), [bytes([at]) for at in range(100)])
    assert verdict["better"] is expected
    assert f"{50 + better // 2}.0%" in verdict["text"] or not better


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_as_that(odd):
    margins = [odd] * 20 if math.isnan(odd) else [-odd, *range(19)]
    verdict = decide_for(margins, [bytes([at]) for at in range(20)])
    assert verdict == {
        "better": None,
        "text": "No difference to its base is shown: the loss of the 20 held-out pairs is not a finite number.",
    }


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_equal_losses_show_no_difference(margin):
    verdict = decide_for([margin] * 20, [bytes([at]) for at in range(20)])
    assert verdict["better"] is None
    assert verdict["text"].endswith("is shown: all 20 held-out pairs have the same loss, so it has no interval.")
