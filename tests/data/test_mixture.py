"""Mixtures: how many pairs of each source, which ones, what is counted, and which settings are refused."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from compare_runs import interrupt
from datasets import Dataset
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from dpokit.data.columns import IDS, read_column
from dpokit.data.prepare import PreparedData, prepare_data, prepare_held_out
from dpokit.errors import DataError, RunFolderError, SettingsError
from dpokit.run import train
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import load_settings

SIZES = {"a": 40, "b": 25, "c": 10}


def write(path: Path, first: int, number: int, *, shared: int = 0, layout: str = "plain") -> Path:
    """Writes pairs of numbered prompts; `shared` of them are pairs of `write(..., 0, ...)`."""
    rows: list[dict[str, Any]] = []
    for place in range(number):
        at = place if place < shared else first + place
        question, chosen, rejected = f"What is {at}?", f"It is {at}." + " Yes." * (at % 7), "No idea."
        if layout == "chat":
            turns = [{"role": "user", "content": question}]
            answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            rows.append({"prompt": turns, "chosen": answers[0], "rejected": answers[1]})
        elif layout == "renamed":
            rows.append({"question": question, "accepted": chosen, "reject": rejected})
        else:
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected, "source": path.stem})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files a, b and c with different pairs; `again` has 8 pairs of a and 4 new ones, `twice` repeats its own."""
    path = tmp_path_factory.mktemp("mixture")
    for number, (name, size) in enumerate(SIZES.items()):
        write(path / f"{name}.jsonl", 100 * number, size)
    write(path / "again.jsonl", 900, 12, shared=8, layout="renamed")
    twice = write(path / "twice.jsonl", 700, 5).read_text()
    (path / "twice.jsonl").write_text(twice + twice)
    write(path / "chat.jsonl", 400, 6, layout="chat")
    (path / "empty.jsonl").write_text("\n")
    (path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (path / "same.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    (path / "labels.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    splits = path / "splits"
    splits.mkdir()
    write(splits / "train.jsonl", 500, 9)
    write(splits / "test.jsonl", 600, 4)
    return path


def name_sources(folder: Path, *sources: dict[str, Any] | str) -> dict[str, Any]:
    """The flag of a mixture whose sources are named by their files."""
    entries = [{"path": source} if isinstance(source, str) else source for source in sources]
    files = {path.stem: str(path) for path in folder.iterdir()} | {"none": str(folder / "none.jsonl")}
    return {"datasets": [{**entry, "path": files.get(entry["path"], entry["path"])} for entry in entries]}


def mix(folder: Path, tokenizer: Any, *sources: dict[str, Any] | str, with_eval: bool = False, **flags) -> PreparedData:
    data = DataArguments(**name_sources(folder, *sources), **flags)
    return prepare_data(data, tokenizer, max_length=None, with_eval=with_eval)


def count_kept(prepared: PreparedData, split: str = "train") -> list[int]:
    """The kept pairs of each source, from data.json, whose sums are the split's."""
    record = prepared.record()[split]
    sources = record.get("sources", [record])
    for key in ("rows", "kept"):
        assert record[key] == sum(source[key] for source in sources)
    return [source["kept"] for source in sources]


def list_ids(rows: Any) -> list[tuple]:
    return [tuple(tuple(row[name]) for name in IDS) for row in rows]


# sources, further flags, and the pairs that each source gives
SHARES: dict[str, tuple[tuple, dict[str, Any], list[int]]] = {
    "all of each": (("a", "b", "c"), {}, [40, 25, 10]),
    "a count": (("a", {"path": "b", "count": 5}), {}, [40, 5]),
    "a count with a point": (("a", {"path": "b", "count": 5.0}), {}, [40, 5]),
    "a weight": (({"path": "a", "weight": 0.25}, "c"), {}, [10, 10]),
    "a weight of all": (({"path": "a", "weight": 1}, "c"), {}, [40, 10]),
    "a cap": (("a", "b", "c"), {"max_pairs_per_source": 12}, [12, 12, 10]),
    "a cap before a weight": (({"path": "a", "weight": 0.5}, "c"), {"max_pairs_per_source": 12}, [6, 10]),
    "balance": (("a", "b", "c"), {"balance_sources": True}, [10, 10, 10]),
    "balance below a cap": (("a", "b", "c"), {"balance_sources": True, "max_pairs_per_source": 4}, [4, 4, 4]),
    "fractions below a cap": (
        ({"path": "a", "fraction": 0.5}, {"path": "b", "fraction": 0.5}),
        {"max_pairs_per_source": 9},
        [9, 9],
    ),
    "slices": (({"path": "a", "split": "train[:50%]"}, {"path": "a", "split": "train[50%:]"}), {}, [20, 20]),
    "rows of each": (("a", "c"), {"max_train_samples": 7}, [7, 7]),
}


@pytest.mark.parametrize("case", SHARES)
def test_each_source_gives_its_share(case, folder, plain_tokenizer):
    sources, flags, expected = SHARES[case]
    prepared = mix(folder, plain_tokenizer, *sources, **flags)
    assert count_kept(prepared) == expected
    assert len(prepared.train) == sum(expected)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 1.0), (1, 1, 1), (0.9, 0.05, 0.05), (3, 2, 1)], ids=str)
def test_fractions_give_as_many_pairs_as_in_trl(fractions, folder, plain_tokenizer):
    sources = [{"path": name, "fraction": share} for name, share in zip(SIZES, fractions, strict=True)]
    configs = [
        DatasetConfig("json", data_files=str(folder / f"{source['path']}.jsonl"), fraction=source["fraction"])
        for source in sources
    ]
    theirs = get_dataset(DatasetMixtureConfig(configs))["train"]["source"]
    ours = count_kept(mix(folder, plain_tokenizer, *sources))
    assert ours == [theirs.count(name) for name in SIZES]


def test_a_single_source_is_a_mixture_of_one(folder, plain_tokenizer):
    path = str(folder / "a.jsonl")
    forms = ({"dataset_name": path}, {"datasets": [{"path": path}]}, {"dataset_mixer": {path: 1.0}})
    prepared = [
        prepare_data(DataArguments(**form, eval_fraction=0.2), plain_tokenizer, max_length=None, with_eval=True)
        for form in forms
    ]
    first, *others = [json.dumps(each.record()) for each in prepared]
    assert others == [first, first]


def test_equal_settings_give_equal_bytes_and_a_seed_other_pairs(folder, plain_tokenizer):
    sources = ({"path": "a", "count": 15}, {"path": "b", "weight": 0.5})
    first, again, other = (
        mix(folder, plain_tokenizer, *sources, with_eval=True, eval_fraction=0.2, mixture_seed=seed)
        for seed in (0, 0, 1)
    )
    assert json.dumps(first.record()) == json.dumps(again.record())
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert count_kept(first) != [15, 12]  # some are held out
    assert sum(count_kept(first)) + sum(count_kept(first, "eval")) == 15 + 12


def test_a_larger_count_keeps_the_pairs_of_a_smaller_one(folder, plain_tokenizer):
    small, large = (set(list_ids(mix(folder, plain_tokenizer, {"path": "a", "count": size}).train)) for size in (5, 20))
    assert small < large


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (("a", "again"), [40, 4]),
        (("again", "a"), [12, 32]),
        (("twice", "c"), [5, 10]),
        (({"path": "a", "split": "train[:30]"}, {"path": "a", "split": "train[20:]"}), [30, 10]),
    ],
    ids=["the later source", "the other order", "inside a source", "slices that overlap"],
)
def test_duplicates_are_dropped_and_the_first_source_wins(sources, expected, folder, plain_tokenizer):
    prepared = mix(folder, plain_tokenizer, *sources, drop_duplicates=True)
    assert count_kept(prepared) == expected
    assert len(set(list_ids(prepared.train))) == len(prepared.train)
    assert not any("--drop_duplicates" in finding for finding in prepared.findings)


def test_pairs_in_two_sources_are_a_finding(folder, plain_tokenizer):
    prepared = mix(folder, plain_tokenizer, "a", "again")
    assert prepared.findings[0].startswith("8 usable pairs are in an earlier source, too: --drop_duplicates true")


def test_a_length_gap_drops_the_pairs_beyond_it(folder, plain_tokenizer):
    prepared = mix(folder, plain_tokenizer, "a", "c", max_length_gap=6)
    gaps = [abs(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in prepared.train]
    whole = mix(folder, plain_tokenizer, "a", "c").train
    assert max(gaps) <= 6
    dropped = sum(abs(len(row["chosen_ids"]) - len(row["rejected_ids"])) > 6 for row in whole)
    assert prepared.tallies["train"].dropped == {"length_gap": dropped} and dropped > 0


def test_all_pairs_of_a_prompt_are_on_one_side(tmp_path, plain_tokenizer):
    rows = [{"prompt": f"What is {n}?", "chosen": "x", "rejected": "y"} for n in range(20)]
    for name in ("a", "b"):
        chosen = [{**row, "chosen": f"{row['chosen']} {name}"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    prepared = mix(tmp_path, plain_tokenizer, "a", "b", with_eval=True, eval_fraction=0.3)
    sides = [{tuple(ids) for ids in rows["prompt_ids"]} for rows in (prepared.train, prepared.eval)]
    assert not sides[0] & sides[1]
    assert (count_kept(prepared), count_kept(prepared, "eval")) == ([14, 14], [6, 6])


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_chat_and_text_rows_mix(model, folder, plain_tokenizer, chat_tokenizer):
    tokenizer = plain_tokenizer if model == "plain" else chat_tokenizer
    prepared = mix(folder, tokenizer, "a", "chat", "again")
    assert count_kept(prepared) == [40, 6, 12]
    assert [source["format"] for source in prepared.record()["train"]["sources"]] == [
        "explicit, plain",
        "explicit, conversational",
        "explicit, plain",
    ]


def test_sources_with_a_test_split_are_evaluated_on(folder, plain_tokenizer):
    sources = ("a", {"path": "splits", "test_split": "test"})
    prepared = mix(folder, plain_tokenizer, *sources, with_eval=True)
    assert (count_kept(prepared), count_kept(prepared, "eval")) == ([40, 9], [4])
    every = mix(folder, plain_tokenizer, "splits", {"path": "c", "test_split": "train[:2]"}, with_eval=True)
    assert count_kept(every, "eval") == [2]


def test_two_parts_of_one_dataset_hold_out_its_pairs_once(folder, plain_tokenizer):
    sources = ({"path": "splits", "split": "train[:4]"}, {"path": "splits", "split": "train[4:]"})
    prepared = mix(folder, plain_tokenizer, *sources, with_eval=True)
    assert (count_kept(prepared), count_kept(prepared, "eval")) == ([4, 5], [4])
    data = DataArguments(**name_sources(folder, *sources))
    assert len(prepare_held_out(data, plain_tokenizer, max_length=None).pairs) == 4


def test_a_file_that_is_named_twice_is_read_once(folder, plain_tokenizer):
    files = [str(folder / "c.jsonl"), str(folder / "splits" / ".." / "c.jsonl")]
    assert count_kept(mix(folder, plain_tokenizer, {"path": "json", "data_files": files})) == [10]


@pytest.mark.parametrize("flags", [{"eval_fraction": 0.5}, {"dataset_test_split": "train"}], ids=["share", "split"])
def test_held_out_pairs_have_the_prompts_of_their_rows(flags, folder, plain_tokenizer):
    data = DataArguments(**name_sources(folder, "a", "again", "c"), **flags)
    held_out = prepare_held_out(data, plain_tokenizer, max_length=None)
    prompts = [plain_tokenizer.decode(ids) for ids in held_out.pairs["prompt_ids"]]
    assert all(prompt in text for prompt, text in zip(held_out.prompts, prompts, strict=True))
    assert {*held_out.sources} == {"a", "", "c"}
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=True)
    assert list_ids(prepared.eval) == list_ids(held_out.pairs)


@pytest.mark.parametrize("form", ["texts", "list", "lists"])
def test_sources_on_a_command_line_are_json(form, tmp_path):
    sources = [{"path": "a", "weight": 0.5}, {"path": "b"}]
    texts = [json.dumps([source] if form == "lists" else source) for source in sources]
    texts = [json.dumps(sources)] if form == "list" else texts
    settings = load_settings("x", {"output_dir": str(tmp_path), "use_cpu": True}, ["--datasets", *texts])
    assert settings.data.datasets == sources
    assert [(source.path, source.weight) for source in settings.data.sources()] == [("a", 0.5), ("b", None)]


def test_a_day_in_a_file_of_settings_is_the_name_of_a_split(tmp_path):
    config = tmp_path / "mixture.yaml"
    config.write_text("datasets:\n  - path: a\n    split: 2024-01-01\n")
    settings = load_settings("x", {"output_dir": str(tmp_path), "use_cpu": True}, ["--config", str(config)])
    assert [source.split for source in settings.data.sources()] == ["2024-01-01"]


def test_columns_of_a_source_are_mapped_or_chosen(folder, plain_tokenizer):
    mapped = {"path": "again", "columns": {"prompt": "question", "chosen": "reject", "rejected": "accepted"}}
    chosen = {"path": "a", "columns": ["prompt", "chosen", "rejected"]}
    prepared = mix(folder, plain_tokenizer, chosen, mapped)
    assert prepared.unused_columns == []
    assert "No idea" in plain_tokenizer.decode(prepared.train[-1]["chosen_ids"])


BAD_SOURCES: dict[str, tuple[Any, str]] = {
    "weight 0": ({"path": "b", "weight": 0}, "source b has weight 0"),
    "negative weight": ({"path": "b", "weight": -1}, "has weight -1"),
    "weight above 1": ({"path": "b", "weight": 1.5}, "has weight 1.5"),
    "weight nan": ({"path": "b", "weight": float("nan")}, "has weight NaN"),
    "weight as text": ({"path": "b", "weight": "half"}, 'has weight "half"'),
    "weight true": ({"path": "b", "weight": True}, "has weight true"),
    "half a pair": ({"path": "b", "count": 1.5}, "has count 1.5"),
    "count 0": ({"path": "b", "count": 0}, "has count 0"),
    "two shares": ({"path": "b", "count": 2, "weight": 0.5}, "has weight and count"),
    "one fraction": ({"path": "b", "fraction": 0.5}, "a has no fraction"),
    "no path": ({"split": "train"}, "has no path"),
    "empty path": ({"path": ""}, 'has path ""'),
    "unknown key": ({"path": "b", "wieght": 0.5}, "has the key 'wieght'"),
    "two names of a key": ({"path": "b", "id": "c"}, "has path twice"),
    "twice": ({"path": "a"}, "the source a is listed twice"),
    "unknown ranking": ({"path": "b", "ranked": "worst"}, 'has ranked "worst"'),
    "unknown column": ({"path": "b", "columns": {"answer": "x"}}, "the name 'answer'"),
    "columns as numbers": ({"path": "b", "columns": [1]}, "has columns"),
    "files by split": ({"path": "json", "data_files": {"train": "x"}}, "has data_files"),
    "columns of another form": ({"path": "b", "columns": ["prompt=x", "y"]}, "b: the key columns has 'y'"),
    "no source": (["b"], "source 2 of --datasets is"),
    "lists in columns": ({"path": "b", "columns": [["a", "b"]]}, 'has columns [["a", "b"]]'),
    "a list in ignore_columns": ({"path": "b", "ignore_columns": ["a", ["b"]]}, "has ignore_columns"),
    "a day as split": ({"path": "b", "split": date(2024, 1, 1)}, 'has split "2024-01-01"'),
    "a day in a list": ([date(2024, 1, 1)], "source 2 of --datasets is"),
    "a key that is no text": ({"path": "b", "columns": {(1, 2): "x"}}, "has columns"),
    "an endless fraction": ({"path": "b", "fraction": 1e308}, "has fraction 1e+308"),
    "two names of the Hub": ({"path": "hf://datasets/a"}, "the source hf://datasets/a is listed twice"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_named(case):
    source, message = BAD_SOURCES[case]
    with pytest.raises(SettingsError) as error:
        DataArguments(datasets=[{"path": "a"}, source])
    assert message in error.value.seen
    assert error.value.do


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"datasets": []}, "has no source"),
        ({"dataset_mixer": {}}, "has no source"),
        ({"dataset_mixer": {"a": 0.0, "b": 0.0}}, "source a has weight 0.0"),
        ({"dataset_name": "a,,b"}, "has an empty name"),
        ({"dataset_name": "a,a"}, "is listed twice"),
    ],
    ids=str,
)
def test_a_mixture_without_pairs_is_refused(flags, message):
    with pytest.raises(SettingsError, match=message):
        DataArguments(**flags)


# the second of three sources, further flags, and the message
BAD_DATA = {
    "a broken file": ("broken", {}, "source 2 of 3, .*broken.jsonl: .*line 1 is broken JSON"),
    "a missing file": ("none", {}, "source 2 of 3, .*none.jsonl: .*there is no such file"),
    "an empty file": ("empty", {}, "source 2 of 3, .*empty.jsonl"),
    "labels": ("labels", {}, "source 2 of 3, .*labels.jsonl"),
    "no such split": ({"path": "splits", "split": "valid"}, {}, "source 2 of 3, .*there is no split 'valid'"),
    "no such column": ({"path": "b", "columns": ["prompt", "reward"]}, {}, "source 2 of 3, .*the key columns reward"),
    "a file of the Hub": (
        {"path": "me/x", "data_files": "a.csv"},
        {},
        "source 2 of 3, .*hf://datasets/me/x/a.csv could not be downloaded",
    ),
    "a file below an address": (
        {"path": "hf://datasets/me/x/", "data_files": "a.csv"},
        {},
        "source 2 of 3, .*hf://datasets/me/x/a.csv could not be downloaded",
    ),
    "a folder of the Hub": ({"path": "me/x", "data_dir": "a"}, {}, "source 2 of 3, .*no folder of this machine"),
    "a folder of nobody": (
        {"path": "~nobody-here/x", "data_dir": "a"},
        {},
        "source 2 of 3, .*no folder of this machine",
    ),
    "a reader without files": ({"path": "json"}, {}, "source 2 of 3, json: the path json reads the files"),
    "a count above the source": ({"path": "b", "count": 26}, {}, "b.jsonl, split train gives 25 usable pairs"),
    "no duplicate to balance": (
        {"path": "a", "split": "train[:5]"},
        {"drop_duplicates": True, "balance_sources": True},
        "no usable pair is left of the 5 rows of .*a.jsonl.* duplicate_pair",
    ),
    "a share of nothing": ({"path": "b", "weight": 0.001}, {}, "no usable pair is left .* 25 over_share"),
    "no pair within the gap": ("b", {"max_length_gap": 0}, "no usable pair is left of the 40 rows"),
    "no test split": ("b", {"with_eval": True}, "source 1 of 3, .*there is no split 'test'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_an_unusable_source_is_named(case, folder, plain_tokenizer):
    source, flags, message = BAD_DATA[case]
    with pytest.raises(DataError, match=message):
        mix(folder, plain_tokenizer, "a", source, "c", **flags)


def test_a_list_as_users_of_trl_write_it_is_read(folder, tmp_path, tiny_gpt2):
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"""
datasets:
  - path: json
    data_files: {folder}/a.jsonl
    split: train[:50%]
    columns: [prompt, chosen, rejected]
    fraction: 0.75
  - path: {folder}/splits
    name: null
    fraction: 0.25
"""
    )
    defaults = {"model_name_or_path": str(tiny_gpt2), "dataset_name": "other", "output_dir": str(tmp_path / "run")}
    settings = load_settings("dpo_test", {**defaults, "use_cpu": True}, ["--config", str(config)])
    assert [source.place for source in settings.data.sources()] == [f"{folder}/a.jsonl", f"{folder}/splits"]
    assert settings.data.dataset_name is None
    recorded = settings.values()["datasets"]  # a verb reads them from run.json
    assert load_settings("evaluate", {"datasets": recorded, "use_cpu": True}, []).data.datasets == recorded


STREAMS: dict[str, tuple[tuple, dict[str, Any], int]] = {
    "all of each": (("a", "b", "c"), {}, 75),
    "a count": (("a", {"path": "b", "count": 5}), {}, 45),
    "a cap": (("a", "b"), {"max_pairs_per_source": 12}, 24),
    "duplicates": (("a", "again", "twice"), {"drop_duplicates": True}, 40 + 4 + 5),
    "one source": (("a",), {}, 40),
}


def stream(folder: Path, tokenizer: Any, *sources: Any, **flags: Any) -> PreparedData:
    return mix(folder, tokenizer, *sources, dataset_streaming=True, **flags)


@pytest.mark.parametrize("case", STREAMS)
def test_streams_give_the_same_pairs_each_time(case, folder, plain_tokenizer):
    sources, flags, expected = STREAMS[case]
    prepared = stream(folder, plain_tokenizer, *sources, **flags)
    first, again = list_ids(prepared.train), list_ids(prepared.train)
    assert first == again == list_ids(stream(folder, plain_tokenizer, *sources, **flags).train)
    assert len(first) == expected
    assert sum(count_kept(prepared)) == expected  # a row counts once, however often it is read


# the second source, the first one's keys, flags, and the message
BAD_STREAMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "no pair": ("same", {}, {}, "no usable pair is left of the 3 rows of .*same.jsonl"),
    "no pair of a fraction": (
        {"path": "same", "fraction": 1},
        {"fraction": 9},
        {},
        "no usable pair is left of the 3 rows of .*same.jsonl",
    ),
    "no pair to balance": (
        "same",
        {},
        {"balance_sources": True},
        "no usable pair is left of the 3 rows of .*same.jsonl",
    ),
    "a count above the source": ({"path": "c", "count": 11}, {}, {}, "c.jsonl, split train gives 10 usable pairs"),
    "a count above the cap": (
        {"path": "c", "count": 9},
        {},
        {"max_pairs_per_source": 8},
        "c.jsonl, split train gives 8 usable pairs",
    ),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_stream_without_enough_pairs_is_named(case, folder, plain_tokenizer):
    source, keys, flags, message = BAD_STREAMS[case]
    with pytest.raises(DataError, match=message):
        list(stream(folder, plain_tokenizer, {"path": "a", **keys}, source, **flags).train)


@pytest.mark.parametrize("flags", [{}, {"balance_sources": True}], ids=["fractions", "balance"])
def test_streams_keep_their_shares(flags, folder, plain_tokenizer):
    shares = {} if flags else {"fraction": 0.5}
    sources = [{"path": name, **shares} for name in ("a", "b")]
    kept = count_kept(prepared := stream(folder, plain_tokenizer, *sources, **flags))
    list(prepared.train)
    kept = count_kept(prepared)
    assert max(kept) == 25 or kept[0] == 40  # one source has ended
    assert abs(kept[0] - kept[1]) < 16


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_an_interrupted_mixture_resumes_exactly(streaming, folder, tmp_path, tiny_gpt2):
    settings = {
        **name_sources(folder, {"path": "a", "weight": 0.5}, "again", "chat"),
        "model_name_or_path": str(tiny_gpt2),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "drop_duplicates": True,
        "max_length": 64,
        "dataset_streaming": streaming,
        "eval_strategy": "no",
        "learning_rate": 1e-3,
    }
    whole = train("dpo_test", {**settings, "output_dir": str(tmp_path / "whole")}, [])
    cut = interrupt(whole, tmp_path / "cut", after=2)
    train("dpo_test", {**settings, "output_dir": str(cut.path)}, [])
    first, second = ((run.model / "model.safetensors").read_bytes() for run in (whole, cut))
    assert first == second
    assert json.loads(whole.data_json.read_text())["train"] == json.loads(cut.data_json.read_text())["train"]
    assert (whole.read_run() or {})["local"] == ["model_name_or_path"] + [
        str(folder / f"{name}.jsonl") for name in ("a", "again", "chat")
    ]


def test_a_changed_mixture_does_not_resume(folder, tmp_path, tiny_gpt2):
    settings = {
        "model_name_or_path": str(tiny_gpt2),
        "max_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_length": 64,
        "eval_strategy": "no",
        "dataset_streaming": True,
        "output_dir": str(tmp_path / "run"),
    }
    whole = train("dpo_test", {**settings, **name_sources(folder, "a", "b")}, [])
    cut = interrupt(whole, tmp_path / "cut", after=1)
    with pytest.raises(RunFolderError, match="datasets was"):
        train("dpo_test", {**settings, **name_sources(folder, "a", "c"), "output_dir": str(cut.path)}, [])


def test_rows_are_read_by_number_of_their_own_source(folder, plain_tokenizer):
    prepared = mix(folder, plain_tokenizer, "a", "c")
    assert isinstance(prepared.train, Dataset)
    assert read_column(prepared.train, "row") == [*range(40), *range(10)]
