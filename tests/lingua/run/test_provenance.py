import subprocess
from pathlib import Path

from lingua.files import read_json
from lingua.run.code_snapshot import freeze_code
from lingua.run.folder import archive_exit_records
from lingua.run.provenance import describe_code, package_versions, record_run


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=me", "-c", "user.email=me@host.org"]
    return subprocess.run(["git", "-C", folder, *names, *words], capture_output=True, text=True, check=True).stdout


def checkout(folder: Path) -> Path:
    (folder / "pack").mkdir(parents=True)
    (folder / "pack/train.py").write_text("lr = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_checkout_has_a_commit_a_diff_and_files_that_git_does_not_know(tmp_path: Path):
    tree = checkout(tmp_path / "tree")
    clean = describe_code(tree)
    assert (clean["commit"], clean["dirty"], clean["diff"]) == (git(tree, "rev-parse", "HEAD").strip(), False, "")
    (tree / "pack/train.py").write_text("lr = 2\nAPI_KEY = 'hunter2'\n")
    (tree / "plugin.py").touch()
    changed = describe_code(tree)
    assert (changed["commit"], changed["dirty"], changed["untracked"]) == (clean["commit"], True, ["plugin.py"])
    assert "-lr = 1\n+lr = 2\n" in changed["diff"]
    assert "hunter2" not in changed["diff"]


def test_code_that_no_checkout_holds_has_no_commit(tmp_path: Path):
    tree = checkout(tmp_path / "tree")
    (tree / ".gitignore").write_text("site\n")
    (tree / "site").mkdir()
    (tree / "site/pack.py").touch()
    (tmp_path / "plain").mkdir()
    assert [describe_code(folder)["commit"] for folder in (tree / "site", tmp_path / "plain")] == [None, None]


def test_frozen_code_has_the_commit_that_it_was_frozen_at(tmp_path: Path):
    tree = checkout(tmp_path / "tree")
    (tree / "pack/train.py").write_text("lr = 2\n")
    (tree / "pack/__init__.py").touch()
    frozen = freeze_code(tree, tmp_path / "run")
    then = describe_code(tree)
    git(tree, "commit", "-qam", "second")
    assert describe_code(frozen) == then | {"folder": str(frozen)}


def test_a_record_has_command_code_and_versions_and_the_one_before_is_kept(tmp_path: Path):
    for attempt in (1, 2):
        archive_exit_records(tmp_path, attempt - 1)
        record_run(tmp_path, attempt, ["python", "wandb.api_key=hunter2", "steps=3"], tmp_path, device="CPU")
    record = read_json(tmp_path / "run.json")
    assert record["command"] == ["python", "wandb.api_key=***", "steps=3"]
    assert (record["attempt"], record["commit"], record["device"]) == (2, None, "CPU")
    assert record["packages"] == package_versions()
    assert record["packages"]["pytest"]
    assert read_json(tmp_path / "logs/run.0001.json")["attempt"] == 1
