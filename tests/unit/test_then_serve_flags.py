"""``--then-serve``: what the launcher takes, and what the replica is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddle_ft.command_line import Command, parse
from paddle_ft.errors import ConfigError
from paddle_ft.serve.then_serve import check, flags


def command(tmp_path: Path, *arguments: str) -> Command:
    script = tmp_path / "train.py"
    script.write_text("")
    return parse([*arguments, str(script), "--then-serve", "of the script"], {})


def test_flags_of_the_replica_are_one_argument_of_the_launcher(tmp_path: Path) -> None:
    for text in ("--model digits --http_port 8000", "--model=digits"):
        for form in (["--then-serve", text], ["--then_serve", text], [f"--then-serve={text}"]):
            made = command(tmp_path, *form, "--nproc_per_node", "2")
            assert made.then_serve == tuple(text.split())
            assert made.worker[1:] == ("--then-serve", "of the script")
            assert made.loaded.config.job.nproc_per_node == 2
    assert command(tmp_path).then_serve == ()
    with pytest.raises(ConfigError, match="no closing quotation"):
        command(tmp_path, "--then-serve", "--model 'digits")
    with pytest.raises(ConfigError, match="--then-serve is empty"):
        command(tmp_path, "--then-serve", " ")


def test_a_replica_belongs_to_the_job_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    made = command(tmp_path, "--job_id", "run7", "--checkpoint", "s3://bucket/run7")
    config = made.loaded.config
    own = flags(["--model", "digits", "--store", "s3://other"], config, ("10.0.0.1:2379",))
    assert own[:2] == ["--group", "run7"]
    assert own[4:] == [
        *("--store", "s3://bucket/run7", "--etcd", "10.0.0.1:2379"),
        *("--model", "digits", "--store", "s3://other"),
    ]
    assert "--etcd" not in flags([], config, ())


def test_replicas_that_could_not_reach_each_other_are_told_of_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_FT_SERVE__PLAIN", "true")

    def checked(then: str, etcd: str, nodes: str = "2") -> None:
        flags = ["--then-serve", f"--model digits {then}", "--etcd", etcd, "--nnodes", nodes]
        made = command(tmp_path, *flags)
        check(made.then_serve, made.loaded.config)

    checked("", "127.0.0.1:2379")
    checked("", "192.0.2.1:2379", nodes="1")
    checked("--host 0.0.0.0", "127.0.0.1:2379,[::1]:2379")
    with pytest.raises(ConfigError, match="at 127.0.0.1 the replicas of other nodes cannot reach"):
        checked("", "192.0.2.1:2379")
    with pytest.raises(ConfigError, match="replicas on 0.0.0.0 would talk .* without TLS"):
        checked("--host 0.0.0.0", "127.0.0.1:2379,192.0.2.1:2379")
    with pytest.raises(ConfigError, match="replicas on 192.0.2.7 would talk .* without TLS"):
        checked("--host 192.0.2.7", "127.0.0.1:2379")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--modle digits", "there is no flag --modle: did you mean --model"),
        ("--workers 2", "does not name a model"),
        ("--model digits --http_port many", "many"),
        ("digits", "there is no argument digits"),
        ("--model digits=new", "a version is a whole number"),
        ("--model digits --host 0.0.0.0", "clients would reach this replica on 0.0.0.0"),
    ],
)
def test_what_cannot_be_served_is_told_before_the_training(
    tmp_path: Path, given: str, told: str
) -> None:
    made = command(tmp_path, "--then-serve", given)
    with pytest.raises(ConfigError, match=f"--then-serve.*{told}"):
        check(made.then_serve, made.loaded.config)
