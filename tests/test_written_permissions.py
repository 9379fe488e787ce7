"""Every file that dpokit writes has the permissions of the user's umask, as files of any program have."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_pairs
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import dpokit
from dpokit.atomic_files import apply_umask
from dpokit.card.card import write_card
from dpokit.model.gguf import find_model_folder
from dpokit.report.page import write_report

UMASK = 0o027
WRITTEN = {
    "final weights": "full/model/model.safetensors",
    "final adapter": "lora/adapter/adapter_model.safetensors",
    "weights of a checkpoint": "full/checkpoint-1/model.safetensors",
    "adapter of a checkpoint": "lora/checkpoint-1/adapter_model.safetensors",
    "optimizer of a checkpoint": "lora/checkpoint-1/optimizer.pt",
    "manifest of a checkpoint": "lora/checkpoint-1/manifest.json",
    "merged model": "lora/merged/model.safetensors",
    "record of the merge": "lora/merged/merge.json",
    "run.json": "lora/run.json",
    "metrics": "lora/metrics.jsonl",
    "counts of the data": "lora/data.json",
    "evaluation": "lora/eval/*/pairs.json",
    "card": "lora/README.md",
    "pictures of the card": "lora/figures/*.png",
    "report": "lora/report/report.html",
    "pictures of the report": "lora/report/*.png",
    "kept reference": "cache/reference/**/*.safetensors",
    "model of a GGUF file": "cache/**/model.safetensors",
    "all other files and folders": "**/*",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_gpt2, plain_tokenizer) -> Iterator[Path]:
    """A folder with the files of all writers, written with UMASK."""
    made = tmp_path_factory.mktemp("written")
    before = os.umask(UMASK)
    patched = pytest.MonkeyPatch()
    patched.setenv("DPOKIT_CACHE", str(made / "cache"))
    try:
        settings = {
            "model_name_or_path": str(tiny_gpt2),
            "dataset_name": str(write_pairs(made / "pairs.jsonl", 8)),
            "eval_fraction": 0.3,
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": 1,
        }
        dpokit.train_model(settings | {"output_dir": str(made / "full"), "precompute_ref_log_probs": True})
        run = dpokit.train_model(settings | {"output_dir": str(made / "lora"), "use_peft": True})
        dpokit.evaluate_model(run)
        dpokit.merge_model(run, limit=2)
        write_card(run, license="mit")
        write_report([run.path])
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(plain_tokenizer)}
        config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, **heads)
        model = AutoModelForCausalLM.from_config(config)
        gguf = write_gguf(made / "model.gguf", model, AutoTokenizer.from_pretrained(tiny_gpt2), tensor_type="F32")
        find_model_folder(str(gguf))
        yield made
    finally:
        os.umask(before)
        patched.undo()


@pytest.mark.parametrize("writer", WRITTEN)
def test_a_written_file_has_the_permissions_of_the_umask(writer, folder):
    paths = list(folder.glob(WRITTEN[writer]))
    assert paths, f"nothing was written for {writer}"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths if not path.is_symlink()}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~UMASK for path in modes}
    wrong = {str(path.relative_to(folder)): oct(modes[path]) for path in modes if modes[path] != expected[path]}
    assert wrong == {}


@pytest.mark.parametrize(
    ("umask", "before", "after"),
    [(0o022, 0o600, 0o644), (0o077, 0o600, 0o600), (0o002, 0o600, 0o664), (0o022, 0o640, 0o640), (0o022, 0o400, 0o400)],
)
def test_only_private_files_are_changed_and_only_to_the_umask(umask, before, after, tmp_path):
    path, folder = tmp_path / "a" / "b" / "weights", tmp_path / "a"
    path.parent.mkdir(parents=True)
    path.touch()
    path.chmod(before)
    outside = tmp_path / "outside"
    outside.touch()
    outside.chmod(0o600)
    (folder / "link").symlink_to(outside)
    other = tmp_path / f".umask-{os.getpid()}-{threading.get_native_id()}"
    other.touch()  # of a process in another container
    former = os.umask(umask)
    try:
        apply_umask(folder)
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == after
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [other.name, "a", "outside"]
