"""What several processes cannot share out is refused by name, before an image is looked for."""

import pytest
from cases import each
from small_runs import make_recipe

from patchssl.pretrain.run.setup import require_shares
from patchssl.pretrain.run.start import pretrain
from patchssl.runtime.errors import UsageError


@each(("parts", "words"), [
    ({"optim": {"batch_size": 9}}, r"optim\.batch_size = 9 cannot be shared out evenly to 2 processes"),
    ({"optim": {"batch_size": 1}}, r"optim\.batch_size = 1 cannot be shared out evenly to 2 processes"),
    ({"optim": {"batch_size": 12, "accumulate": 4}}, r"optim\.accumulate = 4 cannot cut the 6 images"),
    ({"run": {"shard": True, "knn_every_epochs": 1}}, r"run\.knn_every_epochs needs whole weights"),
])
def test_what_two_processes_cannot_share_is_refused_before_any_work(parts, words, monkeypatch, tmp_path):
    recipe = make_recipe(**parts)
    require_shares(recipe)  # one process can
    monkeypatch.setattr("patchssl.pretrain.run.setup.world_size", lambda: 2)
    with pytest.raises(UsageError, match=words):
        pretrain(recipe, "/nowhere/to/be/found", tmp_path / "run")
    assert not (tmp_path / "run").exists()
