"""The stages `steps-*`: seconds and memory of training steps, of TRL and of dpokit."""

import copy
import gc
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from day_context import Cases, Context, Values, import_rows
from day_machine import GIB, LackError


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
