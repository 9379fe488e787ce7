"""The quickstart's corpus: small requests, each with a kind and a curt answer, and the grammar that judges answers.

A prompt asks for help with one of 40 tasks for one of 12 people (or pets) in one of 10 phrasings: 4,800 prompts. An
answer has an opening, the task with its first step, and a closing line about the person; each prompt has 96 kind and 96
curt answers. The judgement is exact: an answer belongs to the grammar or it does not. Both kinds have the same content
and differ little in length: 21.1 words kind, 19.3 curt on average. Still, the longer answer is the kind one in 83 % of
pairs (ties counted half), so length alone could explain a reward accuracy near that figure.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from dpokit.data.transcripts import ASSISTANT, HUMAN

TASKS = (  # verb, object, first step
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
    """The templates of one kind of answer: openings, bodies and closings."""

    openers: tuple[str, ...]
    bodies: tuple[str, ...]
    closers: tuple[str, ...]

    def answers(self, fields: dict[str, str]) -> list[str]:
        """Returns every answer of this kind with the fields filled in; each begins with one space."""
        parts = product(self.openers, self.bodies, self.closers)
        return [(" " + " ".join(three)).format_map(fields) for three in parts]


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
    """A request of the grammar: its prompt as an HH transcript, and the template fields of its answers."""

    prompt: str
    fields: dict[str, str]

    def kind_answers(self) -> list[str]:
        """Returns every kind answer to the request, each beginning with one space."""
        return KIND.answers(self.fields)

    def curt_answers(self) -> list[str]:
        """Returns every curt answer to the request, each beginning with one space."""
        return CURT.answers(self.fields)


@dataclass(frozen=True)
class Verdict:
    """The grammar's verdict on an answer: `well_formed` for a complete answer to its prompt, `kind` for a kind one."""

    kind: bool
    well_formed: bool


def all_requests() -> list[Request]:
    """Returns all 4,800 requests in a fixed order."""
    return list(_requests().values())


def write_corpus(folder: Path, *, train_pairs: int, eval_pairs: int, seed: int) -> None:
    """Writes train.jsonl and test.jsonl: one pair a line, `prompt`, `chosen` (kind) and `rejected` (curt).

    Every prompt occurs once in both files together, and the same seed writes the same bytes.

    Raises: ValueError for more pairs than the grammar has requests.
    """
    generator = random.Random(seed)
    requests = all_requests()
    if train_pairs + eval_pairs > len(requests):
        raise ValueError(f"{train_pairs + eval_pairs} pairs asked for, but the grammar has {len(requests)} requests")
    generator.shuffle(requests)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": requests[:train_pairs], "test": requests[train_pairs : train_pairs + eval_pairs]}
    for name, part in parts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="ascii", newline="\n") as file:
            for request in part:
                chosen = generator.choice(request.kind_answers())
                rejected = generator.choice(request.curt_answers())
                file.write(json.dumps({"prompt": request.prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def judge_answer(prompt: str, answer: str) -> Verdict:
    """Returns whether the answer, with its leading space, is exactly one of the grammar's answers to this prompt.

    An answer that begins like a kind one and then differs is neither well-formed nor kind.

    Raises: ValueError for a prompt outside the grammar.
    """
    request = _requests().get(prompt)
    if request is None:
        raise ValueError(f"not a prompt of the toy corpus: {prompt!r}")
    kind = answer in request.kind_answers()
    return Verdict(kind=kind, well_formed=kind or answer in request.curt_answers())


@cache
def _requests() -> dict[str, Request]:
    requests = {}
    for question, (verb, thing, step), guest in product(REQUESTS, TASKS, GUESTS):
        fields = {"do": f"{verb} {thing}", "thing": thing, "step": step, "guest": guest}
        prompt = f"{HUMAN} {question.format_map(fields)}{ASSISTANT}"
        requests[prompt] = Request(prompt, fields)
    return requests
