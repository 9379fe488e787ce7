"""`dpokit data check`: its page, its files, its exit codes."""

import json

import pytest
from chromium import serve, skip_without_chromium
from typer.testing import CliRunner

from dpokit.data.doctor import pairs
from dpokit.data.doctor.check import check_data
from dpokit.errors import RunFolderError
from dpokit.report.data_page import build_check_page, make_check_folder, write_check
from dpokit.settings.flags import DataArguments
from dpokit.verbs.app import app

HOSTILE = "</style></title><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a file whose every text is hostile, with most kinds of findings."""
    file = tmp_path_factory.mktemp("data") / "<b>pairs.jsonl"
    answers = [f"Yes! {number} {HOSTILE}\x1b[2J" for number in range(60)]
    rows = [{"prompt": f"{HOSTILE} {n % 30}", "chosen": text, "rejected": "no"} for n, text in enumerate(answers)]
    rows += [{"prompt": HOSTILE, "chosen": HOSTILE, "rejected": ""}] * 20
    rows += rows[:5] + [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:3]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_data([str(file)], DataArguments())


def run(*argv: str):
    return CliRunner().invoke(app, ["data", "check", *argv])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    file = tmp_path_factory.mktemp("clean") / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"It was {n}."} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    return write_check(tmp_path_factory.mktemp("written"), record)


def test_the_page_escapes_every_text_and_loads_nothing(written):
    page = written.page.read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_and_runs_no_script(written, width):
    skip_without_chromium()
    look = "[page.title, page.documentElement.scrollWidth, page.querySelectorAll('script, img, b').length]"
    with serve(written.page.parent) as site:
        for dark in (False, True):
            title, wide, elements = site.measure("data-check.html", look, width=width, dark=dark)
            assert title.endswith("dpokit data check")
            assert wide <= width
            assert elements == 0


def test_the_same_record_gives_the_same_bytes(record, written, tmp_path):
    first, second = written, write_check(tmp_path, record)
    assert first.page.read_bytes() == second.page.read_bytes()
    assert first.record.read_bytes() == second.record.read_bytes()


def test_the_page_shows_findings_figures_and_examples(record):
    page = build_check_page(record)
    assert len(page["figures"]) == 2
    assert all("<svg" in figure["svg"] for figure in page["figures"])
    assert len(page["notes"]) == sum(finding["is_problem"] for finding in record["findings"]) > 3
    titles = [sample["title"] for sample in page["samples"]]
    assert any(title.startswith("repeated pairs") and "equal to" in title for title in titles)


def test_a_second_check_replaces_the_first_one_only(written, record, tmp_path):
    copy = tmp_path / "data-check.html"
    copy.write_bytes(written.page.read_bytes())
    make_check_folder(tmp_path)
    (tmp_path / "data-check.json").write_text('{"mine": 1}')
    with pytest.raises(RunFolderError, match=r"data-check\.json exists, and dpokit data check did not write it"):
        write_check(tmp_path, record)
    assert (tmp_path / "data-check.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 2)])
def test_a_finding_is_an_error_only_with_strict(record, strict, code):
    done = run(record["sources"][0], *strict)
    assert done.exit_code == code, done.stderr
    assert "! repeated pairs" in done.stdout.replace("!  ", "! ")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 2)])
def test_a_strict_check_without_rensa_fails(clean, monkeypatch, strict, code):
    monkeypatch.setattr(pairs, "can_sign", lambda: False)
    done = run(clean, *strict)
    assert done.exit_code == code
    *_, last = done.stdout.split("\n\n")
    assert "so --strict ends with exit code 2: pip install 'dpokit[data]'" in " ".join(last.split())


def test_a_file_without_findings_ends_well_with_strict(clean, tmp_path):
    done = run(clean, "--strict", "--json", "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    written = json.loads((tmp_path / "out" / "data-check.json").read_text())
    assert written == {"made_by": "dpokit data check"} | json.loads(done.stdout)


def test_training_flags_reach_the_check(clean, tmp_path, tiny_gpt2):
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.2\nmax_length: 12\n")
    flags = ["--config", str(config), "--max_train_samples", "3", "--model_name_or_path", str(tiny_gpt2)]
    record = json.loads(run(clean, "--json", *flags).stdout)
    assert record["splits"][0]["rows"] == 3
    assert record["limits"][0]["max_length"] == 12
    assert record["lengths"]["unit"] == "tokens"


@pytest.mark.parametrize("key", ["datasets", "dataset_name"])
def test_a_config_file_names_the_sources(clean, tmp_path, key):
    config = tmp_path / "mix.yaml"
    config.write_text(f"{key}: {json.dumps(clean if key == 'dataset_name' else [{'path': clean}])}\n")
    record = json.loads(run("--config", str(config), "--json").stdout)
    assert record["sources"] == [clean]
    assert record["splits"][0]["rows"] == 5


def test_flags_of_a_run_on_chosen_answers_are_taken(clean):
    done = run(clean, "--json", "--completion_only_loss", "false")
    assert json.loads(done.stdout)["splits"][0]["rows"] == 5, done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/nowhere.jsonl"], "there is no such file"),
        ([], "no source was named"),
        (["--columns", "prompt=q"], "no source was named"),
        (["FILE", "--dataset_name", "other.jsonl"], "the pairs are named 2 times"),
        (["FILE", "--datasets", '{"path": "other.jsonl"}'], "leave --datasets out"),
        (["--datasets", '{"path": "a"}', "--dataset_name", "b"], "--dataset_name, --datasets: the pairs are named 2"),
        (["FILE", "--bta", "0.5"], "there is no setting 'bta'"),
        (["FILE", "--dataset_test_split", "test"], "there is no split 'test'"),
        (["FILE", "--columns", "prompt=nowhere"], "has no column nowhere"),
        (["FILE", "--model_name_or_path", "no/such"], "no/such"),
        (["FILE", "--output", "FILE/folder"], "a part of the path is a file"),
    ],
)
def test_a_mistake_of_the_check_is_one_message(clean, argv, says):
    done = run(*(clean if word == "FILE" else word.replace("FILE/", f"{clean}/") for word in argv))
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("do this:") == 1
    assert done.stdout == ""
