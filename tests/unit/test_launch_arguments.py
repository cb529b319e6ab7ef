"""The launcher's command line: Paddle's flags, one clear sentence for what is wrong (A1)."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import pytest

from paddle_ft import launch
from paddle_ft.config import Config, allowed
from paddle_ft.entry import one_sentence_for_shortages
from paddle_ft.errors import ConfigError, MachineError


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train me.py"
    path.write_text("")
    return str(path)


def parse(*arguments: str, **environ: str) -> launch.Command:
    return launch.parse(arguments, environ)


def test_flags_come_in_both_forms(script: str) -> None:
    for form in ("--nproc_per_node", "--nproc-per-node"):
        command = parse(form, "2", "--nnodes=2:4", script)
        job = command.loaded.config.job
        assert (job.nproc_per_node, job.nodes_min, job.nodes_max) == (2, 2, 4)


def test_what_follows_the_script_is_the_scripts(script: str) -> None:
    command = parse("--max_restart", "7", script, "--nproc_per_node", "9", "-x", "--", "y")
    assert command.worker == (script, "--nproc_per_node", "9", "-x", "--", "y")
    assert command.loaded.config.job.nproc_per_node == 1
    assert command.loaded.config.job.max_restart == 7


def test_the_job_is_named_after_the_script(script: str) -> None:
    assert parse(script).loaded.config.job.id == "train-me"
    assert parse("--job_id", "mine", script).loaded.config.job.id == "mine"
    assert parse(script, PADDLE_FT_JOB__ID="theirs").loaded.config.job.id == "theirs"


def test_a_module_may_stand_for_the_script() -> None:
    assert parse("--module", "json.tool", "x").worker == ("-m", "json.tool", "x")


def test_devices_give_the_number_of_processes(script: str) -> None:
    for flag in ("--devices", "--gpus"):
        job = parse(flag, "0,3", script).loaded.config.job
        assert (job.devices, job.nproc_per_node) == (("0", "3"), 2)


def test_when_to_save_is_passed_on(script: str) -> None:
    command = parse("--checkpoint_every", "100 steps, 30s", script)
    assert command.loaded.config.checkpoint.when == "100 steps, 30s"
    with pytest.raises(ConfigError, match="does not say when to save"):
        launch.check(parse(script, PADDLE_FT_CHECKPOINT__WHEN="soon").loaded.config)


def test_paddles_etcd_master_is_understood(script: str) -> None:
    command = parse("--master", "etcd://h1:2379,h2:2379", script)
    assert command.loaded.config.etcd.endpoints == ("etcd://h1:2379", "h2:2379")


def test_paddles_other_flags_are_noted_not_refused(script: str) -> None:
    command = parse("--rank", "0", "--elastic_level", "1", "--run_mode", "collective", script)
    assert len(command.notes) == 2


def test_precedence_is_flag_environment_file_default(script: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text("[job]\nspares = 1\nmax_restart = 1\njoin_window_s = 9.0\n")
    command = parse(
        "--config",
        str(file),
        "--spares",
        "3",
        script,
        PADDLE_FT_JOB__SPARES="2",
        PADDLE_FT_JOB__MAX_RESTART="2",
    )
    job = command.loaded.config.job
    assert (job.spares, job.max_restart, job.join_window_s) == (3, 2, 9.0)
    told = list(command.loaded.describe())
    assert "spares = 3  # command line --spares" in told
    assert "max_restart = 2  # environment PADDLE_FT_JOB__MAX_RESTART" in told
    assert f"join_window_s = 9.0  # file {file}" in told
    assert "lease_ttl_s = 5  # default" in told


def test_what_is_printed_is_a_file_with_the_same_settings(script: str, tmp_path: Path) -> None:
    odd = parse(
        "--log_dir",
        'a "b"\\\t\x7fя',
        "--devices",
        "0,1",
        script,
        PADDLE_FT_ETCD__PASSWORD="hidden",
        PADDLE_FT_JOB__SPARES="1",
    ).loaded
    lines = list(odd.describe())
    assert "# password is set and kept secret: environment PADDLE_FT_ETCD__PASSWORD" in lines
    assert "hidden" not in "".join(lines)
    file = tmp_path / "printed.toml"
    file.write_text("\n".join(lines))
    again = parse("--config", str(file), script).loaded.config
    without = {"etcd": odd.config.etcd.model_copy(update={"password": ""})}
    assert again == odd.config.model_copy(update=without)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is no script to run"),
        (["--nprocs_per_node", "2", "{script}"], "there is no flag --nprocs_per_node: did you"),
        (["--nproc_per_node"], "--nproc_per_node needs a value"),
        (
            ["--nproc_per_node", "two", "{script}"],
            "--nproc_per_node two is not allowed: it must be a whole",
        ),
        (
            ["--nproc_per_node", "0", "{script}"],
            "--nproc_per_node 0 is not allowed: it must be a whole number from 1 to 256",
        ),
        (["nosuch.py"], "there is no script nosuch.py in "),
        (["--module", "nosuch.thing"], "there is no module nosuch.thing"),
        (["--nnodes", "4:2", "{script}"], "--nnodes 4:2: the maximum is below the minimum"),
        (["--nnodes", "x", "{script}"], "--nnodes x is not N or N:M"),
        (["--checkpoint_every", "soon", "{script}"], "'soon' does not say when to save"),
        (["--run_mode", "ps", "{script}"], "--run_mode ps is not supported"),
        (["--config", "/nosuch.toml", "{script}"], "cannot read the configuration /nosuch.toml"),
        (
            ["--job_id", "a/b", "{script}"],
            "--job_id a/b is not allowed: it must be 1 to 100 letters",
        ),
    ],
)
def test_bad_command_lines_are_one_sentence(
    arguments: list[str], told: str, script: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [a.replace("{script}", script) for a in arguments]
    assert launch.main(given) == 2
    out, err = capfd.readouterr()
    assert err.startswith("paddle_ft: error: " + told)
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[job]\nspare = 1\n", "there is no setting job.spare (file"),
        ("spares = 1\n", "spares stands outside a table"),
        ("[job\n", "is not valid TOML"),
        ("[etcd]\nlease_ttl_s = 2\nrenew_interval_s = 1.5\n", "lease_ttl_s must be more than"),
        ("[serving]\nx = 1\n", "there is no setting serving.x"),
    ],
)
def test_bad_files_are_one_sentence(content: str, told: str, script: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file), script)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_setting_may_be_is_said_with_where_the_value_is_from(
    script: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(script, PADDLE_FT_CHECKPOINT__MODE="all")
    told = 'PADDLE_FT_CHECKPOINT__MODE=all is not allowed: it must be "rank0" or "sharded"'
    assert str(caught.value) == told
    file = tmp_path / "bad.toml"
    file.write_text("[job]\nrestart_window_s = 0\n")
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file), script)
    told = f"job.restart_window_s = 0 (file {file}) is not allowed: it must be a number above 0"
    assert str(caught.value) == told


def test_every_setting_can_say_what_it_may_be() -> None:
    for group, table in Config():
        for key, default in table:
            is_number = isinstance(default, int | float) and not isinstance(default, bool)
            assert ("number" in allowed(f"{group}.{key}")) == is_number, key


def test_an_unknown_key_in_the_environment_is_an_error(script: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.spare \(environment PADDLE_FT_JOB__SPARE\)"):
        parse(script, PADDLE_FT_JOB__SPARE="1")


def test_a_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert launch.main(["train.py"]) == 2
    assert capfd.readouterr().err.startswith("paddle_ft: error: the current directory is no longer")


def test_what_the_machine_is_short_of_is_one_sentence() -> None:
    def short(of: str) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(pytest.raises(MachineError, match=of))
        stack.enter_context(one_sentence_for_shortages())
        return stack

    with short("No space left on device; free disk space"):
        Path("/dev/full").write_text("x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with short("Too many open files; .*ulimit -n"):
            os.pipe()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(FileNotFoundError), one_sentence_for_shortages():
        os.stat("nosuch")  # nothing is short: a defect, which keeps its traceback


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"x = 1\nif x\n", "line 2: "),
        (b"x = '\xff'\n", "line 1: (unicode error)"),
        (b"\0", "null bytes"),
        (b"print('\\d', 1 is 1)  # warned of when it runs\n", ""),
    ],
)
def test_a_script_that_is_not_python_is_told_before_anything_starts(
    tmp_path: Path, content: bytes, told: str
) -> None:
    script = tmp_path / "train.py"
    script.write_bytes(content)
    if not told:
        assert parse(str(script)).worker == (str(script),)
        return
    with pytest.raises(ConfigError) as caught:
        parse(str(script))
    assert str(caught.value).startswith(str(script))
    assert told in str(caught.value)


def test_several_nodes_need_an_etcd_they_share(script: str) -> None:
    with pytest.raises(ConfigError, match="--nnodes 2:2 needs an etcd"):
        launch.check(parse("--nnodes", "2", script).loaded.config)


@pytest.mark.paddle
def test_devices_need_a_paddle_that_can_use_them(script: str) -> None:
    import paddle

    if paddle.is_compiled_with_cuda():
        assert not launch.cpu_only()
        return
    with pytest.raises(ConfigError, match="--devices 0,1 needs .* for the CPU alone"):
        launch.check(parse("--gpus", "0,1", script).loaded.config)


def test_a_paddle_with_an_accelerator_is_not_taken_for_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "paddle" / "version" / "__init__.py"
    version.parent.mkdir(parents=True)
    (tmp_path / "paddle" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    for line, expected in (
        ("cuda_version     = 'False'\nhip_version = None\n", True),
        ("cuda_version     = '12.6'\nhip_version = None\n", False),
        ("cuda_version = 'False'\nxpu_version = '20240101'\n", False),
        ("nothing = 1\n", False),
    ):
        version.write_text(line)
        assert launch.cpu_only() is expected, line


def test_each_process_needs_a_device(script: str) -> None:
    config = parse("--devices", "0", "--nproc_per_node", "2", script).loaded.config
    with pytest.raises(ConfigError, match="--devices names 1"):
        launch.check(config)
