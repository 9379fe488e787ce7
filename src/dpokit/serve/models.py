"""Who answers: base and tuned, loaded here, or kept by an endpoint."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from dpokit.data.formats import Messages, UnusableError
from dpokit.data.tokens import Renderer
from dpokit.model.base_and_tuned import Sides, find_names, find_run, load_sides, read_run_defaults
from dpokit.model.check import ADAPTER_FILE, WEIGHTS, check_weights_file
from dpokit.model.generate import stream_answer
from dpokit.model.load import find_base, name_model
from dpokit.model.score import PairScorer
from dpokit.rundir import RunDir
from dpokit.serve.request_limits import RefusedError, Sampling
from dpokit.settings.load import load_settings

SHOW_SECONDS = 0.03  # between two looks at an answer on its way: each decodes it from its beginning


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: as far as it is there.
        tokens: how many; 0 where an endpoint does not say.
        ended: by the model; else by the limit, or stopped, or not yet.
        ids: its tokens; None from an endpoint.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = False
    ids: tuple[int, ...] | None = None


class Models(Protocol):
    """One or two models that answer.

    Attributes:
        names: of `base` and `tuned`, or of `tuned` alone.
        run: the run's folder; None where models were named.
        workers: questions that are answered at once.
    """

    names: Mapping[str, str]
    run: RunDir | None
    workers: int

    def load(self) -> None:
        """Called once, before anything is asked. Raises: DpokitError: what the user can mend."""

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: Sampling,
        *,
        on_text: Callable[[Reply], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        """The answer of one side; `on_text` gets it on its way. Raises: RefusedError where there is no room for it."""

    def find_rewards(self, messages: Messages, replies: Mapping[str, Reply]) -> dict[str, float] | None:
        """beta * (log p_tuned - log p_base) of each answer; None where that cannot be known, or is no number."""


class LocalModels:
    """Base and tuned, loaded here: of an adapter one copy of the base, and the adapter switched.

    Safetensors only, and no code that comes with a model.

    Args:
        what: a run folder, or a model: a folder or a Hub id, of a whole model or an adapter.
        base: what stands beside it; None for the run's own, or the adapter's.
        argv: training flags, over the run's settings: --dtype bfloat16.

    Raises: DpokitError: a run without weights, unknown settings.
    """

    workers = 1

    def __init__(self, what: str, base: str | None, argv: Sequence[str] = ()) -> None:
        self.run, self.record = find_run(what)
        defaults = {name: value for name, value in read_run_defaults(self.record, what).items() if value is not None}
        given = [] if base is None else ["--model_name_or_path", base]
        self.settings = load_settings("serve", defaults | {"trust_remote_code": False}, [*given, *argv])
        self.settings.training.trust_remote_code = False
        tuned, beside = find_names(self.settings, self.run, what, base)
        self.names: Mapping[str, str] = {"tuned": tuned} if beside is None else {"base": beside, "tuned": tuned}
        self._what, self._base = what, base
        self._sides: Sides | None = None

    def check_files(self) -> None:
        """Raises ModelError where weights are not there, or not as safetensors; nothing is loaded."""
        for name in self.names.values():
            asked = name_model(self.settings, name)
            base = find_base(asked)
            check_weights_file(name, asked.model_revision, WEIGHTS if base is None else (ADAPTER_FILE,))
            if base is not None:
                check_weights_file(base, "main")

    def load(self) -> None:
        """Loads both. Raises: DpokitError."""
        sides = load_sides(self.settings, self.run, self._what, self._base)
        self.renderer = Renderer(sides.tokenizer)
        config = sides.tuned.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        if "base" in self.names:
            pad_id, longest = int(sides.tokenizer.pad_token_id), self.positions
            self._tuned = PairScorer(sides.tuned, pad_id=pad_id, longest=longest)
            self._beside = self._tuned
            if sides.base is not None:
                self._beside = PairScorer(sides.base, pad_id=pad_id, longest=longest)
        self._sides = sides

    @property
    def sides(self) -> Sides:
        """The loaded models."""
        assert self._sides is not None, "load() comes first"
        return self._sides

    def _as(self, side: str) -> AbstractContextManager[Any]:
        return self.sides.as_base() if side == "base" else nullcontext(self.sides.tuned)

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: Sampling,
        *,
        on_text: Callable[[Reply], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        """As `Models`; equal to `generate_answers` of the rendered conversation with the same seed.

        An answer ends where the model has no room for more.
        """
        prompt = self.encode(messages)
        room = sampling.max_new_tokens if self.positions is None else self.positions - len(prompt)
        if room < 1:
            raise RefusedError(
                f"The conversation has {len(prompt):,} tokens, and the model has room for {self.positions:,}, its "
                "answer among them: begin a new one, or ask in fewer words."
            )
        ids: list[int] = []
        shown = 0.0

        def show(token: int) -> None:
            nonlocal shown
            ids.append(token)
            if time.monotonic() - shown >= SHOW_SECONDS:
                on_text(Reply(self._decode(ids), len(ids)))
                shown = time.monotonic()

        with self._as(side) as model:
            answer = stream_answer(
                model,
                self.sides.tokenizer,
                prompt,
                max_new_tokens=min(sampling.max_new_tokens, room),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                on_token=show,
                is_stopped=is_stopped,
            )
        return Reply(answer.text.strip(), len(answer.ids), answer.ended, answer.ids)

    def encode(self, messages: Messages) -> list[int]:
        """The conversation as training would have it: by the model's template, else as an HH transcript.

        Control words in its messages stay text. Raises: RefusedError where the template refuses it.
        """
        try:
            return self.renderer.encode_messages(messages)
        except UnusableError as error:
            if str(error) == "control_word":
                raise RefusedError("The conversation holds a character that this model takes for a command.") from error
            raise RefusedError("The model's chat template refuses this conversation: begin a new one.") from error

    def _decode(self, ids: Sequence[int]) -> str:
        text = str(self.sides.tokenizer.decode(ids, skip_special_tokens=True))
        return text.strip().removesuffix("\ufffd")  # a character whose other tokens are still to come

    def find_rewards(self, messages: Messages, replies: Mapping[str, Reply]) -> dict[str, float] | None:
        """As `Models`: with the run's beta, of the answers' own tokens and the end of those that the model ended.

        None of a run that was trained on examples: it has no beta.
        """
        if self.settings.kind != "dpo":
            return None
        end = self.renderer.encode([self.renderer.tail])[0]
        ids = {side: [*(reply.ids or ()), *(end if reply.ended else ())] for side, reply in replies.items()}
        if set(ids) != {"base", "tuned"} or not all(ids.values()):
            return None
        pair = {"prompt_ids": self.encode(messages), "chosen_ids": ids["tuned"], "rejected_ids": ids["base"]}
        tuned = self._tuned([pair])
        with self.sides.as_base():
            base = self._beside([pair])
        rewards = float(self.settings.training.beta) * (tuned - base).double()[:, 0]
        found = {"tuned": float(rewards[0]), "base": float(rewards[1])}
        return found if all(map(math.isfinite, found.values())) else None
