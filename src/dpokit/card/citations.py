"""BibTeX entries for a run: DPO and its loss, the data, TRL. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv."""

    key: str
    author: str
    title: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        fields = {
            "title": f"{{{self.title}}}",
            "author": f"{self.author} and others",
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{self.arxiv}",
        }
        lines = ",\n".join(f"  {name:13} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}\n}}"


DPO = Paper(
    "rafailov2023direct",
    "Rafailov, Rafael",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    2023,
    "2305.18290",
)
RSO = Paper(
    "liu2023statistical", "Liu, Tianqi", "Statistical Rejection Sampling Improves Preference Optimization", 2023,
    "2309.06657",
)  # fmt: skip
AOT = Paper(
    "melnyk2024distributional", "Melnyk, Igor", "Distributional Preference Alignment of LLMs via Optimal Transport",
    2024, "2406.05882",
)  # fmt: skip
APO = Paper(
    "doosterlinck2024anchored", "D'Oosterlinck, Karel",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment", 2024,
    "2408.06266",
)  # fmt: skip
# `loss_type` -> its paper, by TRL's documentation; sigmoid is the loss of DPO itself, sft has no paper.
LOSS_PAPERS = {
    "hinge": RSO,
    "ipo": Paper(
        "azar2023general", "Azar, Mohammad Gheshlaghi",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023, "2310.12036",
    ),
    "exo_pair": Paper(
        "ji2024towards", "Ji, Haozhe", "Towards Efficient Exact Optimization of Language Model Alignment", 2024,
        "2402.00856",
    ),
    "nca_pair": Paper(
        "chen2024noise", "Chen, Huayu", "Noise Contrastive Alignment of Language Models with Explicit Rewards", 2024,
        "2402.05369",
    ),
    "robust": Paper(
        "chowdhury2024provably", "Chowdhury, Sayak Ray",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback", 2024, "2403.00409",
    ),
    "bco_pair": Paper(
        "jung2024binary", "Jung, Seungjae", "Binary Classifier Optimization for Large Language Model Alignment", 2024,
        "2404.04656",
    ),
    "sppo_hard": Paper(
        "wu2024self", "Wu, Yue", "Self-Play Preference Optimization for Language Model Alignment", 2024, "2405.00675",
    ),
    "aot": AOT,
    "aot_unpaired": AOT,
    "apo_zero": APO,
    "apo_down": APO,
    "discopop": Paper(
        "lu2024discovering", "Lu, Chris",
        "Discovering Preference Optimization Algorithms with and for Large Language Models", 2024, "2406.08414",
    ),
    "sigmoid_norm": Paper(
        "lambert2024tulu", "Lambert, Nathan", "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", 2024,
        "2411.15124",
    ),
}  # fmt: skip
WPO = Paper(
    "zhou2024wpo", "Zhou, Wenxuan", "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024, "2406.11827"
)
# A part of a dataset's name -> its paper.
DATA_PAPERS = {
    "hh-rlhf": Paper(
        "bai2022training", "Bai, Yuntao",
        "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback", 2022, "2204.05862",
    ),
    "ultrafeedback": Paper(
        "cui2023ultrafeedback", "Cui, Ganqu", "UltraFeedback: Boosting Language Models with Scaled AI Feedback", 2023,
        "2310.01377",
    ),
}  # fmt: skip
TRL = """@software{vonwerra2020trl,
  title         = {{TRL: Transformers Reinforcement Learning}},
  author        = {von Werra, Leandro and others},
  license       = {Apache-2.0},
  url           = {https://github.com/huggingface/trl},
  year          = {2020}
}"""


def list_citations(losses: Sequence[str] | None, datasets: Sequence[str], *, weighted: bool = False) -> list[str]:
    """Returns the BibTeX entries of a run.

    Args:
        losses: `loss_type` of a DPO run; None for a supervised run.
        datasets: names of the datasets.
        weighted: the setting `use_weighting`.
    """
    of_losses = [] if losses is None else [DPO, *(LOSS_PAPERS[loss] for loss in losses if loss in LOSS_PAPERS)]
    papers = [*of_losses, *([WPO] if weighted else [])]
    names = " ".join(datasets).lower()
    papers += [paper for part, paper in DATA_PAPERS.items() if part in names]
    return [*(paper.bibtex() for paper in dict.fromkeys(papers)), TRL]
