"""README's first command, on tiny things."""

import re

import pytest
import yaml

import mmrdpm
from mmrdpm import checkpoint
from mmrdpm import quickstart as module
from mmrdpm.errors import CheckpointError
from mmrdpm.train_model import Trainer


@pytest.fixture
def quickstart(tiny_recipe, tiny_run, tmp_path, monkeypatch):
    """Does it, in one folder; gives the page and what was said."""
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["samples"]["every"] = 6
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(mapping))
    model = mmrdpm.load(tiny_run)
    monkeypatch.setattr(module, "_RECIPE", str(tmp_path / "quick.yaml"))
    monkeypatch.setattr(module.api, "load", lambda: model)
    said = []
    return lambda: (module.quickstart(tmp_path / "out", said.append), said)


def test_it_leaves_a_page_and_goes_on_where_it_was_stopped(quickstart, interrupted, tmp_path):
    run = tmp_path / "out/train"
    stopped = pytest.raises(CheckpointError, match="run the same command to go on")
    with interrupted(Trainer, 5), stopped:
        quickstart()
    assert checkpoint.newest(run).name == "step-0000005.safetensors"
    page, said = quickstart()
    assert (run / "samples/step-0000005.png").exists()  # of a start at step 5
    assert any(line.startswith("caption of the picture 'red heart'") for line in said)
    text = page.read_text()
    named = re.findall(r'src="([^"]+)"', text)
    assert len(named) == 2 + len(module.PROMPTS) + 2
    assert all((page.parent / name).stat().st_size > 0 for name in named)
    assert text.count("<polyline") == 2 and "updates 2 to 12" in text
    trained = checkpoint.newest(run).stat().st_mtime_ns
    assert quickstart()[0].read_text() == text
    assert checkpoint.newest(run).stat().st_mtime_ns == trained  # not done again
