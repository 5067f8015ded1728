import errno
import fcntl
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmrdpm import checkpoint, distributed, recipe, tree, weights
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.errors import CheckpointError
from mmrdpm.model_recipe import Tokenizers
from mmrdpm.monitor import JsonLines


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3)
    state = {"a": [1, 2.5, None, "text"], 7: {"x": shared, "y": shared}, "empty": {}, "t": True}
    tree.save(state, tmp_path / "tree.safetensors")
    again = tree.load(tmp_path / "tree.safetensors")
    assert torch.equal(again[7]["x"], shared) and torch.equal(again[7].pop("y"), shared)
    assert again.keys() == state.keys() and again["a"] == state["a"] and again["t"] is True


def test_newest_is_the_last_by_name_and_prune_keeps_the_newest(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {}, {"step": step})
    (tmp_path / "step-9999999.safetensors.7.partial").write_text("a file half written")
    assert checkpoint.newest(tmp_path).name == "step-0000100.safetensors"
    checkpoint.prune(tmp_path, CheckpointPolicy(keep=1))
    assert [p.name for p in tmp_path.glob("step*")] == ["step-0000100.safetensors"]
    assert [p.name for p in (tmp_path / "resume").iterdir()] == ["step-0000100.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.save({"w": torch.ones(2)}, path)

    def full(_, partial, *__):
        Path(partial).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        weights.save({"w": torch.zeros(2)}, path)
    assert weights.load(path)[0]["w"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_resuming_needs_a_run_of_the_same_recipe(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no run to resume"):
        checkpoint.begin(run, CheckpointPolicy(), resume=True)
    checkpoint.begin(run, CheckpointPolicy(), resume=False)
    checkpoint.record(run, CheckpointPolicy(), {})
    assert recipe.read(run / checkpoint.RECIPE_FILE)["every"] == 500
    checkpoint.begin(run, CheckpointPolicy(), resume=True)
    with pytest.raises(CheckpointError, match="begun with every=500, not 7"):
        checkpoint.begin(run, CheckpointPolicy(every=7), resume=True)


def test_the_log_of_something_else_is_left_alone(tmp_path):
    (tmp_path / checkpoint.LOG_FILE).write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: is the log of something else"):
        checkpoint.begin(tmp_path, CheckpointPolicy(), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LOG_FILE]


def test_a_start_that_did_nothing_may_begin_anew_and_one_that_did_something_not(tmp_path):
    (log := tmp_path / checkpoint.LOG_FILE).touch()
    (tmp_path / checkpoint.SKIPPED_FILE).write_text("of the records that stopped it")
    checkpoint.record(tmp_path, CheckpointPolicy(), {})
    checkpoint.begin(tmp_path, CheckpointPolicy(), resume=True)
    with pytest.raises(
        CheckpointError, match=r"begun with every=500, not 7.*without --resume or in another"
    ):
        checkpoint.begin(tmp_path, CheckpointPolicy(every=7), resume=True)
    with pytest.raises(CheckpointError, match=r"perhaps of a process still at work.*recipe\.yaml"):
        checkpoint.forget(tmp_path, alone=False)
    assert (tmp_path / checkpoint.RECIPE_FILE).exists()
    (tmp_path / "resume").mkdir()  # as where its weights were moved elsewhere
    with pytest.raises(CheckpointError, match="holds a run already"):
        checkpoint.begin(tmp_path, CheckpointPolicy(every=7), resume=False)
    (tmp_path / "resume").rmdir()
    log.write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="holds a run already"):
        checkpoint.begin(tmp_path, CheckpointPolicy(every=7), resume=False)
    log.write_text("")
    checkpoint.begin(tmp_path, CheckpointPolicy(every=7), resume=False)
    assert recipe.read(tmp_path / checkpoint.RECIPE_FILE)["every"] == 500  # another may train there
    checkpoint.forget(tmp_path, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LOG_FILE]
    checkpoint.begin(tmp_path, CheckpointPolicy(every=7), resume=False)  # a part was faulty


def test_milestones_are_kept_and_orphaned_states_removed(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {}, {"step": step})
    (tmp_path / "step-0000030.safetensors").unlink()
    checkpoint.prune(tmp_path, CheckpointPolicy(keep=1, keep_every=20))
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == [
        "step-0000020.safetensors",
        "step-0000040.safetensors",
    ]
    assert len(list((tmp_path / "resume").iterdir())) == 2


def test_some_keys_may_differ_when_a_run_goes_on_and_its_recipe_takes_them(tmp_path):
    run = tmp_path / "run"
    checkpoint.begin(run, CheckpointPolicy(), resume=False)
    checkpoint.record(run, CheckpointPolicy(), {})
    checkpoint.begin(run, CheckpointPolicy(keep=3), resume=True, free={"keep"})
    checkpoint.record(run, CheckpointPolicy(keep=3), {"tokenizer": (tmp_path / "gone", ["it"])})
    assert recipe.read(run / checkpoint.RECIPE_FILE)["keep"] == 3


def test_the_writer_works_aside_and_reports_what_went_wrong():
    done, may_end = [], threading.Event()
    writer = checkpoint.Writer(background=True)
    writer.write(lambda: done.append(may_end.wait(10)))
    assert not done
    may_end.set()
    writer.write(lambda: weights.load(Path("nowhere")))
    assert done == [True]
    with pytest.raises(CheckpointError, match="no such weights file"):
        writer.finish()
    writer.finish()


def test_a_run_does_not_begin_over_checkpoints_of_another(tmp_path):
    checkpoint.save(tmp_path, 5, {"w": torch.zeros(1)}, {}, {})
    with pytest.raises(CheckpointError, match="holds a run already"):
        checkpoint.begin(tmp_path, CheckpointPolicy(), resume=False)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    checkpoint.save(tmp_path, 5, {"weight": torch.ones(2, 2)}, {}, {})
    spoiled = {"weight": torch.tensor([[1.0, torch.inf], [0.0, 1.0]])}
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.save(tmp_path, 6, spoiled, {}, {})
    assert checkpoint.newest(tmp_path).name == "step-0000005.safetensors"
    weights.save(spoiled, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        weights.load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "w.safetensors")


def test_a_beginning_that_was_cut_off_does_not_stand_in_the_way(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    (source / "file").write_text("right")
    (run / "part.partial").mkdir(parents=True)
    (run / "part.partial" / "left").write_text("by a killed start")
    assert checkpoint.tokenizer(run, "part", str(source), ["file"]) == source
    checkpoint.begin(run, CheckpointPolicy(), resume=False)
    (source / "step-0000001.safetensors").write_text("the state of its own training")
    checkpoint.record(run, CheckpointPolicy(), {"part": (source, ["file", "other"])})
    assert [p.name for p in (run / "part").iterdir()] == ["file"]
    assert not (run / "part.partial").exists()
    assert checkpoint.tokenizer(run, "part", "unused", ["file"]) == run / "part"


def test_two_jobs_do_not_train_in_one_folder(tmp_path):
    with (
        checkpoint.claimed(tmp_path),
        pytest.raises(CheckpointError, match="another process is training"),
        checkpoint.claimed(tmp_path),
    ):
        pass
    with checkpoint.claimed(tmp_path) as alone:
        assert alone


@dataclass(frozen=True)
class Named:
    tokenizers: Tokenizers


def test_where_another_tokeniser_is_copied_a_start_that_did_nothing_begins_elsewhere(tmp_path):
    (tmp_path / checkpoint.LOG_FILE).touch()
    checkpoint.record(tmp_path, Named(Tokenizers()), {})
    with pytest.raises(CheckpointError, match=r"or begin anew in another folder$"):
        checkpoint.begin(tmp_path, Named(Tokenizers(image="other")), resume=True)


def test_where_files_cannot_be_locked_a_run_is_not_known_to_be_alone(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with checkpoint.claimed(tmp_path) as alone:
        assert not alone


def test_ranks_go_on_from_one_checkpoint_or_not_at_all(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, {"w": torch.zeros(1)}, {}, {})
    assert checkpoint.agreed(tmp_path) == checkpoint.newest(tmp_path)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, None])
    with pytest.raises(CheckpointError, match=r"step-0000005\.safetensors.*all nodes share"):
        checkpoint.agreed(tmp_path)


@pytest.mark.parametrize(
    "header",
    ["[]", "3", "null", "[" * 100_000, "{"],
    ids=["list", "number", "null", "deep", "torn"],
)
def test_a_header_that_is_no_mapping_is_refused(header, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1)}, path, {"mmrdpm": header})
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        weights.metadata(path)


@pytest.mark.parametrize("saved", [[1], {"pairs": [[1]]}, 5, {"tensor": "none"}])
def test_a_state_that_is_no_tree_is_refused(saved, tmp_path):
    path = tmp_path / "tree.safetensors"
    weights.save({}, path, {"tree": saved})
    with pytest.raises(CheckpointError, match="not a resume state"):
        tree.load(path)


def test_a_run_never_takes_away_tokenizers_that_lie_in_its_folder(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    for folder, text in ((source, "ours"), (run / "image", "another")):
        folder.mkdir(parents=True)
        (folder / "tokenizer.yaml").write_text(text)
    (run / "image" / "notes.txt").write_text("keep me")
    tokenizers = {"image": (source, ("tokenizer.yaml", "weights"))}
    with pytest.raises(CheckpointError, match=r"image/tokenizer\.yaml: is not that of .*source"):
        checkpoint.record(run, CheckpointPolicy(), tokenizers)
    assert (run / "image" / "tokenizer.yaml").read_text() == "another"
    assert not (run / "recipe.yaml").exists()
    own = {"image": (run / "image", ("tokenizer.yaml", "weights"))}  # begun anew on its own
    checkpoint.record(run, CheckpointPolicy(), own)
    assert (run / "image" / "tokenizer.yaml").read_text() == "another"
    assert (run / "image" / "notes.txt").exists() and (run / "recipe.yaml").exists()


def test_a_damaged_record_in_the_middle_of_a_log_is_named_and_nothing_lost(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for wrong in (b"{torn", b"\xff", b'{"step": "x"}', b"{}"):
        content = b'{"step": 1}\n' + wrong + b'\n{"step": 2}\n'
        log.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: no record"):
            JsonLines(log, 2)
        assert log.read_bytes() == content
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')  # as a kill leaves it
    JsonLines(log, 1).close()
    assert log.read_bytes() == b'{"step": 1}\n'


def test_a_damaged_newest_checkpoint_names_the_one_before(tmp_path):
    def restore(path):
        return checkpoint.state_of(path)["step"]

    for step, advice in ((5, "begin anew"), (9, "go on from step-0000005.safetensors")):
        path = checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {}, {"step": step})
        state = tmp_path / "resume" / path.name
        good = state.read_bytes()
        state.write_bytes(good[:-3])
        with pytest.raises(CheckpointError, match=f"{state}.*take {path.name} away to {advice}"):
            checkpoint.resume(tmp_path, restore)
        state.write_bytes(good)
    path.unlink()
    restored = []
    checkpoint.resume(tmp_path, lambda path: restored.append(restore(path)))
    assert restored == [5]
