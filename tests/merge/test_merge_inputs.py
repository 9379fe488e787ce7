"""Failed merges: one error message, no files left behind, and a clean second try."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_to_merge import build_base, build_run, find_logits, load_adapted, load_merged
from safetensors.torch import load_file, save_file
from small_disk import enlarge, small_disk
from test_cli import dpokit
from test_merge import lora
from transformers import AutoModelForCausalLM

from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.rundir import RunDir

QUICK = MergeOptions(proof=False)


@pytest.fixture
def run(tiny_gpt2, tmp_path) -> RunDir:
    return build_run(tmp_path, tiny_gpt2, lora("gpt2"))


@pytest.fixture
def own_base(plain_tokenizer, tmp_path) -> Path:
    """A base that a test may damage."""
    return build_base(tmp_path / "base", "gpt2", plain_tokenizer)


def check_no_merge_is_left(run: RunDir) -> None:
    assert not run.merged.exists()
    assert not list(run.path.glob(".merged*"))


def change_adapter(run: RunDir, change) -> None:
    file = run.adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def with_nan(tensors):
    tensors[min(tensors)][0, 0] = torch.nan
    return tensors


def without_one(tensors):
    tensors.pop(min(tensors))
    return tensors


def of_a_deeper_model(tensors):
    return tensors | {name.replace(".h.0.", ".h.7."): tensor.clone() for name, tensor in tensors.items()}


def of_a_wider_model(tensors):
    return {name: torch.cat([tensor, tensor], dim=1 if "lora_A" in name else 0) for name, tensor in tensors.items()}


@pytest.mark.parametrize("proof", [True, False], ids=["proof", "no proof"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_nan, "not finite"),
        (without_one, "lacks tensors of the adapter"),
        (of_a_deeper_model, "its base has no layer for"),
        (of_a_wider_model, "does not fit its base .*size mismatch"),
    ],
)
def test_a_changed_adapter_is_refused(change, says, proof, run):
    change_adapter(run, change)
    with pytest.raises(ModelError, match=says):
        merge_run(run, MergeOptions(proof=proof))
    check_no_merge_is_left(run)


@pytest.mark.parametrize("kept_bytes", [0, 7, 300, 2000])
def test_a_truncated_adapter_is_refused_by_its_file_name(kept_bytes, run):
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        merge_run(run, QUICK)
    check_no_merge_is_left(run)


def test_a_changed_base_is_recognised_by_its_hash(own_base, tmp_path):
    run = build_run(tmp_path, own_base, lora("gpt2"))
    model = AutoModelForCausalLM.from_pretrained(own_base)
    with torch.no_grad():
        model.transformer.wte.weight += 1e-3
    model.save_pretrained(own_base)
    with pytest.raises(ModelError, match="has changed since the run started from it") as error:
        merge_run(run, QUICK)
    assert "--accept-drift" in error.value.do
    check_no_merge_is_left(run)
    made = merge_run(run, MergeOptions(proof=False, accept_drift=True))
    assert made["model_fingerprint"] != run.read_run()["model_fingerprint"]


def test_a_base_of_another_shape_is_refused(own_base, plain_tokenizer, tmp_path):
    run = build_run(tmp_path, own_base, lora("gpt2"))
    build_base(own_base, "gpt2", plain_tokenizer, n_embd=64)
    run.write_run(model_fingerprint=None)
    with pytest.raises(ModelError, match="does not fit its base"):
        merge_run(run, QUICK)
    check_no_merge_is_left(run)


def test_a_moved_base_is_named_and_can_be_set_by_a_flag(own_base, tmp_path):
    run = build_run(tmp_path, own_base, lora("gpt2"))
    expected = find_logits(load_adapted(run))
    moved = own_base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"--model_name_or_path {own_base}: no model could be loaded"):
        merge_run(run, QUICK)
    check_no_merge_is_left(run)
    merge_run(run, QUICK, argv=["--model_name_or_path", str(moved)])
    assert (find_logits(load_merged(run)) - expected).abs().max() < 1e-4


def test_a_truncated_base_is_one_message(own_base, tmp_path):
    run = build_run(tmp_path, own_base, lora("gpt2"))
    run.write_run(model_fingerprint=None)
    file = own_base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="no model could be loaded"):
        merge_run(run, QUICK)
    check_no_merge_is_left(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_into_weights_changed_by_1_percent_is_refused(dtype, own_base, tmp_path, monkeypatch):
    from dpokit.merge import write

    run = build_run(tmp_path, own_base, lora("gpt2"), dtype=dtype)
    merge = write.merge_layers

    def merge_wrongly(*arguments):
        merged = merge(*arguments)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in merged.parameters():
                weight.mul_(1 + 0.01 * torch.randn(weight.shape))
        return merged

    made = merge_run(run)
    assert made["mean_drift"] < made["bound"]["mean_drift"] / 2, "a correct merge is far from the bound"
    shutil.rmtree(run.merged)
    monkeypatch.setattr(write, "merge_layers", merge_wrongly)
    with pytest.raises(ModelError, match="differs from the trained one"):
        merge_run(run)


def test_a_model_that_cannot_compute_in_fp32_has_wider_bounds(run, monkeypatch):
    from dpokit.model import rounding

    monkeypatch.setattr(rounding, "find_fp32_obstacle", lambda _: "8-bit layers")
    made = merge_run(run)
    assert made["mean_rounding"] is None
    assert made["bound"] == {"mean_drift": 0.1, "largest_drift": 1.0}


def test_drift_beyond_the_bound_is_refused_unless_accepted(run, monkeypatch):
    from dpokit.merge import drift

    monkeypatch.setattr(drift, "BOUND_FP32", (1e-12, 1e-12))
    with pytest.raises(ModelError, match="differs from the trained one") as error:
        merge_run(run)
    assert "--accept-drift" in error.value.do
    check_no_merge_is_left(run)
    made = merge_run(run, MergeOptions(accept_drift=True))
    assert made["drift_accepted"]
    assert made["bound"] == {"mean_drift": 1e-12, "largest_drift": 1e-12}


def test_a_value_too_large_for_fp16_is_named(own_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(own_base)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 1e5
    model.save_pretrained(own_base)
    run = build_run(tmp_path, own_base, lora("gpt2"))
    with pytest.raises(ModelError, match=r"c_fc\.bias .*float16") as error:
        merge_run(run, MergeOptions(dtype="float16", proof=False))
    assert "bfloat16" in error.value.do
    check_no_merge_is_left(run)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"dtype": "int8"}, SettingsError, "--dtype int8"),
        ({"max_shard_size": "five"}, SettingsError, "--max-shard-size five"),
        ({"limit": 0}, SettingsError, "--limit is 0"),
        ({"dequantized_base": True}, SettingsError, "was not quantised"),
        ({"checkpoint": 8}, RunFolderError, "there is no .*checkpoint-8"),
    ],
)
def test_invalid_options_are_refused_at_once(options, error, says, run):
    with pytest.raises(error, match=says):
        merge_run(run, MergeOptions(**options))
    check_no_merge_is_left(run)


def test_missing_held_out_pairs_are_named_with_a_remedy(run, tmp_path):
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(DataError, match=r"pairs\.jsonl") as error:
        merge_run(run)
    assert "--no-proof" in error.value.do
    check_no_merge_is_left(run)


@pytest.mark.parametrize("record", [None, {"state": "failed"}])
def test_a_folder_without_a_run_is_one_message(record, tmp_path):
    if record is not None:
        RunDir(tmp_path).write_run(**record)
    with pytest.raises(RunFolderError, match="holds no run"):
        merge_run(RunDir(tmp_path))


def test_a_run_without_weights_is_one_message(run):
    run.adapter.rename(run.path / "elsewhere")
    run.write_run(state="running")
    with pytest.raises(RunFolderError, match=r"holds no weights: neither adapter/ nor model/.* is running"):
        merge_run(run)
    check_no_merge_is_left(run)


def test_a_second_merge_is_refused(run):
    made = merge_run(run, QUICK)
    done = dpokit("merge", str(run.path))
    assert done.returncode == 2
    assert f"exists already, made {made['when']} from adapter" in done.stderr
    assert f"delete {run.merged}" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(run.merge_json.read_text()) == made


def test_a_killed_merge_leaves_no_merged_and_the_next_cleans_up(run):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dpokit.merge import merge\n"
        "from dpokit.rundir import RunDir\n"
        "merge.reload = lambda *_, **__: time.sleep(600)\n"  # all files are written, the folder is not renamed yet
        "merge.merge_run(RunDir(sys.argv[1]), merge.MergeOptions(proof=False))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stderr=subprocess.PIPE, text=True)
    part = run.path / ".merged.part"
    try:
        while not (part / "tokenizer.json").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        with pytest.raises(RunFolderError, match="is being merged by another process"):
            merge_run(run, QUICK)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.wait()
    assert not run.merged.exists()
    (part / "of the killed merge").write_text("")
    merge_run(run, QUICK)
    assert not part.exists()
    assert not (run.merged / "of the killed merge").exists()
    assert (find_logits(load_merged(run)) - find_logits(load_adapted(run))).abs().max() < 1e-4


def test_a_model_damaged_while_written_is_not_kept(run, monkeypatch):
    from dpokit.merge import merge

    write = merge.write_model

    def write_and_damage(part, *rest, **more):
        written = write(part, *rest, **more)
        file = part / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return written

    monkeypatch.setattr(merge, "write_model", write_and_damage)
    with pytest.raises(ModelError, match="the loaded model differs from the written one: changed tensors: "):
        merge_run(run, QUICK)
    check_no_merge_is_left(run)


def test_a_full_disk_is_one_message_and_the_run_is_unharmed(tiny_gpt2, tmp_path):
    small = tmp_path / "small"
    with small_disk(small, "200k"):
        run = build_run(small, tiny_gpt2, lora("gpt2"))
        done = dpokit("merge", str(run.path))
        assert done.returncode == 2, done.stderr
        assert "no space is left on the disk" in done.stderr
        assert "Traceback" not in done.stderr
        check_no_merge_is_left(run)
        assert (run.adapter / "adapter_model.safetensors").exists()
        enlarge(small, "64m")
        merge_run(run, QUICK)
