"""Pairs, steps, tokens and longest rows equal those of a run's own preparation and batches."""

import json
from functools import partial

import pytest
from datasets import Dataset
from planning import build_request

from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError
from dpokit.plan.lengths import Data, Length, count_steps, find_rows, find_worst, load_data, sample_data


@pytest.fixture
def settings(tmp_path, pairs_file, tiny_gpt2):
    """The settings of dpo_gpt2 on 40 pairs, 4 of them held out; 2 x 3 pairs per step."""

    def build(*flags: str):
        paths = ["--model_name_or_path", str(tiny_gpt2), "--eval_fraction", "0.1"]
        paths += [] if "--dataset_name" in flags else ["--dataset_name", str(pairs_file)]
        shape = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--max_length", "64"]
        return partial(build_request, tmp_path)("dpo_gpt2", "24", *paths, *shape, *flags).settings

    return build


def test_local_data_is_counted_exactly(settings, plain_tokenizer):
    data = load_data(settings(), plain_tokenizer, max_length=64)
    prepared = prepare_data(settings().data, plain_tokenizer, max_length=64, with_eval=True)
    assert data.exact
    assert (data.train_pairs, len(data.train), len(data.evaluation)) == (36, 36, 4)
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in prepared.train)
    assert count_steps(data, settings("--shared_prefix", "false"), devices=1).tokens_per_epoch == tokens
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in prepared.train)
    assert find_worst(data.train, settings(), pairs=2, max_length=64).row_tokens == longest
    assert len(data.longest[0]["prompt_ids"]) + max(map(len, list(data.longest[0].values())[1:])) == longest


@pytest.mark.parametrize(
    ("devices", "flags", "per_epoch", "total"),
    [
        (1, [], 6, 6),
        (4, [], 2, 2),
        (1, ["--num_train_epochs", "2.5"], 6, 15),
        (1, ["--max_steps", "7"], 6, 7),
        (4, ["--dataloader_drop_last"], 1, 1),
    ],
)
def test_steps_are_those_of_the_run(settings, plain_tokenizer, devices, flags, per_epoch, total):
    data = load_data(settings(), plain_tokenizer, max_length=64)
    steps = count_steps(data, settings(*flags), devices=devices)
    assert (steps.global_batch_pairs, steps.steps_per_epoch, steps.total_steps) == (6 * devices, per_epoch, total)


def test_padding_is_that_of_the_batches_of_the_first_epoch(settings):
    lengths = [Length(10, 5, 5), Length(10, 5, 5), Length(10, 1, 1), Length(10, 1, 1)]
    data = Data(lengths, [], 4, "exact", [])
    padded = ["--shared_prefix", "false", "--per_device_train_batch_size"]
    assert count_steps(data, settings(*padded, "1"), devices=1).padding_share == 0.0
    whole = count_steps(data, settings(*padded, "4"), devices=1)
    assert count_steps(data, settings(), devices=1).padding_share is None
    assert count_steps(data, settings(), devices=1).tokens_per_epoch == 2 * 20 + 2 * 12
    assert whole.padding_share == pytest.approx(1 - (2 * 30 + 2 * 22) / (8 * 15))


def test_a_sample_is_reported_with_an_estimated_count(settings, plain_tokenizer):
    """A local file goes through the code for the Hub, which streams a part of the rows."""
    data = sample_data(settings("--max_train_samples", "12"), plain_tokenizer, max_length=64)
    assert data.how == "estimated from 12 pairs"
    assert len(data.train) == 12
    assert data.train_pairs == round(12 * 0.9)


def test_a_sample_counts_each_pair_of_several_in_a_row(settings, tmp_path, plain_tokenizer):
    rows = [{"prompt": f"Why {n}?", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--ranked", "all", "--max_train_samples", "10"]
    assert sample_data(settings(*flags), plain_tokenizer, max_length=64).train_pairs == round(3 * 10 * 0.9)


def test_the_number_of_rows_comes_from_the_metadata(settings, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Dataset.from_dict({"a": [1] * 50}).to_parquet(folder / "train.parquet")
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: a\n    dtype: int64\n  splits:\n  - name: train\n"
        "    num_bytes: 400\n    num_examples: 50\n---\n"
    )
    assert find_rows(settings("--dataset_name", str(folder))) == 50
    assert find_rows(settings("--dataset_name", str(folder), "--max_train_samples", "20")) == 20


def test_an_unreachable_dataset_is_reported_and_the_plan_goes_on(settings, plain_tokenizer):
    data = load_data(settings("--dataset_name", "no/such-dataset"), plain_tokenizer, max_length=64)
    assert "could not be read" in data.how
    steps = count_steps(data, settings(), devices=8)
    assert (steps.pairs, steps.total_steps, steps.tokens_per_epoch, steps.global_batch_pairs) == (None, None, None, 48)
    shape = find_worst(data.train, settings(), pairs=2, max_length=64)
    assert (shape.pairs, shape.row_tokens) == (2, 64)


def test_broken_local_data_is_an_error(settings, plain_tokenizer, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    with pytest.raises(DataError):
        load_data(settings("--dataset_name", str(broken)), plain_tokenizer, max_length=64)


def test_the_worst_micro_batch_has_the_longest_row_and_answers(settings):
    lengths = [Length(100, 1, 1), Length(1, 50, 60), Length(5, 5, 5)]
    shape = find_worst(lengths, settings("--shared_prefix", "false"), pairs=2, max_length=None)
    assert (shape.pairs, shape.row_tokens, shape.answer_tokens) == (2, 101, 110 + 10)
    assert shape.positions == 2 * 2 * 101
    shape = find_worst(lengths, settings(), pairs=2, max_length=None)
    assert shape.lengths == ((1, 50, 60), (100, 1, 1))
    assert (shape.answer_tokens, shape.positions) == (110 + 2, (1 - 1) + 110 + (100 - 1) + 2)
    assert find_worst(lengths, settings(), pairs=8, max_length=None).pairs == 3
    unscored = [Length(100, 30, 1, unscored=20), Length(1, 50, 60, unscored=100)]  # turns of users, between answers
    assert find_worst(unscored, settings(), pairs=2, max_length=None).answer_tokens == 10 + 11
    assert find_worst(unscored, settings("--shared_prefix", "false"), pairs=1, max_length=None).answer_tokens == 11
    padded = settings("--pad_to_multiple_of", "64")
    assert find_worst(lengths, padded, pairs=1, max_length=None).row_tokens == 128
