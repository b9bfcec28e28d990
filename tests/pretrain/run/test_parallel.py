"""The same batches cut over processes, or into parts one after the other, make the same updates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BATCH, STEPS, make_images, make_recipe

from patchssl.pretrain.dataset import EpochSampler, ViewDataset, collate_views
from patchssl.pretrain.engine import Engine
from patchssl.runtime.distributed import all_gather_objects

CPU = torch.device("cpu")
IBOT = {"method": "ibot", "photometric": {"patch_share": 0}, "model": {"drop_path": 0.3}}
SETTINGS = {
    "pwself": {"model": {"drop_path": 0.3}},
    "paper": {"loss": {"weighting": "paper", "rule": "paper", "center_per_position": True}},
    "lambda-sum": {"loss": {"weighting": "lambda-sum", "class_share": 0.8}},
    "dino": {"method": "dino", "photometric": {"patch_share": 0}},
    "ibot": IBOT,
    "sinkhorn": {"loss": {"centering": "sinkhorn"}},
    # small steps: AdamW makes full ones of what is rounding
    "sampled": {"loss": {"matches_per_pair": 2}, "head": {"shared": False}, "optim": {"lr": 0.005}},
    "similarity": {"loss": {"rule": "similarity"}},
}
FEW = {"views": {"global_scale": [0.05, 0.2], "local_scale": [0.05, 0.1]}}  # some pairs have no match


def recipe_of(parts, accumulate=1):
    small = make_recipe(**(parts | FEW if "views" not in parts else parts))
    return small.model_copy(update={"optim": small.optim.model_copy(update={"accumulate": accumulate})})


def sharded(recipe, shard=True):
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"shard": shard})})


def train(recipe, steps=4, rank=0, world_size=1, switch=lambda recipe: recipe):
    """Log rows of `steps` updates on this rank's share, and the state after them.

    Half-way the state goes into an engine of its own, which must go on as if nothing had happened.
    """
    engine = Engine(recipe, 0, STEPS, CPU)
    views = ViewDataset(make_images(), recipe, 0, engine.num_drop_path)
    sampler = iter(EpochSampler(30, BATCH, epochs=4, seed=0, rank=rank, world_size=world_size))
    rows = []
    for step in range(steps):
        if step == steps // 2:
            state = all_gather_objects(engine.state_dict())[0]  # all of it is in rank 0 only, as in a checkpoint
            engine = Engine(switch(recipe), 0, STEPS, CPU)
            engine.load_state_dict(state)
        rows.append(engine.train_step(collate_views([views[key] for key in next(sampler)])).row())
    return rows, engine.state_dict()


def close(found, expected, *, of_ranks=()):
    """Rows and states alike; what is a mean over ranks of something that is not linear is left out."""
    (rows, state), (rows_alone, state_alone) = found, expected
    for row, alone in zip(rows, rows_alone, strict=True):
        for name, value in alone.items():
            if name not in of_ranks:
                assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    for network in ("student", "teacher", "centers"):
        for name, value in state_alone[network].items():
            ours, theirs = (with_gradient(name, tensor) for tensor in (state[network][name], value))
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=5e-5, msg=f"{network} {name}")


def with_gradient(name, value):
    """A bias of keys shifts all attention alike: its gradient is rounding, which AdamW blows up to full steps."""
    return torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) if name.endswith("qkv.bias") else value


NOT_LINEAR = ("marginal_entropy", "patch_marginal_entropy", "effective_rank", "feature_spread",
              "patch_entropy", "patch_kl")
LAST_PART = ("teacher_entropy", "student_entropy", "class_kl", "matched_share_global", "matched_share_local")

RANKS = """
import sys
import torch
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from patchssl.runtime.distributed import end_launched, join_launched, rank
join_launched()
from test_parallel import SETTINGS, recipe_of, train
torch.save({name: train(recipe_of(parts), rank=rank(), world_size=2) for name, parts in SETTINGS.items()},
           f"{sys.argv[1]}/{rank()}.pth")
from test_parallel import sharded
found = {name: train(sharded(recipe_of(SETTINGS[name])), rank=rank(), world_size=2) for name in ("pwself", "sampled")}
found["from whole to sharded"] = train(recipe_of({}), rank=rank(), world_size=2, switch=sharded)
found["from sharded to whole"] = train(sharded(recipe_of({})), rank=rank(), world_size=2,
                                       switch=lambda recipe: sharded(recipe, False))
torch.save(found, f"{sys.argv[1]}/{rank()}-sharded.pth")
end_launched(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, by setting."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(folder / "ranks.py"), str(folder), str(here), str(here.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in (0, 1)]
    return [*found, torch.load(folder / "0-sharded.pth", weights_only=False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_make_the_updates_of_one(ranks, name):
    alone = train(recipe_of(SETTINGS[name]))
    for found in ranks[:2]:
        close(found[name], alone, of_ranks=(*NOT_LINEAR, "class_kl") if name == "paper" else NOT_LINEAR)
    (_, first), (_, second) = ranks[0][name], ranks[1][name]
    assert all(torch.equal(value, second["student"][key]) for key, value in first["student"].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pwself", "sampled", "from whole to sharded", "from sharded to whole"])
def test_two_processes_that_deal_out_the_weights_do_too(ranks, name):
    _, _, found = ranks
    recipe = recipe_of(SETTINGS.get(name, {}))
    close(found[name], train(recipe), of_ranks=NOT_LINEAR)
    engine = Engine(recipe, 0, STEPS, CPU)
    engine.load_state_dict(found[name][1])  # a whole state: one process can go on with it
    assert engine.steps_done == 4
    assert len(engine.optimizer.state) == len([p for p in engine.student.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "sinkhorn"])
def test_a_batch_in_parts_makes_the_same_update(name):
    close(train(recipe_of(SETTINGS[name], accumulate=3)), train(recipe_of(SETTINGS[name])),
          of_ranks=NOT_LINEAR + LAST_PART)


def test_a_batch_cannot_be_cut_into_unequal_parts():
    with pytest.raises(ValueError, match=r"optim\.accumulate = 4"):
        make_recipe(optim={"accumulate": 4})
