"""The models that answer: base and tuned, loaded in this process."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from dpokit.data.messages import Messages, UnusableError
from dpokit.data.rendering import Renderer
from dpokit.model.base_and_tuned import Sides, find_names, find_run, load_sides, read_run_defaults
from dpokit.model.check import ADAPTER_FILE, WEIGHTS, check_weights_file
from dpokit.model.generate import stream_answer
from dpokit.model.gguf import find_model_folder
from dpokit.model.load import find_base, name_model
from dpokit.model.score import PairScorer
from dpokit.rundir import RunDir
from dpokit.serve.request_limits import RefusedError, SamplingSettings
from dpokit.settings.load import load_settings

SHOW_SECONDS = 0.03  # between two updates of a growing answer: each decodes it from its beginning


@dataclass(frozen=True)
class ModelReply:
    """An answer, complete or so far.

    Attributes:
        text: the text so far.
        tokens: the number of tokens; 0 if an endpoint does not report it.
        ended: whether the model ended it; else the limit cut it, it was stopped, or it still grows.
        ids: its token ids; None from an endpoint.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = False
    ids: tuple[int, ...] | None = None


class Models(Protocol):
    """One or two models that answer.

    Attributes:
        names: the model names of the sides `base` and `tuned`, or of `tuned` alone.
        run: the run's folder; None if the user named models.
        workers: the number of questions that are answered at once.
    """

    names: Mapping[str, str]
    run: RunDir | None
    workers: int

    def load(self) -> None:
        """Loads the models; called once, before the first question. Raises: DpokitError that the user can correct."""

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: SamplingSettings,
        *,
        on_text: Callable[[ModelReply], None],
        is_stopped: Callable[[], bool],
    ) -> ModelReply:
        """The answer of one side; `on_text` gets it while it grows. Raises: RefusedError if the context is full."""

    def find_rewards(self, messages: Messages, replies: Mapping[str, ModelReply]) -> dict[str, float] | None:
        """beta * (log p_tuned - log p_base) of each answer; None if it cannot be computed or is not finite."""


class LocalModels:
    """Base and tuned, loaded in this process; with an adapter, one copy of the base and the adapter switched on or off.

    It loads safetensors only, and runs no code from a model's repository.

    Args:
        name: a run folder, or a model (folder or Hub id of a full model or an adapter).
        base: the base model; None for the run's or the adapter's own base.
        argv: training flags that override the run's settings: --dtype bfloat16.

    Raises: DpokitError: a run without weights, unknown settings.
    """

    workers = 1

    def __init__(self, name: str, base: str | None, argv: Sequence[str] = ()) -> None:
        self.run, self.record = find_run(name)
        defaults = {key: value for key, value in read_run_defaults(self.record, name).items() if value is not None}
        base_flags = [] if base is None else ["--model_name_or_path", base]
        self.settings = load_settings("serve", defaults | {"trust_remote_code": False}, [*base_flags, *argv])
        self.settings.training.trust_remote_code = False
        tuned, base_name = find_names(self.settings, self.run, name, base)
        self.names: Mapping[str, str] = {"tuned": tuned} if base_name is None else {"base": base_name, "tuned": tuned}
        self._name, self._base = name, base
        self._sides: Sides | None = None

    def check_files(self) -> None:
        """Raises ModelError if weights are missing or not in safetensors; loads nothing."""
        for name in self.names.values():
            arguments = name_model(self.settings, name)
            base = find_base(arguments)
            files = WEIGHTS if base is None else (ADAPTER_FILE,)
            check_weights_file(find_model_folder(name), arguments.model_revision, files)
            if base is not None:
                check_weights_file(find_model_folder(base), "main")

    def load(self) -> None:
        """Loads both models. Raises: DpokitError."""
        sides = load_sides(self.settings, self.run, self._name, self._base)
        self.renderer = Renderer(sides.tokenizer, self.settings.data.template_date, self.settings.data.prompt_format)
        config = sides.tuned.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        if "base" in self.names:
            pad_id, longest = int(sides.tokenizer.pad_token_id), self.positions
            self._tuned_scorer = PairScorer(sides.tuned, pad_id=pad_id, longest=longest)
            self._base_scorer = self._tuned_scorer
            if sides.base is not None:
                self._base_scorer = PairScorer(sides.base, pad_id=pad_id, longest=longest)
        self._sides = sides

    @property
    def sides(self) -> Sides:
        """The loaded models."""
        assert self._sides is not None, "load() must be called first"
        return self._sides

    def _switch_to(self, side: str) -> AbstractContextManager[Any]:
        return self.sides.as_base() if side == "base" else nullcontext(self.sides.tuned)

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: SamplingSettings,
        *,
        on_text: Callable[[ModelReply], None],
        is_stopped: Callable[[], bool],
    ) -> ModelReply:
        """As for `Models`; equal to `generate_answers` of the rendered conversation with the same seed.

        An answer ends when the model's context is full.
        """
        prompt = self.encode(messages)
        room = sampling.max_new_tokens if self.positions is None else self.positions - len(prompt)
        if room < 1:
            raise RefusedError(
                f"The conversation has {len(prompt):,} tokens, and the model has room for {self.positions:,}, "
                "including its answer: start a new conversation, or ask a shorter question."
            )
        ids: list[int] = []
        shown = 0.0

        def show(token: int) -> None:
            nonlocal shown
            ids.append(token)
            if time.monotonic() - shown >= SHOW_SECONDS:
                on_text(ModelReply(self._decode(ids), len(ids)))
                shown = time.monotonic()

        with self._switch_to(side) as model:
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
                ends=self.renderer.ends,
            )
        return ModelReply(answer.text.strip(), len(answer.ids), answer.ended, answer.ids)

    def encode(self, messages: Messages) -> list[int]:
        """The token ids of the conversation, rendered as in training: by the chat template, else as an HH
        transcript, or as it is (`--prompt_format raw`).

        Special tokens in the messages are encoded as text. Raises: RefusedError if the template refuses the messages.
        """
        try:
            return self.renderer.encode_messages(messages)
        except UnusableError as error:
            if str(error) == "control_word":
                raise RefusedError(
                    "The conversation contains a character that this model reads as a special token."
                ) from error
            raise RefusedError("The model's chat template refuses this conversation: start a new one.") from error

    def _decode(self, ids: Sequence[int]) -> str:
        text = str(self.sides.tokenizer.decode(ids, skip_special_tokens=True))
        return text.strip().removesuffix("\ufffd")  # an incomplete character, whose other tokens are still missing

    def find_rewards(self, messages: Messages, replies: Mapping[str, ModelReply]) -> dict[str, float] | None:
        """As for `Models`, with the run's beta, over each answer's tokens and the end token if the model ended it.

        None for a run that was trained on examples (SFT), which has no beta.
        """
        if self.settings.kind != "dpo":
            return None
        end = self.renderer.encode([self.renderer.end])[0]
        ids = {side: [*(reply.ids or ()), *(end if reply.ended else ())] for side, reply in replies.items()}
        if set(ids) != {"base", "tuned"} or not all(ids.values()):
            return None
        pair = {"prompt_ids": self.encode(messages), "chosen_ids": ids["tuned"], "rejected_ids": ids["base"]}
        tuned = self._tuned_scorer([pair])
        with self.sides.as_base():
            base = self._base_scorer([pair])
        rewards = float(self.settings.training.beta) * (tuned - base).double()[:, 0]
        values = {"tuned": float(rewards[0]), "base": float(rewards[1])}
        return values if all(map(math.isfinite, values.values())) else None
