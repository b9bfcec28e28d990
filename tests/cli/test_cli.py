"""The command line as a user meets it: answers, exit codes, sentences; a few real processes for signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from cases import each

import patchssl as package
from patchssl.cli import build_app
from patchssl.runtime import errors

ROOT = Path(package.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
COMMANDS = [[], ["quickstart"], ["pretrain"], ["study"], ["eval"], *(["eval", name] for name in (
                "knn", "linear", "copydays", "revisited", "patches", "all")),
            ["models"], ["inspect"], ["export"], ["tables"], ["compare"], ["report"],
            ["data"], *(["data", name] for name in ("get", "check", "imagenet100", "make-copydays", "make-revisited")),
            ["plot"], *(["plot", name] for name in ("attention", "pca", "matches", "views", "curves", "robustness",
                                              "study", "attention-video")),
            ["bench"], *(["bench", name] for name in ("views", "matching", "step", "eval")),
            ["cache"], ["doctor"]]


def start(*arguments, cwd):
    return subprocess.Popen([sys.executable, "-m", "patchssl", *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def words(text):
    """`text` without rich's frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# what answers at once

def test_help_of_every_command_needs_no_torch_and_no_network(tmp_path):
    code = ("import contextlib, io, json, socket, sys\n"
            "def refuse(*a, **k): raise AssertionError('network')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "from patchssl.cli import main\n"
            "answers = []\n"
            f"for command in {COMMANDS!r}:\n"
            "    sys.argv = ['patchssl', *command, '--help']\n"
            "    out = io.StringIO()\n"
            "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main()\n"
            "    answers.append(out.getvalue())\n"
            "print(json.dumps([answers, sorted(sys.modules)]))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env=ENVIRONMENT)
    answers, modules = json.loads(done.stdout)
    for command, answer in zip(COMMANDS, answers, strict=True):
        assert "Usage: patchssl" in answer and " ".join(command) in words(answer)
    assert not {"torch", "timm", "faiss", "matplotlib", "numpy", "pandas"} & set(modules)


def test_the_list_of_commands_above_is_complete():
    groups = {group.name: group.typer_instance for group in build_app().registered_groups}
    names = [[command.name or command.callback.__name__] for command in build_app().registered_commands]
    for name, group in groups.items():
        names += [[name], *([name, c.name or c.callback.__name__] for c in group.registered_commands)]
    assert sorted(names) == sorted(COMMANDS[1:])


def test_usage_reads_well(patchssl):
    assert "[RECIPE] [KEY=VALUE]..." in words(patchssl("pretrain", "--help").out)
    assert "[KEY=VALUE]..." in words(patchssl("quickstart", "--help").out)


def test_version(patchssl):
    answer = patchssl("--version")
    assert (answer.code, answer.out) == (0, f"patchssl {package.__version__}\n")


@each("command", [[], ["eval"], ["data"], ["plot"], ["bench"]])
def test_a_bare_group_shows_its_commands(patchssl, command):
    answer = patchssl(*command)
    assert answer.code == 2
    assert "Commands" in answer.out + answer.err


# wrong arguments: exit code 2 and a sentence

WRONG = {
    "recipe": (["pretrain", "quickstrat"], "did you mean 'quickstart'?"),
    "no recipe": (["pretrain"], "name a recipe first"),
    "override before recipe": (["pretrain", "optim.lr=1"], "name a recipe first"),
    "yaml": (["pretrain", "missing.yaml"], "missing.yaml is not a file"),
    "key": (["pretrain", "quickstart", "optim.epoch=3"], "did you mean 'optim.epochs'?"),
    "key of another part": (["pretrain", "quickstart", "epochs=3"], "did you mean 'optim.epochs'?"),
    "part": (["pretrain", "quickstart", "optim=3"], "optim.epochs"),
    "no value": (["pretrain", "quickstart", "optim.epochs"], "is not key=value"),
    "type": (["pretrain", "quickstart", "optim.epochs=many"], "optim.epochs = 'many'"),
    "range": (["pretrain", "quickstart", "optim.epochs=-1"], "optim.epochs = -1"),
    "size": (["pretrain", "quickstart", "views.global_size=30"], "views.global_size = 30 is not a multiple"),
    "device of pretrain": (["pretrain", "quickstart", "--device", "gpu"], "device gpu cannot be used"),
    "device of a plan": (["pretrain", "quickstart", "--dry-run", "--device", "gpu"], "device gpu cannot be used"),
    "device of quickstart": (["quickstart", "--device", "gpu"], "device gpu cannot be used"),
    "device of knn": (["eval", "knn", "pixels", "--data", "textures", "--device", "gpu"], "device gpu cannot be used"),
    "empty data": (["pretrain", "quickstart", "--data", ""], "--data is empty"),
    "empty out": (["pretrain", "quickstart", "--out", ""], "--out is empty; name a folder"),
    "empty out, with a sign": (["pretrain", "quickstart", "--out="], "--out is empty"),
    "empty out of quickstart": (["quickstart", "--out", ""], "--out is empty"),
    "empty out of a study": (["study", "textures", "--out", ""], "--out is empty"),
    "empty out of tables": (["tables", "--out", ""], "--out is empty"),
    "empty out of a report": (["report", "--out", ""], "--out is empty"),
    "empty out of an export": (["export", "runs/none", "--out", ""], "--out is empty"),
    "empty data of knn": (["eval", "knn", "pixels", "--data", ""], "--data is empty"),
    "no data": (["pretrain", "cifar10"], "give --data FOLDER"),
    "quickstart without data": (["quickstart", "data="], "add data=FOLDER"),
    "set": (["eval", "knn", "pixels", "--data", "texture"], "did you mean 'textures'?"),
    "model": (["eval", "knn", "runs/none", "--data", "textures"], "does not exist, and nothing else is loaded"),
    "timm model": (["eval", "knn", "timm:vit_tiny_patch16_244", "--data", "textures"], "'vit_tiny_patch16_224'?"),
    "option of random": (["eval", "knn", "random:vit_tiny_patch16_224?size=32", "--data", "textures"], "'img_size'?"),
    "option of pixels": (["eval", "knn", "pixels?size=32", "--data", "textures"], "pixels?img_size=32"),
    "protocol of pixels": (["eval", "knn", "pixels", "--data", "textures", "--protocol", "dino"], "native, not dino"),
    "run to resume": (["pretrain", "--resume", "nowhere"], "nowhere is not a run folder"),
    "changes of a new run": (["pretrain", "quickstart", "--allow-changes"], "belongs to --resume RUN"),
    "slurm option alone": (["pretrain", "quickstart", "--slurm-gpus", "2"], "--slurm-gpus needs --slurm"),
    "slurm cluster": (["pretrain", "quickstart", "--slurm", "--slurm-cluster", "slurmm"], "did you mean 'slurm'?"),
    "slurm option": (["pretrain", "quickstart", "--slurm", "--slurm-option", "mem"], "mem is not KEY=VALUE"),
    "slurm recipe": (["pretrain", "quickstrt", "--slurm"], "did you mean 'quickstart'?"),
    "slurm without data": (["pretrain", "cifar10", "--slurm"], "give --data FOLDER"),
    "rule": (["plot", "matches", "textures:0", "--rule", "centre"], "loss.rule = 'centre'"),
    "figure": (["plot", "views", "textures:0", "--out", "views.xyz"], "'xyz'"),
    "color of views": (["plot", "views", "textures:0", "--patchwise", "layer"], "did you mean 'layered'?"),
    "no color of views": (["plot", "views", "textures:0", "--patchwise", ""], "choose one of: all, layered, none"),
    "run of curves": (["plot", "curves", "nowhere"], "nowhere is not a run folder"),
    "size of attention": (["plot", "attention", "random:vit_tiny_patch16_224", "textures:0", "--size", "8"],
                          "patch size of 16"),
    "option": (["pretrain", "quickstart", "--epochs", "3"], "No such option"),
    "seed": (["pretrain", "quickstart", "--seed", "-1"], "greater than or equal to 0"),
    "huge seed": (["pretrain", "quickstart", "--seed", str(2**64)], "beyond 64 bits; choose a whole number from 0 to"),
    "huge seed of a plan": (["pretrain", "quickstart", "--seed", str(10**30), "--dry-run"], "beyond 64 bits"),
    "huge seed of a job": (["pretrain", "quickstart", "--seed", str(10**30), "--slurm"], "beyond 64 bits"),
    "huge seed of quickstart": (["quickstart", "--seed", str(2**64)], "beyond 64 bits"),
    "huge seed of a model": (["eval", "knn", f"random:vit_tiny_patch16_224?seed={2**64}", "--data", "textures"],
                             "is not a whole number below 10^18"),
    "seed that is no whole number": (["pretrain", "quickstart", "--seed", "1.5"], "valid integer"),
    "missing option": (["eval", "knn", "pixels"], "Missing option '--data'"),
    "command": (["evaluate"], "No such command"),
}


def test_out_may_be_the_folder_one_is_in(patchssl, tmp_path, monkeypatch, colors, tiny):
    monkeypatch.chdir(tmp_path)
    assert patchssl("pretrain", "quickstart", *tiny, "--data", colors, "--out", ".").code == 0
    assert (tmp_path / "run.json").is_file()


@each("case", WRONG)
def test_wrong_usage_is_a_sentence_and_code_2(patchssl, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = WRONG[case]
    answer = patchssl(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert sentence in words(answer.err)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_protocol_names_the_known_ones(patchssl, tiny_run, colors):
    answer = patchssl("eval", "knn", tiny_run, "--data", colors, "--protocol", "ibot")
    assert answer.code == 2
    assert "dino, native" in answer.err


@each(("more", "sentence"), [
    (["quickstart"], "--resume RUN takes no RECIPE (quickstart)"),
    (["--data", "textures"], "--resume RUN takes no --data"),
    (["--out", "x", "--seed", "0"], "--resume RUN takes no --out, --seed"),
    (["--dry-run"], "--resume RUN takes no --dry-run"),
    (["optim.lr=1"], "optim.lr was 0.008, now 1.0; put it back, or give --allow-changes"),
    (["run.workers=1", "optim.epochs=3"], "optim.epochs was 2, now 3; put it back, or give --allow-changes"),
    (["model.depth=2", "--allow-changes"], "model.depth was 1, now 2: the checkpoints"),
    (["optim.epoch=3"], "did you mean 'optim.epochs'"),
    (["optim.epochs=1", "--allow-changes"], "optim.epochs = 1, but 2 epochs are done"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_resume_refuses_to_change_the_run(patchssl, tiny_run, more, sentence):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.iterdir()}
    answer = patchssl("pretrain", "--resume", tiny_run, *more)
    assert answer.code == 2
    assert sentence in words(answer.err)
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.iterdir()}


def test_a_second_run_in_the_same_folder_is_refused(patchssl, tiny_run, colors, tiny):
    answer = patchssl("pretrain", "quickstart", *tiny, "--data", colors, "--out", tiny_run)
    assert answer.code == 2
    assert f"--resume {tiny_run}" in answer.err


# bad data: exit code 4

def bad_data(folder):
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "note.txt").write_text("no image")
    (folder / "note.jpg").write_text("no image either")


BAD = {
    "missing path": (["pretrain", "quickstart", "--data", "./nowhere"], "./nowhere does not exist"),
    "empty folder": (["pretrain", "quickstart", "--data", "empty"], "0 images in empty"),
    "folder of texts": (["eval", "knn", "pixels", "--data", "text"], "text has no train images"),
    "text named .jpg": (["plot", "views", "note.jpg"], "the file begins with b'no image"),
    "file for a folder": (["pretrain", "quickstart", "--data", "note.jpg"], "note.jpg is a file"),
    "missing image": (["plot", "matches", "photo.jpg"], "neither an image file nor SET:INDEX"),
    "index": (["plot", "matches", "textures:6000"], "the last is textures:5999"),
    "no records": (["tables", "--results", "empty"], "patchssl eval knn MODEL"),
    "quickstart without val": (["quickstart", "data=empty"], "empty has no train images"),
}


@each("case", BAD)
def test_bad_data_is_a_sentence_and_code_4(patchssl, tmp_path, monkeypatch, case):
    bad_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[case]
    answer = patchssl(*arguments)
    assert (answer.code, answer.out) == (4, "")
    assert sentence in answer.err
    assert "Traceback" not in answer.err


def test_knn_needs_labels(patchssl, tmp_path, photo):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(photo.read_bytes())
    answer = patchssl("eval", "knn", "pixels", "--data", tmp_path, "--results", tmp_path / "results")
    assert answer.code == 4
    assert "needs labels" in answer.err


# errors that are not ours

@each(("error", "code", "sentence"), [
    (errors.NotFiniteError("the loss is nan"), 3, "patchssl: the loss is nan\n"),
    (errors.Interrupted("saved", 75), 75, "patchssl: saved\n"),
    (PermissionError(13, "Permission denied", "/x"), 1, "patchssl: /x cannot be used: Permission denied\n"),
    (ZeroDivisionError("why"), 1, "patchssl: this should not happen, please report it: ZeroDivisionError: why "
               "(PATCHSSL_DEBUG=1 shows where)\n"),
], ids=["not finite", "signal", "system", "bug"])
def test_every_error_becomes_a_sentence_and_a_code(patchssl, monkeypatch, error, code, sentence):
    def fail():
        raise error

    monkeypatch.setattr("patchssl.cli.doctor.diagnose", fail)
    answer = patchssl("doctor")
    assert (answer.code, answer.err) == (code, sentence)


def test_a_traceback_only_when_asked_for(patchssl, monkeypatch):
    monkeypatch.setenv("PATCHSSL_DEBUG", "1")
    with pytest.raises(errors.UsageError):
        patchssl("pretrain", "quickstrat")


# what works

def test_a_plan_says_what_a_run_costs_and_writes_nothing(patchssl, tmp_path, monkeypatch, colors, tiny):
    monkeypatch.chdir(tmp_path)
    text = patchssl("pretrain", "quickstart", *tiny, "--data", colors, "--dry-run")
    assert text.code == 0
    assert "48 images, 2 epochs of 6 updates: 12 in all" in text.out
    assert re.search(r"about [\d.]+ \w+( to [\d.]+ \w+)? in all, [\d.]+ GiB of memory", text.out)
    plan = json.loads(patchssl("pretrain", "quickstart", *tiny, "--data", colors, "--dry-run", "--json").out)
    assert (plan["images"], plan["total_steps"]) == (48, 12)
    assert plan["estimated_seconds"] == pytest.approx(12 * plan["seconds_per_step"])
    assert list(tmp_path.iterdir()) == []


def test_a_plan_warns_of_what_the_run_will_not_do(patchssl, tmp_path, monkeypatch, photo, tiny):
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(photo.read_bytes())
    asked = ["pretrain", "quickstart", *tiny, "loss.patch_warmup_epochs=0", "optim.warmup_epochs=10",
             "run.knn_every_epochs=1", "--data", ".", "--dry-run"]
    plan = json.loads(patchssl(*asked, "--json").out)
    assert [sentence.partition(",")[0] for sentence in plan["warnings"]] == [
        "optim.warmup_epochs = 10 is too long for optim.epochs = 2: the learning rate only rises",
        "run.knn_every_epochs = 1"]
    assert "has no labels: no k-NN is measured while it trains" in plan["warnings"][1]
    text = patchssl(*asked).out
    assert text.splitlines()[-2:] == [f"warning: {sentence}" for sentence in plan["warnings"]]


def test_a_warning_for_users_is_a_line_without_code(patchssl, tmp_path, monkeypatch):
    (tmp_path / "old.yaml").write_text("photometric: {patch_share: 0.3}\noptim: {epochs: 0}\n")
    answer = patchssl("pretrain", tmp_path / "old.yaml", "--data", "textures")
    first, second = answer.err.splitlines()
    assert first.startswith(f"warning: {tmp_path / 'old.yaml'} has photometric.patch_share and no photometric.")
    assert "FutureWarning" not in first and ".py:" not in first
    assert "optim.epochs = 0" in second
    monkeypatch.setenv("RANK", "1")  # one of several processes says it
    planned = patchssl("pretrain", tmp_path / "old.yaml", "--data", "textures", "--dry-run")
    assert planned.err.splitlines() == [second]


def test_other_warnings_stay_what_python_makes_of_them(patchssl, monkeypatch):
    def warn():
        warnings.warn("odd", RuntimeWarning, stacklevel=1)
        raise errors.UsageError("the end")

    monkeypatch.setattr("patchssl.cli.doctor.diagnose", warn)
    shown = warnings.showwarning
    with pytest.warns(RuntimeWarning, match="odd"):
        assert patchssl("doctor").err == "patchssl: the end\n"
    assert warnings.showwarning is shown


def test_pretrain_then_score_then_table(patchssl, tmp_path, monkeypatch, colors, tiny):
    monkeypatch.chdir(tmp_path)
    made = patchssl("pretrain", "quickstart", *tiny, "--data", colors, "--seed", "3", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out) == {"run": "runs/quickstart-3"}
    assert "48 train images in 3 classes" in made.err and "training 12 of 12" in made.err
    scored = patchssl("eval", "knn", "runs/quickstart-3", "--data", colors, "--workers", "0", "--json")
    record = json.loads(scored.out)
    assert (record["method"], record["seed"], record["protocol"]) == ("pwself", 3, "native")
    pixels = patchssl("eval", "knn", "pixels?img_size=32", "--data", colors)
    assert pixels.code == 0, pixels.err
    assert "pixels-32 on colors, protocol native: 20-NN top-1 100.0%" in pixels.out
    assert Path(pixels.out.splitlines()[-1].removeprefix("written to ")).is_file()
    table = patchssl("tables", "--out", "report")
    assert table.code == 0
    rows = [line for line in table.out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and rows[0].count("20-NN top-1") == 1  # header, rule, two rows that share a column
    assert table.out.rstrip("\n") in (tmp_path / "report" / "table.md").read_text()


def test_a_record_that_cannot_be_read_is_named_and_the_code_says_so(patchssl, tmp_path, colors):
    assert patchssl("eval", "knn", "pixels", "--data", colors, "--results", tmp_path).code == 0
    (tmp_path / "other.json").write_text("{}")
    answer = patchssl("tables", "--results", tmp_path)
    assert answer.code == 1
    assert "Raw pixels" in answer.out and "skipped: " in answer.err and "other.json" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["attention", "matches", "views", "curves"])
def test_plot_writes_the_figure_it_names(patchssl, tmp_path, tiny_run, photo, what):
    out = tmp_path / "new" / f"{what}.png"
    arguments = {"attention": [tiny_run, photo, "textures:3"], "matches": [photo, "--recipe", tiny_run],
                 "views": [photo, "textures:3", "--recipe", tiny_run], "curves": [tiny_run]}[what]
    answer = patchssl("plot", what, *arguments, "--out", out)
    assert (answer.code, answer.out) == (0, f"{out}\n"), answer.err
    assert out.read_bytes().startswith(b"\x89PNG")


@each("patchwise", ["none", "all"])
def test_views_are_drawn_under_the_color_that_is_asked_for(patchssl, tmp_path, tiny_run, photo, patchwise):
    out = tmp_path / "views.png"
    answer = patchssl("plot", "views", photo, "--recipe", tiny_run, "--patchwise", patchwise, "--out", out)
    assert (answer.code, answer.out) == (0, f"{out}\n"), answer.err
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written_is_a_sentence(patchssl, tmp_path, tiny_run, photo):
    (tmp_path / "file").write_text("")
    answer = patchssl("plot", "views", photo, "--recipe", tiny_run, "--out", tmp_path / "file" / "views.png")
    assert answer.code != 0
    assert str(tmp_path / "file") in answer.err and "Traceback" not in answer.err


def test_doctor_prints_text_and_json(patchssl):
    text, machine = patchssl("doctor"), patchssl("doctor", "--json")
    assert text.code == machine.code
    assert "torch" in text.out
    assert json.loads(machine.out)


# signals, on real processes

@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_the_run_which_can_go_on(tmp_path, colors, tiny, sent, code):
    run = tmp_path / "run"
    endless = [*tiny, "optim.epochs=100000"]
    process = start("pretrain", "quickstart", *endless, "--data", colors, "--out", run, cwd=tmp_path)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert f"saved; resume with: patchssl pretrain --resume {run}" in err and "Traceback" not in err
    assert (run / "checkpoint.pth").is_file()
    done = int(re.search(r"at update (\d+) of 600000", err)[1])
    again = start("pretrain", "--resume", run, cwd=tmp_path)
    assert again.stderr.readline() == f"resuming {run} at update {done} of 600000\n"
    again.kill()
    again.communicate()


@pytest.mark.slow
def test_python_dash_m_and_pipes_answer_plainly(tmp_path, colors):
    process = start("eval", "knn", "pixels", "--data", colors, "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["dataset"] == "colors"
    assert "features 60 of 60" in err and "\x1b" not in err
