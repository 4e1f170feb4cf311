import pytest

from lingua.config.base import ConfigError
from lingua.stool import translate

FORK = ["script=apps.main.train", "config=c.yaml", "nodes=2", "ngpu=8", "ncpu=16", "mem=64G", "time=1440",
        "partition=gpu", "account=lab", "qos=high", "constraint=[48G|80G]", "exclude=n3"]  # fmt: skip


def test_stools_words_are_keys_of_the_launcher():
    line, local = translate([*FORK, "optim.lr=1e-3"])
    assert line.config == "c.yaml"
    assert line.overrides == [
        "app=apps.main", "launcher.nodes=2", "launcher.gpus=8", "launcher.cpus_per_gpu=16", "launcher.mem=64G",
        "launcher.time=1440", "launcher.partition=gpu", "launcher.account=lab", "launcher.qos=high",
        "launcher.constraint=[48G|80G]", "launcher.exclude=n3", "optim.lr=1e-3",
    ]  # fmt: skip
    assert not local


def test_bash_runs_here_and_no_limit_is_no_key():
    line, local = translate(["config=c.yaml", "launcher=bash", "time=-1"])
    assert local
    assert line.overrides == []


def test_a_group_pick_is_no_way_to_submit():
    line, local = translate(["config=c.yaml", "launcher=infiniband"])
    assert (line.overrides, local) == (["launcher=infiniband"], False)


@pytest.mark.parametrize("word", ["copy_code=false", "override=true"])
def test_what_is_not_done_any_more_is_refused_with_the_remedy(word: str):
    with pytest.raises(ConfigError, match=f"command line: {word}: "):
        translate(["config=c.yaml", word])


def test_what_needs_no_key_any_more_is_said(capsys: pytest.CaptureFixture[str]):
    line, _ = translate(["config=c.yaml", "dirs_exists_ok=true", "anaconda=/opt/x"])
    assert line.overrides == []
    assert capsys.readouterr().err.count("\n") == 2
