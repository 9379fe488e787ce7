"""The table of all numbers that a run logs or an evaluation measures: meaning, and where each is shown. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EVAL = "eval_"  # prefix of the names of metrics that an evaluation logs
BOTH, PAIRS = ("dpo", "sft"), ("dpo",)

# Key and title of each figure of a report, in the order of the report.
FIGURES = {
    "loss": "Loss",
    "margins": "Reward margin",
    "accuracies": "Accuracy",
    "rewards": "Rewards",
    "logps": "Log-probs of answers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "throughput": "Tokens per second",
    "gpu_power": "GPU power, W",
    "gpu_memory": "GPU memory, GiB",
    "gpu_utilisation": "GPU utilisation, %",
}


@dataclass(frozen=True)
class Metric:
    """A logged number.

    Attributes:
        name: in metrics.jsonl and on trackers.
        meaning: a sentence.
        better: `up` or `down`; "" if neither is better.
        evaluated: the kinds of recipe whose evaluations log it, with the prefix `eval_`.
        figure: the key of its figure; "" if no figure shows it.
        line: its label in that figure, if the figure has several lines.
        column: its header in the report's table of evaluations; "" if it has no column.
        screen: its header in the lines that training prints for evaluations, by the kind of recipe.
        scale: `log` if values that span decades are drawn on a logarithmic axis.
        exact: True if it follows a formula and is drawn without a running mean.
        needs: what runs must share before their values can be compared: `pairs`, or `beta` or `loss` with the same
            pairs; "" for nothing.
    """

    name: str
    meaning: str
    better: str = ""
    evaluated: Sequence[str] = ()
    figure: str = ""
    line: str = ""
    column: str = ""
    screen: Mapping[str, str] = field(default_factory=dict)
    scale: str = ""
    exact: bool = False
    needs: str = ""


LOGGED: list[Metric] = [
    Metric(
        "loss",
        "Mean loss of the pairs, or of the answers' tokens in supervised training.",
        better="down",
        evaluated=BOTH,
        figure="loss",
        column="validation loss",
        screen={"dpo": "eval loss", "sft": "eval loss"},
        needs="loss",
    ),
    Metric(
        "rewards/chosen",
        "Mean implicit reward of chosen answers: beta times their log-prob above the reference's.",
        better="up",
        evaluated=PAIRS,
        figure="rewards",
        line="chosen",
        column="rewards/chosen",
        needs="beta",
    ),
    Metric(
        "rewards/rejected",
        "Mean implicit reward of rejected answers.",
        evaluated=PAIRS,
        figure="rewards",
        line="rejected",
        column="rewards/rejected",
        needs="beta",
    ),
    Metric(
        "rewards/accuracies",
        "Share of pairs whose chosen answer has the higher reward.",
        better="up",
        evaluated=PAIRS,
        figure="accuracies",
        column="rewards/accuracies",
        screen={"dpo": "accuracy"},
        needs="pairs",
    ),
    Metric(
        "rewards/margins",
        "Mean difference of the rewards of chosen and rejected answers.",
        better="up",
        evaluated=PAIRS,
        figure="margins",
        column="rewards/margins",
        screen={"dpo": "margin"},
        needs="beta",
    ),
    Metric(
        "logps/chosen",
        "Mean log-prob of chosen answers, in nats.",
        better="up",
        evaluated=PAIRS,
        figure="logps",
        line="chosen",
        column="logps/chosen",
        screen={"dpo": "logps chosen"},
        needs="pairs",
    ),
    Metric(
        "logps/rejected",
        "Mean log-prob of rejected answers, in nats.",
        evaluated=PAIRS,
        figure="logps",
        line="rejected",
        column="logps/rejected",
        needs="pairs",
    ),
    Metric(
        "logits/chosen", "Mean logit of chosen answers' tokens.", evaluated=PAIRS, column="logits/chosen", needs="pairs"
    ),
    Metric(
        "logits/rejected",
        "Mean logit of rejected answers' tokens.",
        evaluated=PAIRS,
        column="logits/rejected",
        needs="pairs",
    ),
    Metric("entropy", "Mean entropy of the next token, in nats.", evaluated=BOTH, needs="pairs"),
    Metric(
        "mean_token_accuracy",
        "Share of answer tokens that are the most probable ones.",
        better="up",
        evaluated=BOTH,
        screen={"sft": "tokens right"},
        needs="loss",  # the tokens that count depend on it
    ),
    Metric(
        "aux_loss", "Mean load-balancing loss of a mixture of experts.", better="down", evaluated=BOTH, needs="pairs"
    ),
    Metric("num_tokens", "Tokens seen so far.", evaluated=BOTH),
    Metric("wasted_positions", "Share of positions that are padding.", better="down"),
    Metric("epoch", "Passes over the data so far."),
    Metric("learning_rate", "Learning rate of the step.", figure="learning_rate", exact=True),
    Metric("grad_norm", "Norm of the gradient before it is clipped.", better="down", figure="grad_norm", scale="log"),
    Metric("tokens_per_second", "Tokens trained per second on all devices.", better="up", figure="throughput"),
    Metric("gpu_power_watts", "Mean power of rank 0's GPU, in watts.", figure="gpu_power"),
    Metric("gpu_memory_gib", "Most memory in use on rank 0's GPU, in GiB.", figure="gpu_memory"),
    Metric("gpu_utilisation_percent", "Mean share of time in which rank 0's GPU worked.", figure="gpu_utilisation"),
    Metric("save_stall_seconds", "How long a save held up training.", better="down"),
    Metric("runtime", "Seconds of an evaluation.", better="down", evaluated=BOTH),
    Metric("samples_per_second", "Rows per second of an evaluation.", better="up", evaluated=BOTH),
    Metric("steps_per_second", "Batches per second of an evaluation.", better="up", evaluated=BOTH),
    Metric("train_loss", "Mean loss of the whole run.", better="down", needs="loss"),
    Metric("train_runtime", "Seconds of the whole run.", better="down"),
    Metric("train_samples_per_second", "Rows per second of the whole run.", better="up"),
    Metric("train_steps_per_second", "Steps per second of the whole run.", better="up"),
    Metric("total_flos", "Floating-point operations of the whole run, as transformers estimates them."),
]
TIMES = ("runtime", "samples_per_second", "steps_per_second")


def find_metric(name: str) -> Metric | None:
    """The row of a logged metric, by its name with or without `eval_`; None if another library logs it."""
    rows = {metric.name: metric for metric in LOGGED}
    return rows.get(name) or rows.get(name.removeprefix(EVAL))


def is_lower_better(name: str) -> bool:
    """Whether a lower value is better; for a metric without a row, as in transformers, True for losses and times."""
    metric = find_metric(name)
    if metric is not None:
        return metric.better == "down"
    return name.endswith(("loss", "_seconds", "_runtime"))


def find_needs(name: str) -> str:
    """What runs must share before values of a logged metric can be compared; for a metric without a row, the loss."""
    metric = find_metric(name)
    return "loss" if metric is None else metric.needs


def list_evaluated(kind: str) -> list[str]:
    """The metrics, without `eval_`, that an evaluation of this kind of recipe logs."""
    return [metric.name for metric in LOGGED if kind in metric.evaluated]


def list_screen_columns(kind: str) -> dict[str, str]:
    """Logged name and header of each column that training prints for an evaluation."""
    return {EVAL + metric.name: metric.screen[kind] for metric in LOGGED if kind in metric.screen}


def list_report_columns() -> dict[str, str]:
    """Logged name and header of each column of the report's table of evaluations."""
    return {EVAL + metric.name: metric.column for metric in LOGGED if metric.column}


def list_figure(key: str) -> list[Metric]:
    """The metrics of a figure, in the order of its lines."""
    return [metric for metric in LOGGED if metric.figure == key]


@dataclass(frozen=True)
class Measure:
    """A number that `dpokit evaluate` writes to pairs.json.

    Attributes:
        title: its name on the screen.
        is_share: whether it is shown as a percentage.
        card: its type and name in a model card's model-index; None if the card leaves it out.
    """

    title: str
    is_share: bool = False
    card: tuple[str, str] | None = None


MEASURED = {
    "loss": Measure("DPO loss", card=("dpo_loss", "DPO loss")),
    "accuracy": Measure("reward accuracy", is_share=True, card=("accuracy", "Reward accuracy")),
    "margin": Measure("reward margin", card=("reward_margin", "Reward margin")),
    "rewards/chosen": Measure("reward, chosen"),
    "rewards/rejected": Measure("reward, rejected"),
    "ranking_accuracy": Measure("ranking accuracy", is_share=True),
    "ranking_accuracy_per_token": Measure("  by the token", is_share=True),
    "logps/chosen": Measure("log-prob, chosen"),
    "logps/rejected": Measure("log-prob, rejected"),
    "logps_per_token/chosen": Measure("  of a chosen token"),
    "kl_per_token": Measure("KL from base, a token", card=("kl_per_token", "KL from the base per token")),
}


def list_results() -> dict[str, tuple[str, str]]:
    """Type and name of each measure in a card's model-index; the accuracy is first, because sites show the first."""
    results = {name: measure.card for name, measure in MEASURED.items() if measure.card is not None}
    return dict(sorted(results.items(), key=lambda item: item[0] not in ("accuracy", "margin")))
