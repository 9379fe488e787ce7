"""Shared by all tests: small generated tokenizers, models and pairs, and real data if it is available."""

import gc
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import warm
from leftovers import Leftovers
from placement_table import write_placements
from time_table import TimeTable, read_budget

pytest.register_assert_rewrite("compare_runs")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny models, several threads are slower than one
_CACHE = tempfile.TemporaryDirectory(prefix="dpokit-test-cache-")
os.environ["DPOKIT_CACHE"] = _CACHE.name
os.environ["DPOKIT_STATE"] = str(Path(_CACHE.name, "state"))
os.environ["HF_HUB_OFFLINE"] = "1"  # set before any import reads it, so that an accidental download fails at once
# datasets reads it at import; the folder belongs to this session and is removed when the process ends.
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="dpokit-test-datasets-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DPOKIT_SHARED", ROOT.parent / "shared"))

SENTENCES = [
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast, then wait and bake.",
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: Please help me with my garden.\n\nAssistant: I would start with good soil and a plan.",
    "The sky is blue. The sky is green. Yes, of course! No, not again.",
    "It is better to ask twice than to lose your way once, said the old teacher.",
]

# Like Qwen2's template: ChatML, where the EOS ends the turn and a newline follows it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # A background job of a shell ignores SIGINT, and each process that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hands_tests_out = not hasattr(config, "workerinput") and getattr(config.option, "dist", "no") != "no"
    if not hands_tests_out:
        warm.install(os.environ)
    config.pluginmanager.register(Leftovers(config))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(TimeTable(config, read_budget()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Processes start at different places of this order: one takes the tests that wait for Slurm, others the longest.
    items.sort(key=lambda item: ("cluster" not in item.keywords, "long" not in item.keywords))
    for item in items:
        for mark in item.iter_markers("pinned"):
            if not is_pinned(*mark.args):
                item.add_marker(pytest.mark.skip(reason=f"tests the {mark.args[0]} of constraints.txt"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # each run collects garbage twice, which takes half a second if all imported modules are visited


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resets accelerate's singletons after each test, so that each test builds its own state."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tests marked `cold` start ordinary processes: see warm.py."""
    if request.node.get_closest_marker("cold"):
        monkeypatch.setattr(subprocess, "Popen", warm.COLD)


@pytest.fixture
def shared() -> Path:
    """The folder with real HH rows and the real GPT-2 tokenizer."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED} (set DPOKIT_SHARED)")
    return SHARED


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def is_pinned(package: str) -> bool:
    """Whether the installed version of a package is that of constraints.txt, not an older or newer one."""
    installed = version(package).partition("+")[0]  # a CPU-only torch ends in +cpu
    return f"{package}=={installed}" in (ROOT / "constraints.txt").read_text().splitlines()


def find_free_port() -> int:
    """A free port outside of the range from which the kernel assigns ports."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)  # independent of seeds, so processes differ
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port


def build_tokenizer(special: list[str], **names: str):
    """A byte-level BPE tokenizer of some 400 tokens, always the same."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """A tokenizer like GPT-2's: no chat template, one special token."""
    end = "<|endoftext|>"
    return build_tokenizer([end], bos_token=end, eos_token=end, pad_token=end)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A tokenizer like Qwen2's: ChatML template, the EOS ends a turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = build_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, plain_tokenizer) -> Path:
    """A random GPT-2 of 2 layers with the plain tokenizer, as a model folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny_gpt2")
    torch.manual_seed(0)
    end = plain_tokenizer.eos_token_id
    size = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256, "vocab_size": len(plain_tokenizer)}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer) -> Path:
    """A random Qwen2 of 2 layers with the chat tokenizer, as a model folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_qwen2")
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": len(chat_tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    Qwen2ForCausalLM(Qwen2Config(**size, **heads)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, number: int, *, of_a_prompt: int = 1) -> Path:
    """Writes pairs in HH's layout with answers of varied lengths.

    Each prompt has `of_a_prompt` successive pairs.
    """
    with path.open("w") as file:
        for i in range(number):
            prompt_number = i // of_a_prompt
            prompt = (
                f"\n\nHuman: How do I bake {'good ' * (prompt_number % 5)}bread number {prompt_number}?\n\nAssistant:"
            )
            chosen = " Mix flour, water and salt." + " Then wait." * (i % 4)
            rejected = " No, not again." + " Ask the old teacher." * (i % 3)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """40 pairs, JSONL."""
    return write_pairs(tmp_path / "pairs.jsonl", 40)


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the table of docs/placements.md if the tests of placements were run."""
    write_placements(terminalreporter)
