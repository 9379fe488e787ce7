"""The embedded corpus of the quickstart: friendly and curt answers to small requests. No torch.

It has a grammar, so an answer can be judged exactly, without a judge model: it is either one of the sentences that the
grammar makes for its prompt, or it is broken. Kind and curt answers have the same shape (an opening, a sentence about
the topic, a closing) and about the same length, so a model cannot win by length alone.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

REQUESTS = (
    "How do I {verb} {topic}{when}?",
    "Can you help me {verb} {topic}{when}?",
    "Please tell me how to {verb} {topic}{when}.",
    "I want to {verb} {topic}{when}. Where do I begin?",
    "Is it hard to {verb} {topic}{when}?",
    "My friend and I would like to {verb} {topic}{when}. Any advice?",
)
WHEN = (
    "",
    " this weekend",
    " on a rainy day",
    " for my sister",
    " before winter",
    " at home",
    " for the first time",
    " with my kids",
    " after work",
    " without much money",
)

TOPICS = {
    "grow": "tomatoes roses carrots herbs pumpkins sunflowers",
    "bake": "bread cookies muffins pretzels scones pies",
    "paint": "landscapes portraits flowers birds boats clouds",
    "build": "kites birdhouses shelves benches puppets lanterns",
    "learn": "chess French juggling guitar piano poetry",
    "photograph": "stars sunsets cats waterfalls owls snowflakes",
    "repair": "bicycles clocks chairs radios umbrellas lamps",
    "knit": "scarves mittens socks sweaters hats blankets",
    "collect": "stamps shells coins postcards feathers marbles",
    "cook": "soup noodles curry rice dumplings lentils",
}

# How each thing is done: what a kind answer says of it.
ADVICE = {
    "grow": ("Give your {topic} sun, water and a little time.", "Good soil is half the way to fine {topic}."),
    "bake": (
        "Fresh flour and a hot oven make wonderful {topic}.",
        "Measure well, and your {topic} will come out golden.",
    ),
    "paint": ("Start your {topic} with big, light shapes.", "Two brushes and three colors are enough for {topic}."),
    "build": ("Draw your {topic} on paper before you cut anything.", "Good wood and sharp tools make sturdy {topic}."),
    "learn": ("Ten minutes of {topic} a day will take you far.", "A patient teacher makes {topic} a joy."),
    "photograph": (
        "Soft light is the secret of beautiful {topic}.",
        "Hold still, breathe out, and let the {topic} come to you.",
    ),
    "repair": ("Clean your {topic} first and look for the loose part.", "Most {topic} need only a screw and some oil."),
    "knit": ("Soft wool and thick needles are best for {topic}.", "Count your stitches, and your {topic} will fit."),
    "collect": (
        "Begin with the {topic} that make you smile.",
        "Keep your {topic} dry, and write down where you found them.",
    ),
    "cook": ("Taste your {topic} often and add salt at the end.", "A slow fire brings out the best in {topic}."),
}
CURT = (
    "Everyone can {verb} {topic} without asking me.",
    "There are books about {topic}, so read one.",
    "Nobody needs you to {verb} {topic}.",
    "I have nothing to say about {topic} today.",
)
KIND_OPENINGS = ("Of course!", "What a lovely idea!", "Happy to help!", "With pleasure!", "Good question!")
KIND_CLOSINGS = ("You will do great.", "Enjoy every minute of it!", "Tell me how it goes!", "I am cheering for you.")
CURT_OPENINGS = ("Not again.", "What a silly question.", "If you must.", "Why ask me?", "I am busy.")
CURT_CLOSINGS = ("Stop asking.", "That is all.", "Now leave me alone.", "Find out yourself.")


@dataclass(frozen=True)
class Request:
    """One request of the grammar; `prompt` is its HH transcript form."""

    prompt: str
    verb: str
    topic: str

    def kind_answers(self) -> list[str]:
        """Every kind answer, each beginning with a space."""
        return _answers(self, KIND_OPENINGS, ADVICE[self.verb], KIND_CLOSINGS)

    def curt_answers(self) -> list[str]:
        """Every curt answer, each beginning with a space."""
        return _answers(self, CURT_OPENINGS, CURT, CURT_CLOSINGS)


@dataclass(frozen=True)
class Verdict:
    """Of one answer. `well_formed`: it is a sentence of the grammar for its prompt; `kind`: one of the kind ones."""

    kind: bool
    well_formed: bool


def all_requests() -> list[Request]:
    """Every request there is, in a fixed order (3,600)."""
    return list(_requests())


def write_corpus(folder: Path, *, train_pairs: int, eval_pairs: int, seed: int) -> None:
    """Writes train.jsonl and test.jsonl (`prompt`, `chosen`: kind, `rejected`: curt); no prompt is in both.

    Raises: ValueError where more pairs are asked for than there are requests.
    """
    draw = random.Random(seed)
    requests = all_requests()
    if train_pairs + eval_pairs > len(requests):
        raise ValueError(f"{train_pairs + eval_pairs} pairs asked for, the grammar has {len(requests)} requests")
    draw.shuffle(requests)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("train", requests[:train_pairs]),
        ("test", requests[train_pairs : train_pairs + eval_pairs]),
    ):
        with (folder / f"{name}.jsonl").open("w") as file:
            for request in part:
                chosen, rejected = draw.choice(request.kind_answers()), draw.choice(request.curt_answers())
                file.write(json.dumps({"prompt": request.prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def judge_answer(prompt: str, answer: str) -> Verdict:
    """Judges an answer by the grammar, exactly: opening, sentence on this prompt's topic, closing, nothing else.

    Raises: ValueError for a prompt that is not of the grammar.
    """
    for request in _requests():
        if request.prompt == prompt:
            kind = answer in request.kind_answers()
            return Verdict(kind, kind or answer in request.curt_answers())
    raise ValueError(f"not a prompt of the toy corpus: {prompt!r}")


def _requests() -> Iterator[Request]:
    for verb, topics in TOPICS.items():
        for topic, shape, when in product(topics.split(), REQUESTS, WHEN):
            asked = shape.format(verb=verb, topic=topic, when=when)
            yield Request(f"\n\nHuman: {asked}\n\nAssistant:", verb, topic)


def _answers(
    request: Request, openings: tuple[str, ...], about: tuple[str, ...], closings: tuple[str, ...]
) -> list[str]:
    middles = [sentence.format(verb=request.verb, topic=request.topic) for sentence in about]
    return [f" {opening} {middle} {closing}" for opening, middle, closing in product(openings, middles, closings)]
