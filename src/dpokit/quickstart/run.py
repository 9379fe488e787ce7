"""The quickstart: builds a corpus and a base model, runs ordinary DPO training, and judges sampled answers exactly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.atomic_files import write_json
from dpokit.console import quiet_dependencies, say
from dpokit.data.rendering import Renderer
from dpokit.distributed.processes import is_main_process
from dpokit.model.generate import generate_answers
from dpokit.quickstart.base_model import build_base
from dpokit.quickstart.grammar import Verdict, judge_answer, write_corpus
from dpokit.run import train as train_recipe
from dpokit.rundir import RunDir
from dpokit.safe_console import SafeConsole

TRAIN_PAIRS, EVAL_PAIRS = 4200, 400
SEED = 0
# The longest answer of the grammar has 30-odd tokens; an answer that never ends is cut here.
MOST_NEW_TOKENS = 60


def train_and_judge(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> None:
    """Builds corpus and base model if missing, trains, judges the answers; arguments as for `dpokit.run.train`."""
    quiet_dependencies()
    if is_main_process():
        build_corpus_and_base(Path(defaults["dataset_name"]), Path(defaults["model_name_or_path"]))
    run = train_recipe(recipe, defaults, argv)
    if is_main_process():
        judge_run(run, Path(defaults["dataset_name"]), Path(defaults["model_name_or_path"]))


def build_corpus_and_base(corpus: Path, base: Path) -> None:
    """Writes the corpus and trains the base model on it, unless the base model exists."""
    if base.exists():
        return
    write_corpus(corpus, train_pairs=TRAIN_PAIRS, eval_pairs=EVAL_PAIRS, seed=SEED)
    say(f"a corpus of {TRAIN_PAIRS:,} prompts, each with a kind and a curt answer: {corpus}")
    build_base(base, corpus=corpus / "train.jsonl", seed=SEED)


def judge_run(run: RunDir, corpus: Path, base: Path) -> dict[str, dict[str, float]]:
    """Samples and judges answers of base and tuned to test prompts; prints, writes and returns the shares."""
    prompts = [json.loads(line)["prompt"] for line in (corpus / "test.jsonl").read_text().splitlines()]
    tuned = run.adapter if run.adapter.exists() else run.model
    answers = {name: _sample(folder, prompts) for name, folder in (("base", base), ("tuned", tuned))}
    verdicts = {
        name: [judge_answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        for name, texts in answers.items()
    }
    outcome = {name: _shares(judged) for name, judged in verdicts.items()}
    write_json(run.path / "quickstart.json", {"prompts": len(prompts), **outcome})
    run.write_run(judged=describe_shares(outcome, len(prompts)))
    _show(outcome, prompts, answers)
    return outcome


def _sample(folder: Path, prompts: list[str]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = {"max_new_tokens": MOST_NEW_TOKENS, "batch_size": 100}
    answers = generate_answers(model, tokenizer, prompts, seed=SEED, ends=Renderer(tokenizer).ends, **size)
    return [answer.text for answer in answers]


def _shares(verdicts: list[Verdict]) -> dict[str, float]:
    return {
        "kind": sum(verdict.kind for verdict in verdicts) / len(verdicts),
        "well_formed": sum(verdict.well_formed for verdict in verdicts) / len(verdicts),
    }


def describe_shares(outcome: Mapping[str, Mapping[str, float]], prompts: int) -> str:
    """The verdict of the quickstart as a sentence, for its report and its card."""
    base, tuned = outcome["base"], outcome["tuned"]
    return (
        f"Of the tuned model's sampled answers to {prompts} held-out prompts, {tuned['kind']:.1%} are kind and "
        f"{tuned['well_formed']:.1%} well-formed; of the base's, {base['kind']:.1%} and {base['well_formed']:.1%}."
    )


def _show(outcome: Mapping[str, Mapping[str, float]], prompts: list[str], answers: Mapping[str, list[str]]) -> None:
    console = SafeConsole(highlight=False)
    table = Table(title=f"\n{len(prompts)} sampled answers to held-out prompts", title_justify="left", box=None)
    for name in ("model", "kind", "well-formed"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, shares in outcome.items():
        table.add_row(name, f"{shares['kind']:.1%}", f"{shares['well_formed']:.1%}")
    console.print(table)
    console.print()
    # Only prompts whose base answer is not kind, because they show the difference; the table above has their share.
    base = answers["base"]
    shown = [i for i, prompt in enumerate(prompts) if not judge_answer(prompt, base[i]).kind][:4]
    for i in shown:
        question = prompts[i].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
        console.print(f"[bold]{escape(question)}[/bold]")
        for name, texts in answers.items():
            console.print(f"  {name:<6}{escape(texts[i])}")
    console.print(
        "\nNext steps:\n"
        "  accelerate launch recipes/dpo_gpt2.py             GPT-2 on Anthropic's HH preferences\n"
        "  accelerate launch recipes/dpo_gpt2.py --help      every setting\n"
        "  accelerate launch recipes/dpo_gpt2.py --dataset_name pairs.jsonl --eval_fraction 0.05   your own pairs"
    )
