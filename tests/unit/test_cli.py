"""``paddle-ft``: what it offers, told without loading what it does not need."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from paddle_ft import cli, command_line
from paddle_ft.checkpoint.cli import ckpt_app
from paddle_ft.errors import EXIT_BUG, EXIT_MACHINE, ConfigError

HEAVY = {"boto3", "botocore", "cryptography", "etcd3", "fsspec", "grpc", "paddle"}


@pytest.mark.parametrize("module", ["cli", "launch"])
def test_help_is_told_without_the_heavy_libraries(module: str) -> None:
    code = f"""if True:
        import sys
        from paddle_ft import {module}
        sys.argv = ["x", "--help"]
        try:
            {module}.main()
        except SystemExit:
            pass
        print("loaded:", *({{name.partition(".")[0] for name in sys.modules}} & {HEAVY!r}))
    """
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in told.stdout or "usage" in told.stdout
    assert told.stdout.endswith("loaded:\n")


def test_the_commands_for_checkpoints_are_there() -> None:
    told = CliRunner().invoke(cli.app, ["ckpt", "--help"])
    assert told.exit_code == 0
    names = [command.name or command.callback.__name__ for command in ckpt_app.registered_commands]
    assert all(f" {name} " in told.output for name in names)
    assert CliRunner().invoke(cli.app, ["ckpt", "ls", "--help"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["ckpt", "nosuch"]).exit_code == 2


def test_both_commands_tell_their_version(capsys: pytest.CaptureFixture[str]) -> None:
    told = CliRunner().invoke(cli.app, ["--version"])
    with pytest.raises(SystemExit) as ended:
        command_line.parse(["--version"], {})
    assert (told.exit_code, ended.value.code) == (0, 0)
    assert told.output == capsys.readouterr().out == f"{command_line.version()}\n"
    assert command_line.version().startswith("paddle-ft 0.")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["serve", "--ht"], {"--http_port", "--http-port"}),
        (["launch", "--then"], {"--then_serve", "--then-serve"}),
        (["serving", "--level", "h"], {"hot-standby"}),
        (["prom"], {"promote"}),
    ],
)
def test_the_shell_completes_flags_of_every_command(typed: list[str], found: set[str]) -> None:
    asked = {"COMP_WORDS": " ".join(["paddle-ft", *typed]), "COMP_CWORD": str(len(typed))}
    environ = asked | {"_PADDLE_FT_COMPLETE": "complete_bash"}
    told = CliRunner().invoke(cli.app, [], env=environ, prog_name="paddle-ft")
    assert set(told.output.split()) == found


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("it is wrong"), 2, "paddle-ft: error: it is wrong\n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), EXIT_MACHINE, "free memory"),
        (ZeroDivisionError("division by zero"), EXIT_BUG, ""),
    ],
)
def test_every_error_ends_in_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    told: str,
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serving", "promote", "gateway"])
def test_a_command_for_a_serving_group_says_which_flag_it_lacks(command: str) -> None:
    told = CliRunner().invoke(cli.app, [command])
    assert isinstance(told.exception, ConfigError)
    assert "give --etcd host:port" in str(told.exception)
    told = CliRunner().invoke(cli.app, [command, "--etcd", "127.0.0.1:1", "--group", "../x"])
    assert isinstance(told.exception, ConfigError)
    assert "--group ../x is not allowed" in str(told.exception)
