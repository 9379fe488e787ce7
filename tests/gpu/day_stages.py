"""The stages of a GPU day. `day.py` starts each as a process: python day_stages.py STAGE --records FILE --work FOLDER.

A stage is a function that returns its cases by name, or runs and records them itself. Each result is appended to the
records as soon as it is there, so a stage that is cut keeps the cases that it has done.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from day import Records, is_done, summarise
from day_machine import GIB, ROOT, LackError, read_versions

TESTS = ROOT / "tests"
sys.path[1:1] = [str(TESTS), str(TESTS / "model"), str(TESTS / "benchmarks")]

PR_SET_PDEATHSIG = 1
Values = dict[str, Any]
Cases = dict[str, Callable[[], Values]]
PYTHON = [sys.executable]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Context:
    """How a stage runs.

    Attributes:
        stage: its name.
        dry_run: on the CPU, with small shapes.
        work: a folder that is removed at its end.
        records: where results go.
        done: the cases that have a result.
    """

    stage: str
    dry_run: bool
    work: Path
    records: Records
    done: set[str]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def record(self, case: str, **values: Any) -> None:
        self.records.append(stage=self.stage, case=case, **values)

    def attempt(self, case: str, compute: Callable[[], Values]) -> None:
        """Computes a case and records its values, what it lacked, or its error."""
        print(f"-- {case}", flush=True)
        self.record(case, began=True)
        began = time.monotonic()
        try:
            values = compute()
        except LackError as lack:
            values = {"lacked": str(lack)}
        except torch.OutOfMemoryError as error:
            values = {"lacked": f"memory: {' '.join(str(error).split())[:200]}"}
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.record(case, **values, took_seconds=round(time.monotonic() - began, 1))


def import_rows() -> tuple[Path, Callable[[int], list[dict[str, str]]]]:
    """The tokenizer's folder and the reader of HH pairs that the benchmarks use. Raises: LackError without the data."""
    from workloads import TOKENIZER, read_pairs

    if not TOKENIZER.is_dir():
        raise LackError(f"HH rows and GPT-2's tokenizer: {TOKENIZER} does not exist; set DPOKIT_SHARED")
    return TOKENIZER, read_pairs


def wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# -- machine -----------------------------------------------------------------------------------------------------------


def run_machine(context: Context) -> Cases:
    return {"versions": lambda: describe_machine(context), "matrix peak": lambda: measure_peak(context)}


def describe_machine(context: Context) -> Values:
    values: Values = {"python": sys.version.split()[0], **read_versions(), "CPU cores": len(os.sched_getaffinity(0))}
    values["disk, GiB free"] = round(shutil.disk_usage(context.work).free / GIB)
    if not context.dry_run:
        facts = torch.cuda.get_device_properties(0)
        values |= {"GPU": facts.name, "capability": f"{facts.major}.{facts.minor}"}
        values |= {"multiprocessors": facts.multi_processor_count, "GPU GiB": round(facts.total_memory / GIB, 1)}
        values |= {"CUDA of torch": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    return values


def measure_peak(context: Context) -> Values:
    """TFLOP/s of bf16 matrix products (fp32 in a dry run): the best and the median of some rounds."""
    size, products, dtype = (256, 2, torch.float32) if context.dry_run else (8192, 20, torch.bfloat16)
    left, right = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    rates = []
    for _ in range(8):
        wait_for_gpu()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=out)
        wait_for_gpu()
        rates.append(products * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    return {"best": max(rates), "median": statistics.median(rates), "dtype": str(dtype).removeprefix("torch.")}


# -- equality ----------------------------------------------------------------------------------------------------------

# Tokens of prompt, chosen and rejected answer.
PAIR_LENGTHS = [(300, 40, 60), (500, 120, 1), (1, 1, 3), (64, 200, 128)]
SHORT_LENGTHS = [(30, 4, 6), (1, 1, 3), (9, 12, 8)]
LARGEST_IN_FP32 = 1e-4  # nats a token; a wrong mask moves these models by tenths
LARGEST_GRADIENT_IN_FP32 = 1e-3  # of the gradient's length


def list_families() -> dict[str, Any]:
    """Two layers of each family, with the head sizes of real models, so that kernels are those of real models."""
    from transformers import (
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    size = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 1024}
    grouped = size | {"num_key_value_heads": 2}
    return {
        "gpt2": GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=1024),
        "llama": LlamaConfig(**grouped),
        "qwen2": Qwen2Config(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=128),
        "mistral": MistralConfig(**grouped, sliding_window=1024),
        "gemma": GemmaConfig(**grouped, head_dim=256),
        "gpt_neox": GPTNeoXConfig(**size),
    }


def run_equality(context: Context) -> Cases:
    return {family: partial(compare_rows, context, config) for family, config in list_families().items()}


def compare_rows(context: Context, config: Any) -> Values:
    """Distances of packed and padded rows from padded fp32: log-probs in nats a token, gradients as a share.

    `wrong mask` is the distance if the rejected answer sees the chosen one: the equal ones must be far below it.
    """
    from planted_faults import planted
    from test_shared_prefix import build, make_batch

    from dpokit.model import shared_prefix
    from dpokit.model.score import score_tokens, share_prefix

    model = build(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # so that attention matters as much as in a trained model
    model.to(context.device)
    batch = make_batch(SHORT_LENGTHS if context.dry_run else PAIR_LENGTHS)
    batch = {name: tensor.to(context.device) for name, tensor in batch.items()}
    shared = share_prefix(model)
    autocast = partial(torch.autocast, context.device.type, torch.bfloat16)

    def score(*, packed: bool, rounded: bool = False) -> Any:
        with nullcontext() if packed else shared.switched_off():
            return score_with_gradient(model, batch, autocast(enabled=rounded))

    exact = score(packed=False)
    values: Values = {"fp32": find_distances(score(packed=True), exact, batch)}
    with torch.no_grad(), planted("the rejected answer sees the chosen one", model):
        values["wrong mask"] = find_distances((score_tokens(model, batch), {}), exact, batch)[0]
    for name in ("autocast", "bf16"):
        if name == "bf16":
            for weight in model.parameters():  # rotary embeddings stay in fp32, as in a model that is loaded in bf16
                weight.data = weight.data.bfloat16()
        rounded = name == "autocast"
        values[f"{name}, padded"] = find_distances(score(packed=False, rounded=rounded), exact, batch)
        with count_flash(shared_prefix) as calls:
            values[f"{name}, packed"] = find_distances(score(packed=True, rounded=rounded), exact, batch)
        values[f"{name}, flash calls"] = len(calls)
    return values | find_error(values, uses_flash=shared_prefix.HAS_FLASH and not context.dry_run)


@contextmanager
def count_flash(module: Any) -> Iterator[list[str]]:
    """Gives a list that grows with each call of the flash kernel of `shared_prefix`."""
    kernel, calls = module.varlen_attn, list[str]()

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append("flash")
        return kernel(*arguments, **named)

    module.varlen_attn = call
    try:
        yield calls
    finally:
        module.varlen_attn = kernel


def score_with_gradient(
    model: Any, batch: dict[str, torch.Tensor], precision: AbstractContextManager[Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradients of a weighted sum of the answers' log-probs."""
    from dpokit.model.score import score_tokens

    model.zero_grad()
    with precision:
        scores = score_tokens(model, batch)
    weights = torch.linspace(-1, 1, len(scores), device=scores.device)
    (scores.sum(dim=1) * weights).sum().backward()
    gradients = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    return scores.detach(), gradients


def find_distances(result: Any, exact: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Mean distance of log-probs in nats a token; distance of the gradients as a share of the exact one."""
    scored = batch["completion_mask"][:, 1:]
    tokens = float(((result[0] - exact[0]).abs() * scored).sum() / scored.sum())
    if not result[1]:
        return [tokens]
    square = sum(float((result[1][name] - gradient).square().sum()) for name, gradient in exact[1].items())
    whole = sum(float(gradient.square().sum()) for gradient in exact[1].values())
    return [tokens, (square / whole) ** 0.5]


def find_error(values: Values, *, uses_flash: bool) -> Values:
    """What is wrong with the distances of a family; empty if nothing is."""
    tokens, gradient = values["fp32"]
    if not (tokens <= LARGEST_IN_FP32 and gradient <= LARGEST_GRADIENT_IN_FP32 and 10 * tokens < values["wrong mask"]):
        return {"error": f"in fp32 packed rows differ by {tokens:.1e} nats a token, gradients by {gradient:.1e}"}
    for name in ("autocast", "bf16"):
        padded, packed = values[f"{name}, padded"], values[f"{name}, packed"]
        if not all(here <= 2 * there + 1e-3 for here, there in zip(packed, padded, strict=True)):
            return {"error": f"{name}: packed rows are {packed} from fp32, padded ones {padded}"}
        if uses_flash and not values[f"{name}, flash calls"]:
            return {"error": f"{name}: flash attention was not used"}
    return {}


# -- tests -------------------------------------------------------------------------------------------------------------


def run_tests(context: Context) -> Cases:
    """Runs the fast tests that are marked `gpu`, each a case."""
    from day_pytest import find_files, run_pytest

    run_pytest(find_files(TESTS), "gpu and not slow", context.record, context.done, context.work / "pytest")
    return {}


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model of random weights and the steps that are measured with it.

    Attributes:
        model: name of the configuration in `build_config`.
        tokens: most tokens of a row.
        pairs: of a step.
        steps: measured ones; `WARM_STEPS` come before.
        joined: each pair is made of several HH pairs, which alone have some 170 tokens.
        whole: weights in fp32, computed in bf16 (autocast); else weights, gradients and AdamW's states are bf16 too.
    """

    model: str
    tokens: int
    pairs: int
    steps: int
    joined: bool = False
    whole: bool = True


WARM_STEPS = 2
SHAPES = {
    "steps-gpt2-512": Shape("gpt2", 512, 64, 10),
    "steps-0.5b-512": Shape("0.5b", 512, 32, 10),
    "steps-7b-2048": Shape("7b", 2048, 4, 6, joined=True, whole=False),
    "steps-gpt2-2048": Shape("gpt2", 2048, 12, 6, joined=True),
    "steps-0.5b-2048": Shape("0.5b", 2048, 8, 6, joined=True),
    "steps-1.5b-2048": Shape("1.5b", 2048, 8, 6, joined=True, whole=False),
}
SIDES = {
    "stock": "TRL, live reference",
    "packed": "dpokit, live reference",
    "kept": "dpokit, kept reference",
    "stock-kept": "TRL, precomputed reference",
}
# From the config.json of the models of these names: hidden, intermediate, layers, heads, heads of keys, tied.
QWEN2 = {
    "0.5b": (896, 4864, 24, 14, 2, True, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, True, 151936),
    "7b": (3584, 18944, 28, 28, 4, False, 152064),
    "tiny": (32, 64, 2, 4, 2, True, 50304),
}


def build_config(model: str, tokens: int) -> Any:
    from transformers import GPT2Config, Qwen2Config

    if model == "gpt2":
        return GPT2Config(n_positions=max(1024, tokens))
    hidden, intermediate, layers, heads, key_heads, tied, vocabulary = QWEN2[model]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def run_steps(context: Context) -> Cases:
    """TRL's live reference comes first, before dpokit is imported; where memory is short, the kept reference does."""
    shape = SHAPES[context.stage]
    sides = list(SIDES) if shape.whole else ["kept", "stock-kept", "packed", "stock"]
    if context.dry_run:  # two sides of a shape at most; the shapes together have all four
        sides = (sides[2:] if shape.joined else sides[:2]) if shape.whole else sides[:1]
        shape = replace(shape, model="tiny", tokens=192 if shape.joined else 96, pairs=2, steps=1)
    return {SIDES[side]: partial(measure_steps, context, shape, side) for side in sides}


@cache
def make_rows(shape: Shape) -> list[dict[str, Any]]:
    """HH pairs for all steps, with their ids, none longer than `tokens`.

    Joined pairs have from a quarter of the tokens to nearly all, and HH's shares of prompt and answers.
    """
    from transformers import AutoTokenizer

    folder, read_pairs = import_rows()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = add_ids(read_pairs(200 if shape.model == "tiny" else 100_000), tokenizer)
    number = shape.pairs * (WARM_STEPS + shape.steps)
    longer = add_ids(join_pairs(pairs, shape.tokens), tokenizer) if shape.joined else pairs
    rows = [row for row in longer if find_longest(row) <= shape.tokens][:number]
    if len(rows) < number:
        raise LackError(f"{number} HH pairs of {shape.tokens} tokens: there are {len(rows)}")
    return rows


def add_ids(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows with token ids; an answer ends with the EOS."""
    sides = {name: tokenizer([row[name] for row in rows])["input_ids"] for name in ("prompt", "chosen", "rejected")}
    end = {"prompt": [], "chosen": [tokenizer.eos_token_id], "rejected": [tokenizer.eos_token_id]}
    return [
        {**row, **{f"{name}_ids": [*ids[place], *end[name]] for name, ids in sides.items()}}
        for place, row in enumerate(rows)
    ]


def join_pairs(pairs: list[dict[str, Any]], tokens: int) -> list[dict[str, str]]:
    """Pairs of the texts of consecutive pairs: their prompts, their chosen and their rejected answers."""
    groups: list[list[dict[str, Any]]] = [[]]
    length = 0
    for pair in pairs:
        most = tokens // 2 + 97 * len(groups) % (tokens // 2)  # lengths vary, as in real data
        if groups[-1] and length + find_longest(pair) > most:
            groups.append([])
            length = 0
        groups[-1].append(pair)
        length += find_longest(pair)
    names = ("prompt", "chosen", "rejected")
    return [{name: "".join(pair[name] for pair in group) for name in names} for group in groups[:-1]]


def find_longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def measure_steps(context: Context, shape: Shape, side: str) -> Values:
    """Seconds of each measured step and peak memory; the work of a mean step for rates and shares."""
    rows = make_rows(shape)
    gc.collect()
    if not context.dry_run:
        torch.cuda.empty_cache()
        held_gib = torch.cuda.memory_allocated() / GIB  # what an earlier case has left; near 0
    began = time.perf_counter()
    trainer = build_side(context, shape, side, rows)
    clock = build_clock(context.device)
    trainer.add_callback(clock)
    if not context.dry_run:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    ready = time.perf_counter() - began
    trainer.train()
    seconds = clock.read()[WARM_STEPS - 1 :]
    logs = [record for record in trainer.state.log_history if "rewards/chosen" in record]
    values = {"pairs": shape.pairs, "seconds": seconds, "ready_seconds": ready}
    values |= {name: statistics.mean(log[name] for log in logs) for name in ("loss", "logps/chosen", "logps/rejected")}
    values |= {"shared_prefix": getattr(trainer, "shared_prefix", "-")}
    values |= count_work(shape, rows, trainer.model, is_live="kept" not in side)
    if not context.dry_run:
        values["held_gib"] = held_gib
        values["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    if not side.startswith("stock") and trainer.shared_prefix != "on":
        values["error"] = f"shared prefix: {trainer.shared_prefix}"
    return values


def build_side(context: Context, shape: Shape, side: str, rows: list[dict[str, Any]]) -> Any:
    """A trainer of TRL or of dpokit, with the same model, pairs and arguments."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, folder = build_config(shape.model, shape.tokens), context.work / "model"
    tokenizer = AutoTokenizer.from_pretrained(import_rows()[0])
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    with torch.device(context.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if shape.whole else torch.bfloat16)
    reference = copy.deepcopy(model) if "kept" not in side else None
    common = {
        "output_dir": str(context.work / side),
        "per_device_train_batch_size": shape.pairs,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": not shape.whole,
        "max_steps": WARM_STEPS + shape.steps,
        "max_length": shape.tokens,
        "learning_rate": 1e-6,
        "logging_steps": WARM_STEPS + shape.steps,  # each log waits for the GPU
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "use_cpu": context.dry_run,
        "bf16": not context.dry_run,
        "precompute_ref_log_probs": "kept" in side,
        "precompute_ref_batch_size": shape.pairs,
    }
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    if side.startswith("stock"):
        from trl import DPOConfig, DPOTrainer

        parts = {"model": model, "ref_model": reference, "processing_class": tokenizer}
        return DPOTrainer(args=DPOConfig(**common), train_dataset=Dataset.from_list(texts), **parts)
    from dpokit.rundir import RunDir
    from dpokit.settings.load import load_settings
    from dpokit.train.dpo_trainer import PairTrainer

    config.save_pretrained(folder)
    places = {"model_name_or_path": str(folder), "dataset_name": str(folder)}
    settings = load_settings("gpu-day", {**common, **places}, [])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return PairTrainer(
        run=RunDir(common["output_dir"]),
        identity={},  # no checkpoint is written
        model=model,
        ref_model=reference,
        args=settings.training,
        train_dataset=Dataset.from_list([{**{n: row[n] for n in names}, "row": i} for i, row in enumerate(rows)]),
        eval_dataset=None,
        processing_class=tokenizer,
        peft_config=None,
        longest=shape.tokens,
        reference={"weights": f"{shape.model}, seed 0"} if "kept" in side else None,
    )


def build_clock(device: torch.device) -> Any:
    """A callback that marks the end of each step: on a GPU by events, for which no step waits."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[Any] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type != "cuda":
                self.marks.append(time.perf_counter())
                return
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)

        def read(self) -> list[float]:
            """Seconds from the end of each step to the end of the next."""
            if device.type != "cuda":
                return [end - begin for begin, end in pairwise(self.marks)]
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self.marks)]

    return StepClock()


def count_work(shape: Shape, rows: list[dict[str, Any]], model: Any, *, is_live: bool) -> Values:
    """Of a mean step: tokens of its rows, tokens with each prompt once, and the FLOPs that it needs.

    A matrix product needs 2 FLOPs a weight and token forward, and twice as many backward. The head is needed at answers
    alone. Attention needs 4 FLOPs a layer, channel and pair of tokens forward. Recomputed activations do not count.
    """
    head = model.get_output_embeddings().weight
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    others = {id(weight) for weight in (head, *embeddings)}
    weights = sum(w.numel() for w in model.parameters() if w.ndim == 2 and id(w) not in others)
    config = model.config
    channels = config.num_hidden_layers * config.hidden_size
    rows_tokens = once = flops = 0.0
    for row in rows:
        prompt, *answers = (len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        rows_tokens += 2 * prompt + sum(answers)
        once += prompt + sum(answers)
        attended = prompt**2 / 2 + sum(answer * prompt + answer**2 / 2 for answer in answers)
        flops += 2 * weights * (prompt + sum(answers)) + 2 * head.numel() * sum(answers) + 4 * channels * attended
    steps = len(rows) / shape.pairs
    passes = 4 if is_live else 3  # forward, backward of twice the work, and the reference's forward
    return {
        "parameters": model.num_parameters(),
        "row_tokens": rows_tokens / steps,
        "needed_tokens": once / steps,
        "flops": passes * flops / steps,
    }


# -- a whole run -------------------------------------------------------------------------------------------------------


def run_whole(context: Context) -> Cases:
    """SmolLM2 on HH pairs if its file is there, else the quickstart; in a dry run a tiny model on HH pairs."""
    places = [os.environ.get("DPOKIT_SMOLLM2", ""), str(ROOT / ".gpu" / SMOLLM2)]
    file = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if context.dry_run:
        return {"tiny model on HH": lambda: train_on_hh(context, make_tiny_model(context))}
    if file is not None:
        return {"SmolLM2-135M-Instruct on HH": lambda: train_on_hh(context, file)}
    return {"quickstart": lambda: run_quickstart(context)}


def make_tiny_model(context: Context) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = context.work / "tiny"
    if not folder.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(build_config("tiny", 96)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(import_rows()[0]).save_pretrained(folder)
    return folder


def train_on_hh(context: Context, model: Path) -> Values:
    """Trains with the recipe `dpo_gpt2`; returns what its log says, and its evaluation beside the base."""
    pairs = 8 if context.dry_run else 1000
    rows = import_rows()[1](pairs)
    data = context.work / "data"
    data.mkdir()
    cut = pairs // 5
    for name, part in (("test", rows[:cut]), ("train", rows[cut:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    small = {"max_steps": 1, "max_length": 96, "per_device_train_batch_size": 2, "use_cpu": "true"}
    large = {"max_steps": 40, "max_length": 512, "per_device_train_batch_size": 16, "eval_steps": 20, "save_steps": 20}
    flags = {"model_name_or_path": model, "dataset_name": data, "output_dir": context.work / "run"}
    flags |= {"logging_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 2e-5, "loss_type": "sigmoid"}
    flags |= {"loss_weights": 1.0, "report_to": "none", **(small if context.dry_run else large)}
    done = start_recipe(context, "dpo_gpt2", flags)
    values = read_run(context.work / "run", done)
    if "error" in values:
        return values
    command = ["-m", "dpokit.cli", "evaluate", str(context.work / "run")]
    evaluated = subprocess.run([*PYTHON, *command], capture_output=True, text=True, check=False)
    print(evaluated.stderr[-2000:])
    files = sorted((context.work / "run" / "eval").glob("*/pairs.json"))
    if not files:
        return values | {
            "error": f"dpokit evaluate ended with {evaluated.returncode}: {find_message(evaluated.stderr)}"
        }
    return values | {"evaluation": json.loads(files[-1].read_text())}


def run_quickstart(context: Context) -> Values:
    done = start_recipe(context, "dpo_quickstart", {"output_dir": context.work / "run"})
    values = read_run(context.work / "run", done)
    judged = context.work / "run" / "quickstart.json"
    return values | ({"judged": json.loads(judged.read_text())} if judged.is_file() else {})


def start_recipe(context: Context, recipe: str, flags: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/single_gpu.yaml")]
    command += [str(ROOT / "recipes" / f"{recipe}.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*PYTHON, *command], capture_output=True, text=True, cwd=context.work, check=False)
    print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
    return done


def find_message(text: str) -> str:
    """The last line with an error of the program itself, not of its launcher; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|NotFound)\b", line)]
    own = [line for line in errors if "CalledProcessError" not in line and "ChildFailedError" not in line]
    return (own or lines or ["no output"])[-1][:300]


def read_run(folder: Path, done: "subprocess.CompletedProcess[str]") -> Values:
    """What a run's log says: state, losses, whether prompts were shared, and dpokit's own numbers of the GPU."""
    if not (folder / "metrics.jsonl").is_file():
        return {"error": f"the recipe ended with {done.returncode}: {find_message(done.stderr)}"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    losses = [line["loss"] for line in lines if "loss" in line]
    values: Values = {"state": record["state"], "shared_prefix": record["shared_prefix"], "steps": lines[-1]["step"]}
    values |= {"first_loss": losses[0], "last_loss": losses[-1]}
    for name in ("gpu_power_watts", "gpu_memory_gib", "gpu_utilisation_percent"):
        numbers = [line[name] for line in lines if name in line]
        if numbers:
            values[name] = round(max(numbers), 1)
    is_whole = done.returncode == 0 and record["state"] == "finished" and record["shared_prefix"] == "on"
    return values if is_whole else values | {"error": f"{record['state']}: {record.get('reason')}"}


# -- memory ------------------------------------------------------------------------------------------------------------


def run_memory(context: Context) -> Cases:
    if context.dry_run:
        return {"tiny, full": partial(check_memory, context, "tiny", {"max_length": 64, "use_cpu": "true"})}
    full = {"max_length": 512, "per_device_train_batch_size": 8, "bf16": "true"}
    lora = {**full, "use_peft": "true", "lora_target_modules": "all-linear"}
    return {
        "GPT-2 124M, full": partial(check_memory, context, "gpt2", full),
        "Qwen2 0.5B, LoRA": partial(check_memory, context, "0.5b", {**lora, "max_length": 1024}),
        "Qwen2 0.5B, full": partial(check_memory, context, "0.5b", full),
    }


def check_memory(context: Context, model: str, flags: dict[str, Any]) -> Values:
    """`dpokit plan --check`: predicted and measured peak in GiB, of two steps of the longest rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, read_pairs = import_rows()
    folder, data = context.work / model, context.work / "plan.jsonl"
    if not folder.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(build_config(model, flags["max_length"])).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    data.write_text("".join(json.dumps(row) + "\n" for row in read_pairs(20 if context.dry_run else 400)))
    flags = {**flags, "model_name_or_path": folder, "dataset_name": data, "eval_strategy": "no", "save_strategy": "no"}
    flags |= {"load_best_model_at_end": "false", "output_dir": context.work / "planned"}
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = ["-m", "dpokit.cli", "plan", str(ROOT / "recipes" / "dpo_gpt2.py"), *parts, "--check", "--json"]
    done = subprocess.run([*PYTHON, *command], capture_output=True, text=True, check=False, cwd=context.work)
    if "out of memory" in done.stderr:
        raise LackError(f"memory: {' '.join(done.stderr.split())[-300:]}")
    if done.returncode != 0:
        return {"error": f"dpokit plan ended with {done.returncode}: {find_message(done.stderr)}"}
    return {name: value for name, value in json.loads(done.stdout)["check"].items() if name != "placement"}


# -- placements --------------------------------------------------------------------------------------------------------

# The most valuable first; each is compared with one device of its kind, which runs before it.
CONFIGS = ("zero2", "zero3", "fsdp2", "zero3_offload")


def run_placements(context: Context) -> Cases:
    """Trains under each placement on one GPU, some at a time, as tests/test_placements.py does on all."""
    import conftest
    import test_placements as placements

    folder = context.work
    end = "<|endoftext|>"
    tokenizer = conftest.build_tokenizer([end], bos_token=end, eos_token=end, pad_token=end)
    model = placements.build_tiny_llama(folder / "llama", tokenizer)
    data = placements.write_data(folder / "data")
    kinds = ("full",) if context.dry_run else tuple(placements.KINDS)
    configs = ("fsdp2_cpu",) if context.dry_run else CONFIGS

    def train(config: str, kind: str) -> Path:
        flags = [*placements.find_optimizer(config, kind), *(["--use_cpu"] if context.dry_run else [])]
        launcher = () if config == "single_gpu" else ("--main_process_port", "0", "--num_processes", "1")
        run = folder / f"{config}_{kind}"
        placements.train_placement(run, model, data, config, kind, 4, *flags, launcher=launcher)
        return run

    def compare(config: str, kind: str) -> Values:
        if "offload" in config and (shutil.which("c++") is None or shutil.which("nvcc") is None):
            raise LackError("c++ and nvcc: DeepSpeed compiles its Adam for the host")
        run = train(config, kind)
        placements.check_same_run(run, folder / f"single_gpu_{kind}", kind, placements.in_words(config))
        return {"placement": placements.in_words(config), "kind": kind, "outcome": "yes"}

    def attempt(config: str, kind: str) -> None:
        name = f"{placements.in_words(config)}, {kind}"
        if name not in context.done or config == "single_gpu":  # the others are compared with one device
            context.attempt(name, partial(compare, config, kind))

    jobs = max(1, min(4, len(os.sched_getaffinity(0)) // 4))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(attempt, "single_gpu"), kinds))
        list(pool.map(lambda case: attempt(*case), [(config, kind) for config in configs for kind in kinds]))
    return {}


# -- the process -------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Context], Cases]] = {
    "machine": run_machine,
    "equality": run_equality,
    "tests": run_tests,
    **dict.fromkeys(SHAPES, run_steps),
    "run": run_whole,
    "memory": run_memory,
    "placements": run_placements,
}


def find_gpu_trouble() -> str | None:
    """Why torch cannot use the GPU; None if it can."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:  # of several classes: no CUDA in torch, an old driver, a GPU that fails
        return f"torch {torch.__version__} cannot use the GPU: {' '.join(str(error).split())[:300]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--memory-gib", type=float)
    options = parser.parse_args()
    # A warm process has another parent until that one ends.
    deadline = time.monotonic() + 5
    while os.getppid() != options.parent and time.monotonic() < deadline:
        time.sleep(0.01)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a day that is killed leaves no process on the GPU
    records = Records(options.records)
    begun = {record["case"] for record in records.read() if record.get("stage") == options.stage and "case" in record}
    cases_so_far = summarise(records)["stages"].get(options.stage, {"cases": {}})["cases"]
    done = {name for name, case in cases_so_far.items() if is_done(case)}
    context = Context(options.stage, options.dry_run, options.work, records, done)
    if not options.dry_run:
        if trouble := find_gpu_trouble():
            context.record("torch", lacked=trouble)
            return 0
        if options.memory_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * GIB / total))
    try:
        cases = STAGES[options.stage](context)
    except LackError as lack:
        context.record(options.stage, lacked=str(lack))
        return 0
    for name, compute in sorted(cases.items(), key=lambda case: case[0] in begun):  # one that hung comes last
        if name not in done:
            context.attempt(name, compute)
    return 0


if __name__ == "__main__":
    sys.exit(main())
