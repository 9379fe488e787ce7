"""The base's log-probs are kept: computed once for the evaluations and runs that share base and pairs."""

import pytest
from test_pairs import NOTHING, make_run

from dpokit.evaluate import log_probs
from dpokit.evaluate.command import run_evaluation
from dpokit.model.reference import ReferenceCache


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """The number of pairs of each scoring of the base."""
    numbers = []
    score_all = log_probs.score_all

    def count(scorer, rows, name):
        numbers.append(len(rows))
        return score_all(scorer, rows, name)

    monkeypatch.setattr(log_probs, "score_all", count)
    return numbers


def read_values(record, side: str) -> dict[str, float]:
    return {name: metric["value"] for name, metric in record[side].items() if isinstance(metric, dict)}


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_a_second_evaluation_reads_the_bases_log_probs(changes, scored, tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, **changes)
    first, second = (run_evaluation(str(run.path), **NOTHING, limit=None, argv=[]) for _ in range(2))
    assert scored == [first["data"]["pairs"]]
    assert second == first | {"made": second["made"]}
    for limit in (3, 1):  # other pairs
        run_evaluation(str(run.path), **NOTHING, limit=limit, argv=[])
    assert scored[1:] == [3, 1]


def test_an_evaluation_reads_the_log_probs_that_its_run_kept(scored, tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, precompute_ref_log_probs=True, bf16=False)
    kept = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    assert scored == []
    log_probs.find_cache_folder().rename(tmp_path / "elsewhere")
    computed = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    assert scored == [kept["data"]["pairs"]]
    for side in ("base", "tuned"):
        assert read_values(kept, side) == pytest.approx(read_values(computed, side), rel=1e-5, abs=1e-6)


def test_kept_log_probs_of_other_weights_are_computed_again(scored, tiny_gpt2, tmp_path, monkeypatch, capfd):
    run = make_run(tmp_path, tiny_gpt2)
    first = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    read = ReferenceCache.read

    def read_others(self, part):
        scores = read(self, part)
        scores.log_probs[:] -= 0.5
        return scores

    monkeypatch.setattr(ReferenceCache, "read", read_others)
    again = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    assert again == first | {"made": again["made"]}
    assert len(scored) == 2
    assert "the cache is of other weights" in capfd.readouterr().err
