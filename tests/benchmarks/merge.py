"""Memory and time of merging a random Llama of 1 GB with a LoRA adapter on every linear layer, with and without proof.

    python tests/benchmarks/merge.py
    python tests/benchmarks/merge.py --pairs 8

Each merge is a fresh process, watched from outside: "memory" is its own, written pages (RssAnon, sampled every 5 ms),
above what it held once all was imported; "resident" is the peak of all pages (VmHWM), also above that, with those of
the files that it reads and maps, which the system takes back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from hh import TOKENIZER, read_pairs
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

GB = 1e9
LAYERS = {"float32": 13, "bfloat16": 34}  # which give 1 GB each, with a vocabulary of 50,257
WORKER = """
import json, sys, time
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.rundir import RunDir
print("idle", flush=True)
sys.stdin.readline()
began = time.monotonic()
made = merge_run(RunDir(sys.argv[1]), MergeOptions(**json.loads(sys.argv[2])))
print(json.dumps(made | {"seconds": time.monotonic() - began}), flush=True)
sys.stdin.readline()
"""


def build_run(folder: Path, dtype: str) -> tuple[Path, float]:
    """A run folder with base and adapter, as training leaves them; and the base's bytes."""
    from dpokit.settings.load import load_settings

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS[dtype],
        num_attention_heads=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    run = folder / "run"
    adapted.save_pretrained(run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_pairs(100, "test")))
    named = {"model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "pairs.jsonl")}
    named |= {"dataset_test_split": "train", "use_peft": True, "dtype": dtype, "max_length": 512}
    named |= {"output_dir": str(run), "use_cpu": True, "report_to": "none"}
    settings = load_settings("benchmark", named, [])
    (run / "run.json").write_text(json.dumps({"state": "finished", "settings": settings.record()}))
    return run, sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def read_kib(pid: int, name: str) -> float:
    """A line of /proc/PID/status, in GB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / GB


def watch(run: Path, options: dict[str, object]) -> dict[str, float]:
    """A merge in a process of its own: peaks above its idle state, in GB, and seconds."""
    subprocess.run(["rm", "-rf", str(run / "merged")], check=True)
    words = [sys.executable, "-c", WORKER, str(run), json.dumps(options)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while process.stdout.readline() != b"idle\n":
            assert process.poll() is None
        idle = {name: read_kib(process.pid, name) for name in ("RssAnon", "VmRSS")}
        os.set_blocking(process.stdout.fileno(), False)
        process.stdin.write(b"\n")
        process.stdin.flush()
        peak, answer = 0.0, None
        while not answer:
            assert process.poll() is None, "the merge failed"
            peak = max(peak, read_kib(process.pid, "RssAnon"))
            time.sleep(0.005)
            answer = process.stdout.readline()
        resident = read_kib(process.pid, "VmHWM") - idle["VmRSS"]
        process.stdin.write(b"\n")
        process.stdin.flush()
    made = json.loads(answer)
    return {"memory": peak - idle["RssAnon"], "resident": resident, **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16, help="Held-out HH pairs of the proof.")
    parser.add_argument("--dtypes", nargs="+", choices=LAYERS, default=list(LAYERS))
    asked = parser.parse_args()
    print(
        f"{'model':<22}{'proof':<10}{'memory, GB':>11}{'resident':>10}{'seconds':>9}{'mean drift':>12}{'largest':>10}"
    )
    for dtype in asked.dtypes:
        with tempfile.TemporaryDirectory() as name:
            run, size = build_run(Path(name), dtype)
            for options in ({"proof": False}, {"limit": asked.pairs}):
                found = watch(run, options)
                proof = "none" if found["pairs"] is None else f"{found['pairs']} pairs"
                drift = [
                    f"{found[key]:.1e}" if found[key] is not None else "" for key in ("mean_drift", "largest_drift")
                ]
                print(
                    f"{size / GB:.2f} GB, {dtype:<13}{proof:<10}{found['memory']:>11.2f}{found['resident']:>10.2f}"
                    f"{found['seconds']:>9.0f}{drift[0]:>12}{drift[1]:>10}",
                    flush=True,
                )
    print(f"{date.today()}, {os.cpu_count()} CPU cores")


if __name__ == "__main__":
    main()
