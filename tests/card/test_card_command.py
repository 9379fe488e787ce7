"""`dpokit card` as a command and on a real run: without torch, network or local paths."""

import getpass
import json
import os
import re
import subprocess
import sys

import pytest
from card_pages import check_page, parse, show
from conftest import ROOT, write_pairs
from run_folders import make_run

from dpokit.card.card import write_card
from dpokit.card.front_matter import check_front_matter
from dpokit.evaluate.answers import Sampling
from dpokit.evaluate.command import run_evaluation
from dpokit.run import train
from dpokit.rundir import RunDir

# Any network access ends the process; HF_HUB_OFFLINE is not set.
ALONE = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise SystemExit(f"network access: {event} {arguments}")
sys.addaudithook(refuse)
from dpokit.cli import main
sys.argv[0] = "dpokit"
try:
    main()
finally:
    print(sorted({"torch", "transformers", "trl", "peft"} & set(sys.modules)))
"""


def run_card(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "0", "COLUMNS": "120"}
    command = [sys.executable, "-c", ALONE, "card", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


@pytest.mark.cold
def test_the_command_prints_the_path_without_torch_or_network(tmp_path):
    make_run(tmp_path / "run", [])
    flags = ("--license", "mit", "--language", "en", "--language", "de", "--repo-id", "me/tuned", "--contact", "me")
    done = run_card("run", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run/README.md\n[]\n"), done.stderr
    text = (tmp_path / "run" / "README.md").read_text()
    assert check_front_matter(text)["language"] == ["en", "de"]
    assert "\n# tuned\n" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no licence is set"),
        (("--license", "apache"), "such as apache-2.0"),
        (("--license", "mit", "--language", "deutsch"), "--language deutsch"),
        (("--license", "mit", "--weights", "adapter"), "has no adapter/"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, says, tmp_path):
    make_run(tmp_path / "run", [])
    done = run_card("run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_the_card_of_a_real_run_has_its_numbers_but_no_paths(use_peft, tiny_gpt2, tmp_path):
    settings = {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 20)),
        "output_dir": str(tmp_path / "run"),
        "eval_fraction": 0.4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "use_peft": use_peft,
    }
    run = train("dpo_test", settings, [])
    sampling = Sampling(max_new_tokens=8)
    nothing = dict.fromkeys(("base", "data", "split", "limit"))
    run_evaluation(str(run.path), **nothing, argv=[], answers=2, sampling=sampling)
    card = write_card(run, license="mit").read_text()
    data = check_front_matter(card)
    assert not {"base_model", "datasets"} & set(data)
    page = parse(show(card))
    check_page(page)
    pairs = json.loads(run.evaluations()[-1].pairs_json.read_text())
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == pairs["tuned"]["accuracy"]["value"]
    assert pairs["verdict"]["text"] in page.text
    assert "device: CPU" in page.text
    assert f"{tiny_gpt2.name} (local, not on the Hub)" in page.text
    pictures = b"".join(path.read_bytes() for path in run.figures.iterdir())
    for folder in (tmp_path, tiny_gpt2.parent, ROOT):
        assert str(folder) not in card
        assert str(folder).encode() not in pictures
    for name in {os.uname().nodename, getpass.getuser()}:
        assert not re.search(rf"\b{re.escape(name)}\b", card), name
    assert RunDir(run.path).card in run.own_files()
