"""Pairs whose last turns differ: the assistant's tokens are scored, the user's and the tools' between them are not.

Each number is compared with the definition in reference_dpo.py, for packed and for padded rows.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset
from reference_dpo import distributions, dpo_loss, token_log_probs
from transformers import AutoModelForCausalLM

from dpokit.data.columns import FEATURES, IDS, MASKS, fingerprint_ids
from dpokit.evaluate.inputs import load_subject
from dpokit.evaluate.pairs import evaluate_pairs
from dpokit.merge.drift import take_answer
from dpokit.model.load import load_policy, load_reference, load_tokenizer
from dpokit.model.score import PairScorer, find_mask
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings
from dpokit.train.alarms import AlarmCallback
from dpokit.train.dpo_trainer import PairTrainer
from dpokit.train.sft_trainer import AnswerTrainer

# Prompt tokens, and the masks of the chosen and of the rejected answer; a number is an answer that is scored whole.
PAIRS = [
    (9, [1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1]),
    (3, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]),  # the first turn that differs is a user's
    (5, 4, 6),
    (1, [1, 0, 1], 9),
    (12, [1, 1, 0, 0], [0, 1, 0, 0, 1, 1]),  # cut in a user's turn
    (2, [0, 0, 0, 0, 1], 1),
]
ANSWERS = ("chosen", "rejected")
BETA = 0.3
LAYOUTS = {"packed": "true", "padded": "false"}


def make_rows(seed: int = 0) -> list[dict]:
    """Random ids; the answers of the second pair begin with two equal tokens that are not scored."""
    choose, rows = np.random.default_rng(seed), []
    for prompt, *answers in PAIRS:
        row = {"prompt_ids": choose.integers(1, 300, prompt).tolist()}
        for name, mask in zip(ANSWERS, answers, strict=True):
            row[f"{name}_ids"] = choose.integers(1, 300, mask if isinstance(mask, int) else len(mask)).tolist()
            row[f"{name}_mask"] = [] if isinstance(mask, int) else mask
        rows.append(row)
    rows[1]["rejected_ids"][:2] = rows[1]["chosen_ids"][:2]
    return rows


def make_dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=Features({name: FEATURES[name] for name in (*IDS, *MASKS)}))


@pytest.fixture(scope="session")
def models(tiny_gpt2, tmp_path_factory) -> dict[str, Path]:
    """A reference, and a policy that differs from it; with larger weights, so that log-probs differ, too."""
    folders = {"reference": tmp_path_factory.mktemp("reference"), "policy": tmp_path_factory.mktemp("policy")}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    for folder in folders.values():
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        model.save_pretrained(folder)
        for file in tiny_gpt2.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folders


def load_exact(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def exact(models) -> dict[str, dict[str, list[torch.Tensor]]]:
    """By model and answer, each row's log-probs of its scored tokens in float64."""
    with torch.no_grad():
        return {
            name: {
                answer: [
                    token_log_probs(model, row["prompt_ids"], row[f"{answer}_ids"], row[f"{answer}_mask"])
                    for row in make_rows()
                ]
                for answer in ANSWERS
            }
            for name, model in ((name, load_exact(folder)) for name, folder in models.items())
        }


def build(models, output: Path, rows=None, *, kind: str = "dpo", **changes):
    """A trainer of the policy on the rows, and on the same rows for evaluation."""
    defaults = {
        "model_name_or_path": str(models["reference"]),
        "dataset_name": "unused",
        "output_dir": str(output),
        "kind": kind,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    if kind == "dpo":
        defaults |= {"beta": BETA, "precompute_ref_log_probs": False}
    settings = load_settings("test", {**defaults, **changes}, [])
    tokenizer = load_tokenizer(settings.model)
    dataset = make_dataset(make_rows()) if rows is None else rows
    parts = {
        "run": RunDir(output),
        "identity": {},
        "model": load_policy(settings, tokenizer),
        "args": settings.training,
        "train_dataset": dataset,
        "eval_dataset": dataset if isinstance(dataset, Dataset) else None,
        "processing_class": tokenizer,
        "peft_config": None,
    }
    if kind == "sft":
        trainer = AnswerTrainer(**parts)
    else:
        shared = settings.data.shared_prefix
        parts |= {"shared_prefix": shared, "longest": 64, "reference": {"weights": "of this test"}}
        trainer = PairTrainer(ref_model=load_reference(settings), **parts)
    return trainer


def set_policy(trainer, folder: Path) -> None:
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def check_layout(trainer, layout: str) -> None:
    assert trainer.shared_prefix == ("on" if layout == "packed" else "off: --shared_prefix false")


def expected_loss(exact, kind: str, changes: dict) -> float:
    """By the definitions: LD-DPO arXiv 2409.06411, WPO arXiv 2406.11827, and those of reference_dpo.py."""
    alpha = changes.get("ld_alpha", 1.0)
    scores = {}
    for name, answers in exact.items():
        pairs = zip(*answers.values(), strict=True)
        parts = [[(side[: min(map(len, pair))], side[min(map(len, pair)) :]) for side in pair] for pair in pairs]
        sums = [[head.sum() + alpha * tail.sum() for head, tail in pair] for pair in parts]
        scores[name] = torch.tensor(sums).T
    lengths = [torch.tensor([len(tokens) for tokens in exact["policy"][answer]]).double() for answer in ANSWERS]
    return dpo_loss(kind, *scores["policy"], *scores["reference"], *lengths, BETA, 0.0).item()


LOSSES = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "apo_down": {"loss_type": "apo_down"},
    "sft": {"loss_type": "sft"},
    "ld_dpo": {"ld_alpha": 0.4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_equals_its_definition(case, layout, models, exact, tmp_path):
    trainer = build(models, tmp_path, shared_prefix=LAYOUTS[layout], **LOSSES[case])
    set_policy(trainer, models["policy"])
    trainer.model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator(make_rows()))
    loss = trainer.compute_loss(trainer.model, batch)
    check_layout(trainer, layout)
    kind = LOSSES[case].get("loss_type", "sigmoid")
    assert loss.item() == pytest.approx(expected_loss(exact, kind, LOSSES[case]), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_pairs_are_of_scored_tokens(layout, models, exact, tmp_path):
    trainer = build(models, tmp_path, shared_prefix=LAYOUTS[layout], use_weighting=True)
    set_policy(trainer, models["policy"])
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(make_rows())))
    check_layout(trainer, layout)
    model, expected = load_exact(models["policy"]), []
    for number, row in enumerate(make_rows()):
        weight, margin = 1.0, 0.0
        for sign, answer in ((1, "chosen"), (-1, "rejected")):
            with torch.no_grad():
                steps = distributions(model, row["prompt_ids"], row[f"{answer}_ids"], row[f"{answer}_mask"])
            own = exact["policy"][answer][number]
            weight *= (own - (2 * steps).logsumexp(-1)).mean().exp().item()
            margin += sign * (own.sum() - exact["reference"][answer][number].sum()).item()
        expected.append(weight * np.logaddexp(0, -BETA * margin))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_metrics_of_a_trainer_are_of_scored_tokens(layout, models, exact, tmp_path):
    """6 pairs in batches of 4 and 2."""
    trainer = build(models, tmp_path, shared_prefix=LAYOUTS[layout])
    set_policy(trainer, models["policy"])
    metrics = trainer.evaluate()
    check_layout(trainer, layout)
    assert metrics["eval_loss"] == pytest.approx(expected_loss(exact, "sigmoid", {}), rel=1e-5)
    sums = {n: {a: torch.stack([t.sum() for t in exact[n][a]]) for a in ANSWERS} for n in exact}
    for answer in ANSWERS:
        policy, reference = sums["policy"][answer], sums["reference"][answer]
        assert metrics[f"eval_logps/{answer}"] == pytest.approx(policy.mean().item(), rel=1e-5)
        assert metrics[f"eval_rewards/{answer}"] == pytest.approx(BETA * (policy - reference).mean().item(), rel=1e-4)
    model, entropies = load_exact(models["policy"]), []
    for row, answer in itertools.product(make_rows(), ANSWERS):
        with torch.no_grad():
            steps = distributions(model, row["prompt_ids"], row[f"{answer}_ids"], row[f"{answer}_mask"])
        entropies.append(-(steps.exp() * steps).sum(-1))
    assert metrics["eval_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    needed = sum(len(row[name]) for row in make_rows() for name in IDS)
    needed -= (
        2 + 2
    )  # tokens with which both answers of a pair begin count once, and those after the last scored one not
    computed = needed if layout == "packed" else 12 * 18
    assert trainer.count_positions(trainer.data_collator(make_rows())) == (needed, computed)


def test_packed_and_padded_rows_train_the_same_weights(models, tmp_path):
    weights = {}
    for layout, shared in LAYOUTS.items():
        trainer = build(models, tmp_path / layout, shared_prefix=shared, optim="sgd", learning_rate=0.1)
        trainer.train()
        check_layout(trainer, layout)
        weights[layout] = trainer.model.state_dict()
    before = AutoModelForCausalLM.from_pretrained(models["reference"]).state_dict()
    for name, weight in weights["packed"].items():
        torch.testing.assert_close(weight, weights["padded"][name], rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.allclose(weight, before[name], atol=1e-4) for name, weight in weights["packed"].items())


# -- the reference's cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_reference_scores_are_of_scored_tokens(layout, models, exact, tmp_path, monkeypatch):
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))
    flags = {"shared_prefix": LAYOUTS[layout], "precompute_ref_log_probs": True}

    def list_parts() -> set[Path]:
        return set((tmp_path / "cache").rglob("*.safetensors"))

    trainer = build(models, tmp_path / "run", **flags)
    for answer in ANSWERS:
        expected = [tokens.sum().item() for tokens in exact["reference"][answer]]
        assert trainer.train_dataset[f"ref_{answer}_logps"][:] == pytest.approx(expected, rel=1e-5)
    first = list_parts()
    assert len(first) == 1
    build(models, tmp_path / "again", **flags)
    assert list_parts() == first
    rows = make_rows()
    rows[0]["chosen_mask"] = [1] * len(rows[0]["chosen_ids"])
    other = build(models, tmp_path / "other", make_dataset(rows), **flags)
    assert len(list_parts()) == 2
    changed = other.train_dataset["ref_chosen_logps"][:]
    assert changed[0] < trainer.train_dataset["ref_chosen_logps"][0] - 1
    assert changed[1:] == pytest.approx(trainer.train_dataset["ref_chosen_logps"][1:], rel=1e-5)


def test_masks_change_the_fingerprint_of_equal_ids():
    rows = make_rows()
    ids = [{name: row[name] for name in IDS} for row in rows]
    plain = hashlib.sha256()
    for name in ids[0]:
        for values in ([len(row[name]) for row in ids], [token for row in ids for token in row[name]]):
            plain.update(np.array(values, dtype="<i4").tobytes())
    empty = [{**row, "chosen_mask": [], "rejected_mask": []} for row in ids]
    assert fingerprint_ids([Dataset.from_list(ids)]) == fingerprint_ids([make_dataset(empty)]) == plain.hexdigest()
    mask = [0] * 3 + [1]
    masked = [[{**row, name: mask}, *empty[1:]] for row in empty[:1] for name in ("chosen_mask", "rejected_mask")]
    masked += [rows, [{**rows[0], "chosen_mask": [1, 0] + [1] * 5}, *rows[1:]]]
    prints = {fingerprint_ids([make_dataset(table)]) for table in [*masked, empty]}
    assert len(prints) == 5
    assert fingerprint_ids([make_dataset(rows)]) in prints


# -- supervised training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers_alone", [True, False])
def test_supervised_loss_is_the_mean_over_trained_tokens(answers_alone, models, exact, tmp_path):
    """With `--completion_only_loss false` every token of a row is trained, whoever wrote it."""
    trainer = build(models, tmp_path, kind="sft", completion_only_loss=answers_alone)
    set_policy(trainer, models["policy"])
    model = load_exact(models["policy"])
    trained = exact["policy"]["chosen"]
    if not answers_alone:
        with torch.no_grad():
            trained = [
                token_log_probs(model, row["prompt_ids"][:1], row["prompt_ids"][1:] + row["chosen_ids"])
                for row in make_rows()
            ]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(-torch.cat(trained).mean().item(), rel=1e-5)
    batch = trainer.data_collator(make_rows())
    assert trainer.weigh(batch) == sum(map(len, trained))


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_rows_of_a_stream_keep_their_masks(kind, models, tmp_path):
    def stream() -> Iterator[dict]:
        yield from make_rows()

    trainer = build(models, tmp_path, IterableDataset.from_generator(stream), kind=kind)
    batch = next(iter(trainer.get_train_dataloader()))
    scored = batch["completion_mask"].bool() if kind == "dpo" else batch["labels"] != -100
    masks = [find_mask(row, "chosen") or [1] * len(row["chosen_ids"]) for row in make_rows()[:3]]
    assert scored[:3].sum(1).tolist() == [sum(mask) for mask in masks]


# -- evaluation and merge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "attention"), [("packed", "sdpa"), ("padded", "eager")])
def test_an_evaluation_is_of_scored_tokens(layout, attention, models, exact, pairs_file, capfd):
    subject = load_subject(
        str(models["policy"]),
        base=str(models["reference"]),
        data=str(pairs_file),
        split="train",
        argv=["--attn_implementation", attention, "--beta", str(BETA), "--use_cpu", "--bf16", "false"],
    )
    rows = make_dataset(make_rows()).add_column("row", list(range(len(PAIRS))))
    subject.held_out = replace(subject.held_out, pairs=rows)
    record = evaluate_pairs(subject)
    assert ("shared prefix: off" in capfd.readouterr().err) == (layout == "padded")
    tuned = record["tuned"]
    policy = exact["policy"]
    for answer in ANSWERS:
        expected = np.mean([tokens.sum().item() for tokens in policy[answer]])
        assert tuned[f"logps/{answer}"]["value"] == pytest.approx(expected, rel=1e-5)
    assert tuned["loss"]["value"] == pytest.approx(expected_loss(exact, "sigmoid", {}), rel=1e-5)
    per_token = np.mean([tokens.mean().item() for tokens in policy["chosen"]])
    assert tuned["logps_per_token/chosen"]["value"] == pytest.approx(per_token, rel=1e-5)
    longer = [np.sign(len(c) - len(r)) / 2 + 0.5 for c, r in zip(*policy.values(), strict=True)]
    assert record["always_longer"]["value"] == pytest.approx(np.mean(longer))
    models_by_name = {name: load_exact(folder) for name, folder in models.items()}
    drifts = []
    for row in make_rows():
        with torch.no_grad():
            after, before = (
                distributions(models_by_name[name], row["prompt_ids"], row["chosen_ids"], row["chosen_mask"])
                for name in ("policy", "reference")
            )
        drifts.append((after.exp() * (after - before)).sum(-1).mean().item())
    assert tuned["kl_per_token"]["value"] == pytest.approx(np.mean(drifts), rel=1e-4)


def test_the_drift_of_a_merge_is_of_scored_tokens(models, exact):
    scorer = PairScorer(AutoModelForCausalLM.from_pretrained(models["policy"]), pad_id=0, longest=64)
    table = scorer.score_tokens(make_rows())
    for side, answer in enumerate(ANSWERS):
        for number, row in enumerate(make_rows()):
            taken = take_answer(table[side, number], row, answer)
            torch.testing.assert_close(taken.double(), exact["policy"][answer][number], rtol=1e-5, atol=1e-5)


def test_a_prompt_that_a_user_continues_is_not_answered(models, tmp_path):
    trainer = build(models, tmp_path)
    alarms = AlarmCallback(trainer, trainer.run, answers=2)
    alarms.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert alarms.prompts == [make_rows()[number]["prompt_ids"] for number in (0, 2)]
