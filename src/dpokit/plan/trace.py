"""Traces the memory of one worst-case step on fake tensors: with the real model, adapter, checkpointing and loss.

torch's fake tensors have shapes, dtypes and lifetimes, but no data. A step of an 8B model takes seconds on a laptop. A
ledger counts the bytes that would be alive at each moment.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from trl.kernels import ChunkedLogProbFunction  # the head that DPOTrainer installs

from dpokit.model.packed_rows import Group, Packed
from dpokit.model.score import find_obstacle
from dpokit.model.shared_prefix import NAME
from dpokit.plan.blueprint import Blueprint, fill_with_fakes, list_tensors, one_block_of_each_kind
from dpokit.plan.memory_ledger import Ledger
from dpokit.plan.optimizer_memory import count_state_bytes
from dpokit.settings.load import Settings

TILE_TOKENS = 4096  # TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py
TILE_VOCABULARY = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPOTrainer reads from the policy's head


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch.

    Attributes:
        pairs: number of pairs.
        row_tokens: tokens of each of the `2 * pairs` padded rows.
        answer_tokens: answer tokens of all rows together.
        lengths: tokens of prompt, chosen and rejected answer of each pair, if both answers share the prompt.
    """

    pairs: int
    row_tokens: int
    answer_tokens: int
    lengths: tuple[tuple[int, int, int], ...] = ()

    @property
    def groups(self) -> list[Group]:
        """Lengths as in `packed_rows.Packed`: a branch is the prompt's last token and the answer without its last."""
        return [(prompt - 1, (chosen, rejected)) for prompt, chosen, rejected in self.lengths]

    @property
    def positions(self) -> int:
        """Tokens that the backbone computes."""
        return sum(shared + sum(branches) for shared, branches in self.groups) or 2 * self.pairs * self.row_tokens


@dataclass(frozen=True)
class StepMemory:
    """The memory of a traced step, in bytes.

    Attributes:
        weights: all weights of the policy.
        reference: a reference model in memory.
        trained: the trained weights.
        states: the optimizer states.
        peak: the most bytes alive at once; `at_peak` is the peak by kind.
        moments: see `Ledger`.
    """

    weights: int
    reference: int
    trained: int
    states: int
    peak: int
    at_peak: dict[str, int]
    moments: dict[int, tuple[int, int]]


# Operations in fp32 under CUDA's autocast, but not under the CPU's (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32).
FP32_ON_CUDA = {
    *(torch.nn.functional.layer_norm, torch.layer_norm, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__),
    *(torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax, torch.nn.functional.log_softmax),
    *(torch.exp, torch.rsqrt, torch.Tensor.exp, torch.Tensor.rsqrt, torch.nn.functional.softplus),
}


class CudaAutocast(TorchFunctionMode):
    """Makes the CPU's autocast, under which the trace runs, compute in fp32 what CUDA's autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_widen(value) for value in args)
        return func(*args, **(kwargs or {}))


def _widen(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


class GpuHead(torch.autograd.Function):
    """Log-probs `(tokens,)` of answer tokens, from hidden states `(tokens, width)` and a head `(vocabulary, width)`.

    TRL computes them in tiles with Triton kernels (trl/kernels/chunked_logprob.py, TRL 1.16), which need a GPU. This
    class allocates the same tensors in the same order and keeps them as long.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Allocates the statistics of each token, one tile of logits and one chunk of the head in the compute dtype."""
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        statistics = [torch.empty(len(hidden)) for _ in range(7)]
        tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_VOCABULARY, dtype=compute)
        chunk = weight[:TILE_VOCABULARY].to(compute)
        ctx.save_for_backward(hidden, weight, *statistics[:2])
        ctx.compute = compute
        del tile, chunk
        return torch.empty(len(hidden))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004 - only its shape matters
        """Allocates the gradients, which TRL sums in fp32 for inputs of any dtype, and each tile once more."""
        hidden, weight, *_ = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        grad_hidden = torch.empty(hidden.shape) if needs_hidden else None
        grad_weight = torch.empty(weight.shape) if needs_weight else None
        tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_VOCABULARY, dtype=ctx.compute)
        chunk = weight[:TILE_VOCABULARY].to(ctx.compute)
        del tile, chunk
        return (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
        )


def trace_step(
    blueprint: Blueprint,
    settings: Settings,
    *,
    train: Shape,
    evaluation: Shape | None,
    autocast: torch.dtype | None,
    on_gpu: bool,
) -> StepMemory:
    """Traces the last micro-batch of a later step, then one batch of the evaluation.

    Optimizer states are allocated before it, as from the second step on. With several micro-batches, so are the
    gradients that the earlier ones have left. No other micro-batch has more in memory at once.

    Args:
        blueprint: the models; the trace fills them with fake tensors, after which nothing else can use them.
        settings: the run's settings.
        train: the largest micro-batch of the training.
        evaluation: the largest batch of the evaluation; None without evaluation.
        autocast: the compute dtype of mixed precision; None without it.
        on_gpu: whether to trace the head and the autocast of a GPU.
    """
    ledger = Ledger()
    with FakeTensorMode(), ExitStack() as stack:
        step = _Step(blueprint, settings, ledger, autocast=autocast, on_gpu=on_gpu)
        if on_gpu and autocast is not None:
            stack.enter_context(CudaAutocast())
        stack.enter_context(ledger)
        if settings.training.precompute_ref_log_probs:
            step.precompute(train)
        step.add_states()
        if settings.training.gradient_accumulation_steps > 1:
            step.add_gradients()
        step.forward_and_backward(train)
        step.free_gradients()
        if evaluation is not None:
            step.evaluate(evaluation)
    trained = sum(p.numel() * p.element_size() for p in step.trained)
    return StepMemory(
        weights=step.weights,
        reference=step.reference_bytes,
        trained=trained,
        states=sum(state.numel() for state in step.states),
        peak=ledger.peak_bytes,
        at_peak=ledger.at_peak,
        moments=ledger.moments,
    )


class _Step:
    """The parts of a step on fake tensors, in the order of `DPOTrainer._compute_loss` (TRL 1.16)."""

    def __init__(
        self, blueprint: Blueprint, settings: Settings, ledger: Ledger, *, autocast: torch.dtype | None, on_gpu: bool
    ) -> None:
        self.policy: Any = blueprint.policy
        self.reference: Any = blueprint.reference
        self.settings = settings
        self.ledger = ledger
        self.autocast = autocast
        self.on_gpu = on_gpu
        self.states: list[torch.Tensor] = []
        self.shares = settings.data.shared_prefix and find_obstacle(self.policy, settings.training.max_length) is None
        self.weights = self._fill(self.policy, "weights")
        self.reference_bytes = 0 if self.reference is None else self._fill(self.reference, "reference")
        self.trained: list[nn.Parameter] = [p for p in self.policy.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.relabel(p.grad, "gradients"))
        training = settings.training
        if training.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(training.gradient_checkpointing_kwargs)
            if settings.model.use_peft:
                self.policy.enable_input_require_grads()

    def _fill(self, model: Any, kind: str) -> int:
        """Fills the weights with fake tensors, and adds hooks that separate the backbone's memory from the head's."""
        fill_with_fakes(model, self.settings)
        for tensor in list_tensors(model):
            self.ledger.hold(tensor, kind)
        causal_lm = model.get_base_model() if self.settings.model.use_peft and kind == "weights" else model
        if self.shares:
            causal_lm.set_attn_implementation(NAME)
        causal_lm.base_model.register_forward_pre_hook(lambda *_: self._set_kind("activations"))
        causal_lm.base_model.register_forward_hook(lambda _, __, output: self._leave_backbone(output))
        return self.ledger.by_kind[kind]

    def _set_kind(self, kind: str) -> None:
        self.ledger.kind = kind

    def _leave_backbone(self, output: Any) -> None:
        self._set_kind("logits")
        if output.last_hidden_state.requires_grad:  # backward leaves the head at this tensor
            output.last_hidden_state.register_hook(lambda _: self._set_kind("activations"))

    def _score(self, model: Any, shape: Shape) -> torch.Tensor:
        """Returns the answer tokens' log-probs `(answer tokens,)`, of the backbone and TRL's head."""
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal_lm.base_model(**self._lay_out(shape), use_cache=False).last_hidden_state
        width = hidden.shape[-1]
        hidden = hidden.reshape(-1, width) if self.shares and shape.lengths else hidden[:, :-1].reshape(-1, width)
        answers = hidden[: shape.answer_tokens].clone()  # TRL selects them with a mask, which copies them
        head = causal_lm.get_output_embeddings()
        if self.on_gpu:
            return GpuHead.apply(answers, head.weight)  # type: ignore[no-untyped-call]  # torch has no types for apply
        targets = torch.zeros(len(answers), dtype=torch.long)
        outputs = HEAD_OUTPUTS if model is self.policy else HEAD_OUTPUTS[:1]
        scored = ChunkedLogProbFunction.apply(
            answers, head.weight, head.bias, targets, 1.0, TILE_VOCABULARY, None, 1.0, outputs
        )
        return scored[0]

    def _lay_out(self, shape: Shape) -> dict[str, Any]:
        if not (self.shares and shape.lengths):
            ids = torch.zeros(2 * shape.pairs, shape.row_tokens, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.zeros(1, shape.positions, dtype=torch.long)
        packed = Packed(ids, ids, ids[0], ids, ids[0], ids[0], ids[0], ids[0], ids[0], shape.groups)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "packed": packed}

    @contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=self.autocast) if self.autocast is not None else nullcontext():
            yield

    def _score_by_reference(self, shape: Shape) -> None:
        adapter_off: Callable[[], Any] = getattr(self.policy, "disable_adapter", nullcontext)
        model = self.policy if self.reference is None else self.reference
        switch = nullcontext() if self.reference is not None else adapter_off()
        with torch.no_grad(), switch, one_block_of_each_kind(model):
            self._score(model, shape)

    def precompute(self, shape: Shape) -> None:
        """Traces the reference's pass over the rows, before the first step."""
        self.policy.eval()
        with self._mixed_precision():
            self._score_by_reference(shape)

    def forward_and_backward(self, shape: Shape) -> None:
        """Traces one micro-batch. The backward pass begins in the head."""
        self.policy.train()
        self._set_kind("activations")
        with self._mixed_precision():
            log_probs = self._score(self.policy, shape)
            if not self.settings.training.precompute_ref_log_probs:
                self._score_by_reference(shape)
            loss = log_probs.sum()
        del log_probs
        self._set_kind("logits")
        loss.backward()

    def add_states(self) -> None:
        """Allocates the optimizer states."""
        self._set_kind("optimizer")
        for parameter in self.trained:
            size = count_state_bytes(self.settings.training.optim, parameter)
            self.states += [torch.zeros(part, dtype=torch.uint8) for part in (size // 2, size - size // 2)]

    def add_gradients(self) -> None:
        """Allocates the gradients of earlier micro-batches."""
        self._set_kind("gradients")
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def free_gradients(self) -> None:
        """Frees the gradients, as the optimizer's step does."""
        for parameter in self.trained:
            parameter.grad = None

    def evaluate(self, shape: Shape) -> None:
        """Traces a batch of held-out pairs: without gradients, but often with more pairs."""
        self.policy.eval()
        self._set_kind("activations")
        # Autocast keeps a 16-bit copy of each trained weight until the pass ends, so there every block counts.
        blocks = one_block_of_each_kind(self.policy) if self.autocast is None else nullcontext()
        with torch.no_grad(), self._mixed_precision():
            with blocks:
                self._score(self.policy, shape)
            if not self.settings.training.precompute_ref_log_probs:
                self._score_by_reference(shape)
