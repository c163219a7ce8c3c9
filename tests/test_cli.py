"""The command line: what it prints, where, and with which exit code; in process and as a subprocess."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patching import SweepResult
from patching.cli import app
from patching.cli.options import names, numbers

ROOT = Path(__file__).parent.parent
OR = str(ROOT / "experiments/or_compiled.toml")
runner = CliRunner()


def invoke(*arguments: str, code: int = 0):
    done = runner.invoke(app, arguments, env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, f"exit {done.exit_code}\n{done.stdout}\n{done.stderr}"
    return done


def shell(*arguments: str, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "patching", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# Help


@pytest.mark.parametrize("command", ["run", "plan", "report", "tasks", "models", "validate", "sweep"])
def test_help_teaches_by_example(command: str) -> None:
    text = invoke(command, "--help").stdout

    assert f"patching {command} " in text[text.index("Example") :]


def test_help_names_every_command_and_exit_code() -> None:
    text = invoke("--help").stdout

    for word in ("run", "plan", "report", "tasks", "models", "validate", "sweep", "Exit codes: 0", "--json"):
        assert word in text


HELP = """
import sys
from patching.cli import app
try:
    app(["{command}", "--help"])
except SystemExit:
    pass
print([m for m in ("torch", "numpy", "transformer_lens") if m in sys.modules])
"""


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_help_does_not_wait_for_torch(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(command=command)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_wait_for_torch_would_be_seen() -> None:
    code = "import torch\n" + HELP.format(command="run")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "torch" in done.stdout.splitlines()[-1]


def test_the_version() -> None:
    from importlib.metadata import version

    assert invoke("--version").stdout == f"patching {version('patching')}\n"


# Experiments


def test_run_says_which_claims_hold(tmp_path: Path) -> None:
    done = invoke("run", OR, "--out", str(tmp_path / "or"))

    assert "holds  Denoising finds both inputs" in done.stdout
    assert f"3 of 3 claims hold. Report: {tmp_path}/or/report.html" in done.stdout
    assert (tmp_path / "or/report.html").exists()


def test_a_failing_claim_is_exit_code_1(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(Path(OR).read_text().replace("value = 1.0", "value = 0.5"))
    done = invoke("run", str(wrong), "--out", str(tmp_path / "out"), "--json", code=1)
    found = json.loads(done.stdout)

    assert (found["holding"], found["failing"]) == (2, 1)
    assert [claim["measured"] for claim in found["claims"] if not claim["holds"]] == ["2 cells, all 1"]


def test_errors_are_lines_and_exit_code_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(
        Path(OR).read_text().replace("question", "questoin").replace("[sweeps.noising]", "[swps.noising]")
    )
    done = invoke("run", str(bad), "--out", str(tmp_path / "out"), code=2)

    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "patching: bad.toml: the experiment does not read:"
    assert any("unknown key 'questoin'" in line for line in lines)
    assert any("unknown key 'swps'" in line for line in lines)
    assert "Traceback" not in done.stderr


def test_without_the_weights_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = shell("run", "experiments/ioi_gpt2.toml", "--out", str(tmp_path / "out"), code=2)

    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("patching: ")]
    assert "cannot load 'gpt2-small': the model hub is out of reach" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_exit_code_2() -> None:
    assert "No such option" in invoke("run", OR, "--uot", "x", code=2).stderr
    assert "No such command" in invoke("rnu", code=2).stderr


def test_plan_counts_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plans = json.loads(invoke("plan", OR, "--json").stdout)

    assert list(plans) == ["denoising", "noising"]
    assert plans["noising"]["sites"] == 2 * 3 * 4
    assert "24 sites × 3 pairs = 72 patched runs" in invoke("plan", OR).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_written_again(tmp_path: Path) -> None:
    invoke("run", OR, "--out", str(tmp_path / "or"))
    (tmp_path / "or/report.html").unlink()

    assert invoke("report", str(tmp_path / "or")).stdout == f"report: {tmp_path}/or/report.html\n"
    page = (tmp_path / "or/report.html").read_text()
    assert "Denoising finds both inputs" in page
    assert "prefers correct  clean 3 of 3, corrupted 0 of 3" in page
    invoke("report", str(tmp_path / "or/sweeps/noising"), "--out", str(tmp_path / "one.html"))
    assert (tmp_path / "one.html").stat().st_size > 10_000
    assert "no folder" in invoke("report", str(tmp_path / "nowhere"), code=2).stderr
    claims, validation = tmp_path / "or/claims.json", tmp_path / "or/validation.json"
    validation.write_text('[{"name": "x"}]')
    stopped = invoke("report", str(tmp_path / "or"), code=2).stderr
    assert "validation.json does not read" in stopped
    assert "the report: the key 'prompts' is missing." in stopped
    claims.write_text(claims.read_text().replace('"holds": true', '"holds": 1'))
    stopped = invoke("report", str(tmp_path / "or"), code=2).stderr
    assert "claims.json does not read" in stopped
    assert "claim 0: holds should be true or false, got 1." in stopped


# What there is


def test_tasks_are_listed_and_described() -> None:
    listed = invoke("tasks").stdout
    for name in ("ioi", "greater_than", "gendered_pronoun", "sva", "country_capital", "induction"):
        assert name in listed
    described = invoke("tasks", "ioi", "--examples", "1").stdout
    assert "* s2_swap (flips)" in described
    assert "clean      " in described
    found = json.loads(invoke("tasks", "ioi", "--json").stdout)
    assert found["corruptions"]["order_swap"]["label"] == "preserves"
    assert "unknown task 'iio'. Available: country_capital" in invoke("tasks", "iio", code=2).stderr


def test_models_are_listed() -> None:
    assert "compiled.saturated" in invoke("models").stdout
    found = json.loads(invoke("models", "gpt2", "--json").stdout)
    assert found["offline"] == {}
    assert "gpt2-small" in found["download"]
    assert "no model's name contains 'nonesuch'" in invoke("models", "nonesuch", code=1).stderr


# Prompts and sweeps


def test_validate_tells_fit_from_unfit() -> None:
    assert "usable" in invoke("validate", "ioi", "-n", "4").stdout
    done = invoke("validate", "ioi", "-c", "order_swap", "-n", "6", "--json", code=1)
    found = json.loads(done.stdout)
    assert found["usable"] == 0
    assert "still prefers" in found["unusable"][0]["why"][0]


def test_a_sweep_prints_what_the_library_measures(tmp_path: Path) -> None:
    done = invoke(
        "sweep", "--model", "compiled.or_gate", "--over", "layer,role,head", "--json", "-k", "2", "--save",
        str(tmp_path / "saved"), "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "a.pdf"),
    )  # fmt: skip
    found = json.loads(done.stdout)

    assert found["top"] == [
        {"layer": 0, "role": "END", "head": 0, "effect": 1.0},
        {"layer": 0, "role": "END", "head": 1, "effect": 1.0},
    ]
    assert SweepResult.load(tmp_path / "saved").effect().tolist() == found["effect"]
    assert (tmp_path / "rows.csv").read_text().count("\n") == 1 + 24 * 3
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_a_sweep_for_people() -> None:
    done = invoke(
        "sweep", "ioi", "-n", "4", "-a", "attn_out,mlp_out", "--over", "layer,role", "--layers", "0-1"
    )

    assert done.stdout.startswith(
        "denoising of attn_out, mlp_out: 2 activation × 2 layer × 5 role, 4 pairs\n"
    )
    assert "attn_out L0 S2" in done.stdout


def test_a_warning_is_a_line_on_stderr() -> None:
    done = invoke("sweep", "ioi", "-n", "8", "-c", "order_swap", "--over", "layer", "--json")

    assert json.loads(done.stdout)["effect"] == [None] * 4
    assert done.stderr.startswith("warning: sweep: the mean gap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ioi", "-a", "zz"], "unknown activation or hook point 'zz'"),
        (["ioi", "--over", "layer,haed"], "unknown axis 'haed'"),
        (["ioi", "--layers", "9"], "layer 9 does not exist"),
        (["ioi", "--direction", "up"], "unknown direction 'up'. Available: denoising, noising"),
        (["ioi", "-c", "swap"], "unknown corruption 'swap'"),
        (["ioi", "-m", "compiled.nand"], "unknown compiled circuit 'nand'. Available: adder"),
        (["ioi", "-m", "compiled.or_gate"], "has its own prompts; leave out: name"),
        ([], "which task?"),
        (["nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_wrong_request_is_one_readable_line(arguments: list[str], message: str) -> None:
    done = invoke("sweep", *arguments, code=2)

    assert done.stdout == ""
    assert done.stderr.startswith("patching: ")
    assert message in done.stderr


def test_lists_with_commas() -> None:
    assert names("layer, head") == ["layer", "head"]
    assert numbers("0-2,7,-1,END,S1+1") == [0, 1, 2, 7, -1, "END", "S1+1"]
    assert names(None) is numbers(None) is None


def test_a_pipe_gets_plain_json_and_no_colours(tmp_path: Path) -> None:
    done = shell("sweep", "--model", "compiled.or_gate", "--over", "layer,head", "--json", cwd=tmp_path)

    assert json.loads(done.stdout)["axes"] == {"layer": [0, 1], "head": [0, 1, 2, 3]}
    for text in (done.stdout, shell("tasks", "ioi").stdout, shell("--help").stdout):
        assert "\x1b" not in text


def test_what_libraries_print_is_not_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from patching.experiment import material

    load = material.model_of
    monkeypatch.setattr(
        material, "model_of", lambda name: sys.stdout.write("Loaded the model") and load(name)
    )
    done = invoke("sweep", "--model", "compiled.or_gate", "--over", "layer", "--json")

    assert json.loads(done.stdout)["axes"] == {"layer": [0, 1]}
    assert "Loaded the model" in done.stderr
