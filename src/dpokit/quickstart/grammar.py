"""The quickstart's corpus: small requests, each with a kind and a curt answer, and the grammar that judges answers.

A prompt asks for help with one of 40 tasks for one of 12 people (or pets) in one of 10 shapes: 4,800 prompts. An answer
opens, names the task and its first step, and closes with a line about who it is for; 96 kind and 96 curt answers fit
each prompt. Nothing is estimated: an answer belongs to the grammar or it does not. Both kinds say the
same and differ little in length: 21.1 words kind, 19.3 curt on average. That is not nothing: the longer answer is the
kind one in 83 % of pairs (ties counted half), so a reward accuracy near that figure would prove no more than length.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from dpokit.data.formats import ASSISTANT, HUMAN

TASKS = (  # what to do, with what, and the first step towards it
    ("bake", "a lemon cake", "whisk three eggs"),
    ("bake", "an apple pie", "chill the dough"),
    ("bake", "a loaf of bread", "wake up the yeast"),
    ("brew", "a pot of tea", "warm the pot"),
    ("build", "a bird house", "saw six small boards"),
    ("build", "a sand castle", "wet the sand well"),
    ("carve", "a wooden spoon", "find a dry branch"),
    ("cook", "a pumpkin soup", "roast the pumpkin"),
    ("cook", "a cheese omelet", "heat the pan gently"),
    ("draw", "a funny horse", "sketch a round belly"),
    ("fix", "a flat tire", "look for the nail"),
    ("fly", "a red kite", "wait for a steady wind"),
    ("fold", "a paper crane", "crease a square sheet"),
    ("fold", "a party hat", "roll the paper up"),
    ("frame", "an old photo", "measure the edges"),
    ("grow", "a tomato plant", "pick a sunny window"),
    ("host", "a game night", "set out some snacks"),
    ("knit", "a warm scarf", "choose a soft yarn"),
    ("learn", "a card trick", "practice the shuffle"),
    ("light", "a camp fire", "stack the driest twigs"),
    ("make", "a snow globe", "save an empty jar"),
    ("make", "a wind chime", "collect some old keys"),
    ("mix", "a berry smoothie", "freeze the berries"),
    ("pack", "a picnic basket", "wrap the sandwiches"),
    ("paint", "a tiny teapot", "wash off the dust"),
    ("pitch", "a big tent", "clear away the stones"),
    ("plan", "a garden party", "check the weather"),
    ("plant", "an oak tree", "dig a wide hole"),
    ("play", "a guitar song", "tune every string"),
    ("polish", "a silver ring", "mix salt and water"),
    ("sew", "a rag doll", "cut two cloth circles"),
    ("shape", "a clay bowl", "wet your hands"),
    ("sing", "a sea song", "hum the tune slowly"),
    ("stuff", "a teddy bear", "buy a bag of cotton"),
    ("tell", "a bedtime story", "invent a sleepy dragon"),
    ("tie", "a bow tie", "stand before a mirror"),
    ("toss", "a fruit salad", "slice the ripest mango"),
    ("train", "a pet snail", "learn some patience"),
    ("weave", "a flower crown", "gather some daisies"),
    ("write", "a short poem", "recall one happy day"),
)
GUESTS = (
    *("aunt", "boss", "brother", "cat", "cousin", "friend"),
    *("grandmother", "neighbor", "parrot", "roommate", "sister", "teacher"),
)
REQUESTS = (
    "How do I {do} for my {guest}?",
    "Can you help me {do} for my {guest}?",
    "Please tell me how to {do} for my {guest}.",
    "I want to {do} for my {guest}. Where do I begin?",
    "What is the best way to {do} for my {guest}?",
    "Hello! I would like to {do} for my {guest}. Any tips?",
    "I promised my {guest} to {do}. What comes first?",
    "My {guest} is coming over, and I should {do}. How?",
    "Could you teach me to {do}? It is for my {guest}.",
    "It is a surprise for my {guest}: how can I {do}?",
)


@dataclass(frozen=True)
class Manner:
    """How an answer of one kind opens, what it says, and how it closes."""

    openers: tuple[str, ...]
    bodies: tuple[str, ...]
    closers: tuple[str, ...]

    def answers(self, words: dict[str, str]) -> list[str]:
        """Every answer of this manner that these words make, each beginning with one space."""
        parts = product(self.openers, self.bodies, self.closers)
        return [(" " + " ".join(three)).format_map(words) for three in parts]


KIND = Manner(
    openers=(
        "Of course!",
        "Happy to help!",
        "With pleasure!",
        "What a lovely idea!",
        "Great question!",
        "How sweet of you!",
    ),
    bodies=(
        "To {do}, you just {step} first.",
        "For {thing}, it is best to {step}.",
        "First {step}, and soon you will have {thing}.",
        "The secret of {thing} is to {step}.",
    ),
    closers=(
        "Your {guest} will love it!",
        "Have fun, and greet your {guest}!",
        "Your {guest} is lucky to have you.",
        "I am sure your {guest} will smile!",
    ),
)
CURT = Manner(
    openers=(
        "If I must.",
        "Oh, this again.",
        "Look it up.",
        "I was asleep.",
        "You ask too much.",
        "Fine, whatever.",
    ),
    bodies=(
        "To {do}, {step}, obviously.",
        "It is only {thing}, so {step}.",
        "Anyone can {do}: just {step}.",
        "Go and {step}, then leave {thing} to others.",
    ),
    closers=(
        "Your {guest} will not notice.",
        "Next time, bother your {guest}.",
        "Your {guest} has seen better.",
        "Tell your {guest} I am busy.",
    ),
)


@dataclass(frozen=True)
class Request:
    """One request of the grammar: its prompt, in the HH transcript form, and the words that its answers name."""

    prompt: str
    words: dict[str, str]

    def kind_answers(self) -> list[str]:
        """Every kind answer to it, each beginning with one space."""
        return KIND.answers(self.words)

    def curt_answers(self) -> list[str]:
        """Every curt answer to it, each beginning with one space."""
        return CURT.answers(self.words)


@dataclass(frozen=True)
class Verdict:
    """What the grammar says of an answer: `well_formed`, it is a whole answer to its prompt; `kind`, and a kind one."""

    kind: bool
    well_formed: bool


def all_requests() -> list[Request]:
    """Every request there is, in a fixed order (4,800)."""
    return list(_requests().values())


def write_corpus(folder: Path, *, train_pairs: int, eval_pairs: int, seed: int) -> None:
    """Writes train.jsonl and test.jsonl: one pair a line, `prompt`, `chosen` (kind) and `rejected` (curt).

    No prompt is met twice, in one file or in both, and the same seed writes the same bytes.

    Raises: ValueError where more pairs are asked for than there are requests.
    """
    draw = random.Random(seed)
    requests = all_requests()
    if train_pairs + eval_pairs > len(requests):
        raise ValueError(f"{train_pairs + eval_pairs} pairs asked for, the grammar has {len(requests)} requests")
    draw.shuffle(requests)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": requests[:train_pairs], "test": requests[train_pairs : train_pairs + eval_pairs]}
    for name, part in parts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="ascii", newline="\n") as file:
            for request in part:
                chosen, rejected = draw.choice(request.kind_answers()), draw.choice(request.curt_answers())
                file.write(json.dumps({"prompt": request.prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def judge_answer(prompt: str, answer: str) -> Verdict:
    """Whether the whole answer, its leading space included, is one that the grammar has for this prompt.

    An answer that begins kindly and breaks later is neither well-formed nor kind.

    Raises: ValueError for a prompt that is not of the grammar.
    """
    request = _requests().get(prompt)
    if request is None:
        raise ValueError(f"not a prompt of the toy corpus: {prompt!r}")
    kind = answer in request.kind_answers()
    return Verdict(kind=kind, well_formed=kind or answer in request.curt_answers())


@cache
def _requests() -> dict[str, Request]:
    found = {}
    for asked, (verb, thing, step), guest in product(REQUESTS, TASKS, GUESTS):
        words = {"do": f"{verb} {thing}", "thing": thing, "step": step, "guest": guest}
        prompt = f"{HUMAN} {asked.format_map(words)}{ASSISTANT}"
        found[prompt] = Request(prompt, words)
    return found
