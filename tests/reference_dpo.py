"""DPO from its definition, in float64: log-probs of one sequence at a time, and the formula of every loss of TRL.

Sources: DPO arXiv 2305.18290, IPO 2310.12036 (length-normalised, as TRL's authors agreed with IPO's), SLiC/hinge
2309.06657, EXO 2402.00856, NCA 2402.05369, robust 2403.00409, BCO 2404.04656, SPPO 2405.00675, AOT 2406.05882,
APO 2408.06266, DiscoPOP 2406.08414, SimPO-like length normalisation for sigmoid_norm.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid


def answer_log_prob(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p(answer | prompt) of one unpadded sequence, summed over the answer's tokens."""
    return token_log_probs(model, prompt, answer).sum()


def token_log_probs(model, prompt: list[int], answer: list[int], mask: Sequence[int] = ()) -> torch.Tensor:
    """The log-prob of each token of the answer, or of those where the mask is 1."""
    steps = distributions(model, prompt, answer, mask)
    scored = [token for token, flag in zip(answer, mask or [1] * len(answer), strict=True) if flag]
    return steps.gather(1, torch.tensor(scored)[:, None])[:, 0]


def distributions(model, prompt: list[int], answer: list[int], mask: Sequence[int] = ()) -> torch.Tensor:
    """log p of the whole vocabulary at each token of the answer, or at those where the mask is 1."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return steps[[number for number, flag in enumerate(mask or [1] * len(answer)) if flag]]


def dpo_loss(kind: str, pc, pr, rc, rr, lc, lr, beta: float, smoothing: float) -> torch.Tensor:
    """Mean loss of pairs from the policy's (pc, pr) and reference's (rc, rr) log-probs; lc, lr: answer lengths."""
    c, r = pc - rc, pr - rr
    z = beta * (c - r)
    losses = {
        "sigmoid": lambda: -logsigmoid(z),
        "hinge": lambda: (1 - z).clamp(min=0),
        "ipo": lambda: (c / lc - r / lr - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: (
            torch.sigmoid(z) * (logsigmoid(z) - math.log(1 - smoothing))
            + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(smoothing))
        ),
        "nca_pair": lambda: -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r),
        "robust": lambda: (-(1 - smoothing) * logsigmoid(z) + smoothing * logsigmoid(-z)) / (1 - 2 * smoothing),
        "bco_pair": lambda: -logsigmoid(beta * c) - logsigmoid(-beta * r),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "aot": lambda: smoothed((pc - pr).sort().values - (rc - rr).sort().values, beta, smoothing),
        "aot_unpaired": lambda: smoothed(c.sort().values - r.sort().values, beta, smoothing),
        "apo_zero": lambda: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
        "apo_down": lambda: torch.sigmoid(beta * c) + 1 - torch.sigmoid(z),
        "discopop": lambda: -logsigmoid(z) * (1 - torch.sigmoid(z / 0.05)) + (-z).exp() * torch.sigmoid(z / 0.05),
        "sft": lambda: -(pc.sum() / lc.sum()),
        "sigmoid_norm": lambda: -logsigmoid(beta * (c / lc - r / lr)),
    }
    return losses[kind]().mean()


def smoothed(delta: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    return -logsigmoid(beta * delta) * (1 - smoothing) - logsigmoid(-beta * delta) * smoothing
