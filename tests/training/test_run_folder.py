"""A new run never writes over another, and nothing but a regular file is renamed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import TINY, is_one_error_line, same_run

from quill.training.checkpoint import load_checkpoint


def files_of(folder: str) -> dict:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_new_run_never_writes_over_another(tiny, call):
    assert call("train", *TINY)[0] == 0
    before = files_of("out")
    code, _, err = call("train", *TINY, "--seed=9")
    assert code == 2 and is_one_error_line(err) and files_of("out") == before
    for way_on in ("--out_dir=out-2", "--init_from=resume", "--overwrite=true"):
        assert way_on in err
    assert "moves it to out/previous-1" in err
    assert call("train", *TINY, "--seed=9", "--out_dir=out-2")[0] == 0
    assert call("train", *TINY, "--init_from=resume", "--max_iters=9")[0] == 0
    longer = files_of("out")
    for n in (1, 2):
        assert call("train", *TINY, "--seed=9", "--overwrite=true")[0] == 0
        same_run("out", "out-2")
        assert f"previous-{n}" in {path.name for path in Path("out").iterdir()}
    was = {Path("out/previous-1", path.name): data for path, data in longer.items() if data}
    assert files_of("out/previous-1") == was
    assert call("sample", "--out_dir=out/previous-1", "--num_samples=1")[0] == 0


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.previous.pt", "best.pt"])
def test_each_of_its_checkpoints_is_worth_keeping(tiny, call, name):
    assert call("train", *TINY)[0] == 0
    for path in Path("out").glob("*.pt"):
        if path.name != name:
            path.unlink()
    code, _, err = call("train", *TINY)
    assert code == 2 and ("--init_from=resume" in err) == (name != "best.pt")
    code, _, err = call("train", "--init_from=resume", "--eval_only=true")
    assert code == 2 * (name == "best.pt") and ("best.pt, for sampling" in err) == bool(code)
    # Where ckpt.pt is missing, auto starts anew: also after a kill between best.pt and ckpt.pt.
    code, out, err = call("train", *TINY, "--init_from=auto")
    assert code == 0 and ("resuming" in out) == (name != "best.pt")
    assert ("is moved to out/previous-1" in err) == (name == "best.pt")
    assert Path("out/previous-1/best.pt").exists() == (name == "best.pt")


def test_what_is_no_run_is_no_reason_to_refuse(tiny, call):
    """Metrics without a checkpoint, which are moved all the same; other files; an evaluation."""
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text('{"step": 0}\n')
    Path("out/notes.txt").write_text("mine")
    code, _, err = call("train", *TINY)
    assert code == 0 and "is moved to out/previous-1" in err
    assert call("train", *TINY, "--eval_only=true")[0] == 0
    assert [*files_of("out/previous-1").values()] == [b'{"step": 0}\n']
    assert not Path("out/previous-2").exists() and Path("out/notes.txt").exists()


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_to_start_anew_and_to_continue_is_a_contradiction(tiny, call, init_from):
    code, _, err = call("train", *TINY, "--overwrite=true", f"--init_from={init_from}")
    assert code == 2 and is_one_error_line(err) and "leave one out" in err


def test_wrong_input_moves_nothing(tiny, call):
    assert call("train", *TINY)[0] == 0
    before = files_of("out")
    for wrong in ("--n_embd=15", "--dataset=none", "--init_from=out", "--wandb_log=maybe"):
        code, _, err = call("train", *TINY, "--overwrite=true", wrong)
        assert code == 2 and is_one_error_line(err) and files_of("out") == before


def test_a_kill_while_a_run_is_moved_loses_none_of_it(tiny, call, monkeypatch):
    assert call("train", *TINY)[0] == 0
    before = {path.name: data for path, data in files_of("out").items()}
    rename = Path.rename
    for n_moves in range(4):
        left = [n_moves]

        def kill(self, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", kill)
            assert call("train", *TINY, "--seed=9", "--overwrite=true")[0] == 130
        assert {path.name: data for path, data in files_of("out").items()} == before
        assert call("train", *TINY)[0] == 2, "it still holds a run"
        for path in [*files_of("out")]:
            path.rename(Path("out", path.name))


SPECIAL = {
    "a pipe": lambda path: os.mkfifo(path),
    "a link": lambda path: path.symlink_to("elsewhere"),
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    "name", ["ckpt.pt", "ckpt.previous.pt", "best.pt", "metrics.jsonl", ".lock", "best.pt.tmp"]
)
@pytest.mark.parametrize("kind", [*SPECIAL])
def test_what_is_no_regular_file_is_refused_at_once(tiny, call, kind, name):
    """Before a step is made; it neither hangs nor replaces what is there."""
    assert call("train", *TINY)[0] == 0
    path = Path("out", name)
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    before = path.lstat()
    for flags in ([], ["--init_from=resume"], ["--init_from=auto"], ["--overwrite=true"]):
        code, _, err = call("train", *TINY, *flags)
        assert code == 2 and is_one_error_line(err) and f"out/{name} is a folder, link" in err
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert set(Path("out").glob("*.tmp")) <= {path} and not Path("elsewhere").exists()


def test_a_checkpoint_that_cannot_be_opened_is_replaced_by_the_one_before(tiny, call, monkeypatch):
    assert call("train", *TINY)[0] == 0
    real_open = Path.open

    def broken(self, *args, **kwargs):
        if self.name == "ckpt.pt" and args == ("rb",):
            raise OSError(5, "Input/output error", str(self))
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    code, out, err = call("train", "--init_from=resume", "--eval_only=true")
    assert code == 0 and "step 3" in out and "out/ckpt.pt: Input/output error" in err
    assert "going on from out/ckpt.previous.pt" in err
    assert load_checkpoint(Path("out/ckpt.previous.pt"))["step"] == 3
