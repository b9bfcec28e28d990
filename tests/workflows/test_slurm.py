"""Pretraining as a job: on submitit's local executor as it is, on a Slurm that is made of three small scripts."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchssl.models.checkpoint import load_checkpoint
from patchssl.pretrain.run.start import pretrain
from patchssl.runtime.errors import Interrupted, PatchSSLError, UsageError
from patchssl.workflows.slurm import PretrainJob, SlurmOptions, submit_pretraining, submit_resume

ROOT = Path(importlib.util.find_spec("patchssl").origin).parents[1]
LOCAL = SlurmOptions(cluster="local", gpus=0, cpus=1)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def processes(submitted):
    """Ids of the processes that the controller, which stands for Slurm, has started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", submitted.job], capture_output=True, text=True,
                              check=True)
    return [int(word) for word in children.stdout.split()]


def wait_for(what, found, seconds=300):
    limit = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < limit, f"no {what} after {seconds} s"
        time.sleep(0.05)
    return value


def said(submitted):
    return "".join(path.read_text() for path in Path(submitted.logs).glob("*_log.out"))


def rows(submitted):
    log = Path(submitted.run) / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def is_over(submitted):
    done, _ = os.waitpid(int(submitted.job), os.WNOHANG)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1], ids=["submitit's", "Slurm's"])
def test_a_warned_job_saves_comes_back_by_itself_and_ends_like_a_run_nobody_warned(colors, tiny, tmp_path, number,
                                                                                  monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", number.name.removeprefix("SIG"))
    overrides = (*tiny, "optim.epochs=20", "run.workers=1")
    submitted = submit_pretraining("quickstart", str(colors), Path("run"), 0, overrides, LOCAL, device="cpu")
    wait_for("row", lambda: rows(submitted))
    os.kill(processes(submitted)[0], number)
    wait_for("end", lambda: is_over(submitted))
    log = said(submitted)
    stopped = int(re.search(rf"stopped by {number.name} at update (\d+) of 120, saved", log)[1])
    assert 0 < stopped < 120
    assert f"resuming {tmp_path / 'run'} at update {stopped} of 120" in log
    assert log.index("Requeued job") < log.index("resuming")
    assert "Job completed successfully" in log and "Traceback" not in log
    assert [json.loads(row)["step"] for row in rows(submitted)][-1] == 120
    straight = pretrain("quickstart", colors, "straight", overrides=overrides, device="cpu")
    mine, other = (load_checkpoint(folder)["teacher"] for folder in (tmp_path / "run", straight))
    assert all(tensor.equal(other[name]) for name, tensor in mine.items())


@pytest.mark.slow
def test_a_cancelled_job_saves_and_does_not_come_back(colors, tiny):
    submitted = submit_pretraining("quickstart", str(colors), Path("run"), 0, (*tiny, "optim.epochs=9999"), LOCAL,
                                   device="cpu")
    wait_for("row", lambda: rows(submitted))
    os.kill(int(submitted.job), signal.SIGTERM)  # the controller passes it on, as scancel does
    wait_for("end", lambda: is_over(submitted))
    assert re.search(r"stopped by SIGTERM at update \d+ of 59994, saved", said(submitted))
    assert "Requeued" not in said(submitted)
    assert load_checkpoint(Path("run"))["steps_done"] > 0


@pytest.mark.slow
def test_a_run_is_resumed_by_a_job_with_its_changes(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(UsageError, match="--allow-changes"):
        submit_resume(run, ("optim.epochs=3",), LOCAL, allow_changes=False, device="cpu")
    assert not (run / "slurm").exists()
    submitted = submit_resume(run, ("optim.epochs=3",), LOCAL, allow_changes=True, device="cpu")
    wait_for("end", lambda: is_over(submitted))
    assert load_checkpoint(run)["steps_done"] == 18


def test_the_job_only_requeues_when_it_was_warned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("patchssl.workflows.slurm.join_processes", lambda: None)
    for number, requeued in ((signal.SIGUSR2, True), (signal.SIGUSR1, True), (signal.SIGTERM, False),
                             (signal.SIGINT, False)):
        heard = []
        before = signal.signal(signal.SIGUSR2, lambda number, frame, heard=heard: heard.append(number))

        def stop(*_args, number=number, **_options):
            raise Interrupted("stopped, saved", 75, number)

        monkeypatch.setattr("patchssl.workflows.slurm.pretrain_with_probe", stop)
        try:
            with pytest.raises(SystemExit) as end:
                PretrainJob(tmp_path, recipe="any")()
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert (bool(heard), end.value.code) == (requeued, 75)
        assert "patchssl: stopped, saved" in capsys.readouterr().err


# a Slurm of three scripts

SBATCH = """#!/bin/sh
cp "$1" {place}/batch.sh
echo "Submitted batch job 4321"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with srun and sbatch; what is submitted lies in batch.sh."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (("srun", "#!/bin/sh\n"), ("sbatch", SBATCH.format(place=place))):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def test_the_command_line_submits_what_was_asked_for(patchssl, cluster, colors, tiny, tmp_path):
    answer = patchssl("pretrain", "quickstart", *tiny, "loss.patch_warmup_epochs=0", "optim.warmup_epochs=9", "--data",
                      colors, "--out", "run", "--slurm", "--slurm-partition", "gpu", "--slurm-nodes", "2",
                      "--slurm-gpus", "4", "--slurm-cpus", "6", "--slurm-hours", "1.5", "--slurm-option", "mem=64G",
                      "--slurm-option", "account=vision")
    assert answer.code == 0, answer.err
    assert answer.out == (f"job 4321 is submitted; its run is {tmp_path}/run\n"
                          f"what it says: tail -f {tmp_path}/run/slurm/4321_0_log.out\n"
                          "warning: optim.warmup_epochs = 9 is too long for optim.epochs = 2: the learning rate only "
                          "rises, and never falls; ask for more epochs, or for optim.warmup_epochs=0.2\n")
    options = set(re.findall(r"^#SBATCH --(\S+)$", (cluster / "batch.sh").read_text(), flags=re.M))
    assert {"partition=gpu", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "time=90",
            "mem=64G", "account=vision", "job-name=run", "signal=USR2@180", "open-mode=append"} <= options


def test_json_and_a_job_without_gpus(patchssl, cluster, colors, tmp_path):
    answer = patchssl("pretrain", "quickstart", "--data", colors, "--slurm", "--slurm-gpus", "0", "--json")
    assert json.loads(answer.out) == {"job": "4321", "run": f"{tmp_path}/runs/quickstart-0",
                                      "logs": f"{tmp_path}/runs/quickstart-0/slurm", "warnings": []}
    assert "gpus" not in (cluster / "batch.sh").read_text()


def test_a_queue_that_refuses_is_a_sentence(patchssl, cluster, colors):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    answer = patchssl("pretrain", "quickstart", "--data", colors, "--slurm")
    assert answer.code == 1
    assert "the job could not be submitted: " in answer.err and "invalid partition specified" in answer.err


def test_a_machine_without_slurm_is_a_sentence(colors, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PatchSSLError, match=r'could not be submitted: .*"srun"'):
        submit_pretraining("quickstart", str(colors), Path("run"), 0, (), SlurmOptions(), device=None)


def test_what_is_wrong_is_said_before_anything_is_submitted(patchssl, cluster, tiny_run, colors):
    for arguments, words in ((["quickstart", "--out", str(tiny_run), "--data", colors], "already holds a run"),
                             (["--resume", "nowhere"], "is not a run folder"),
                             (["--resume", tiny_run, "optim.epochs=3"], "give --allow-changes"),
                             (["quickstart", "optim.epoch=3"], "did you mean")):
        answer = patchssl("pretrain", *arguments, "--slurm")
        assert (answer.code, words in answer.err) == (2, True), answer.err
    assert not (cluster / "batch.sh").exists()


def test_without_the_library_a_sentence_says_how_to_get_it(patchssl, colors, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    answer = patchssl("pretrain", "quickstart", "--data", colors, "--slurm")
    assert answer.code == 2
    assert "--slurm needs the library submitit: pip install 'patchssl[slurm]'" in answer.err


@pytest.mark.slow
def test_several_processes_know_their_rank(tmp_path):
    """As torchrun would tell them; run by submitit itself."""
    import submitit

    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=2)

    def ranks():  # inside, so that it is sent whole: nobody there can import this file
        from patchssl.workflows.slurm import join_processes

        join_processes()
        return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))

    job = executor.submit(ranks)
    found = [job.task(number).result() for number in range(2)]
    assert [each[:3] for each in found] == [("0", "2", "0"), ("1", "2", "1")]
    assert found[0][3] == found[1][3]  # they meet at one port
