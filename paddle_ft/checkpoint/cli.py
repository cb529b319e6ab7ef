"""``paddle-ft ckpt``: look at the checkpoints in a store and look after them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from paddle_ft import config
from paddle_ft.checkpoint import commit, layout, standalone
from paddle_ft.checkpoint.collect import collect
from paddle_ft.checkpoint.exchange import Form, export, image_of, read_files
from paddle_ft.checkpoint.manifest import Manifest, Piece
from paddle_ft.checkpoint.progress import bar, counted
from paddle_ft.checkpoint.restore import verify as verify_blocks
from paddle_ft.checkpoint.retention import metrics_of
from paddle_ft.checkpoint.sign import Trust, make_keys, signed_manifests
from paddle_ft.checkpoint.store import Store, open_store, tiers_of
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.checkpoint.words import age, moment, size
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch, ConfigError, StoreMissing
from paddle_ft.types import CommitRef

ckpt_app = typer.Typer(
    help="Look at checkpoints and look after them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Argument(help="a directory, file:///dir or s3://bucket/prefix")]
Step = Annotated[int | None, typer.Option(help="the checkpoint of this step; default: the newest")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="TOML file with the settings")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]


class _OfOneStep(TyperCommand):
    """A command that says how to name the step to who gives it beside the URL, as to ``diff``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if not ctx.args:
            return rest
        words = (*ctx.args, str(ctx.params["url"]))
        step = next((word for word in words if word.isdecimal()), "N")
        raise ConfigError(f"{ctx.command_path} takes a URL alone; name the step as --step {step}.")


def settings_of(config_file: str | None) -> CheckpointConfig:
    return config.load({}, os.environ, config_file).config.checkpoint


def open_url(url: str, config_file: str | None) -> tuple[Store, Trust]:
    """The store at ``url``, and who is trusted, by the settings of file and environment.

    Raises StoreMissing for a directory that is not there.
    """
    settings = settings_of(config_file)
    store = open_store(url, settings)
    place = tiers_of(store)[-1]
    if isinstance(place, DirectoryStore) and not os.path.isdir(place.url):
        raise StoreMissing(f"there is no directory {place.url}; correct the URL.")
    return store, Trust.of(settings)


def pinned_by_people(store: Store) -> dict[str, list[str]]:
    """Who pinned which manifest, without the jobs that began from one (``commit.adopt``)."""
    jobs = {name.owner for info in store.find(layout.OWNERS) if (name := layout.parse(info.name))}
    pins = commit.pins(store)
    return {manifest: sorted(owners - jobs) for manifest, owners in pins.items() if owners - jobs}


def choose(store: Store, step: int | None) -> CommitRef:
    """The newest commit (of ``step``); raises CheckpointMismatch if there is none."""
    refs = commit.list_commits(store)
    for ref in refs:
        if step is None or ref.step == step:
            return ref
    if not refs:
        raise CheckpointMismatch(f"{store.url} holds no checkpoint; correct the URL.")
    steps = ", ".join(str(ref.step) for ref in refs[:20])
    raise CheckpointMismatch(f"{store.url} holds no checkpoint of step {step}; there are {steps}.")


def screen() -> Console:
    """Standard output; wide where nobody looks, so that tables keep one line for one row."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def _emit(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@ckpt_app.command()
def ls(url: Url, config_file: ConfigFile = None, as_json: Json = False) -> None:
    """List the checkpoints, newest first."""
    store, trust = open_url(url, config_file)
    pinned, signed = pinned_by_people(store), signed_manifests(store)
    unchecked = trust.verify == "off" or not trust.keys
    rows = []
    for ref in commit.list_commits(store):
        row: dict[str, Any] = {"step": ref.step, "sequence": ref.sequence, "signed": "no"}
        if ref.manifest in signed:
            row["signed"] = "unchecked" if unchecked else "yes"
        try:
            row |= _facts(commit.read_manifest(store, ref, trust))
        except CheckpointDamaged as error:
            row["damaged"] = str(error)
        row["pinned"] = pinned.get(ref.manifest, [])
        rows.append(row | {"manifest": ref.manifest})
    if as_json:
        _emit(rows)
        return
    table = Table("step", "time", "age", "size", "new", "world", "signed", "pinned", "", box=None)
    for row in rows:
        table.add_row(*_line(row))
    screen().print(table if rows else f"{store.url} holds no checkpoint")
    for row in rows:
        if "damaged" in row:
            typer.echo(row["damaged"])


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "created_s": manifest.created_s,
        "bytes": manifest.nbytes,
        "bytes_new": manifest.bytes_new,
        "world_size": manifest.world_size,
        "generation": manifest.generation,
    }


def _training(manifest: Manifest) -> dict[str, Any]:
    """Where training stood, as far as the script told: epoch, samples, loss."""
    position = manifest.meta.get("position")
    facts = {}
    if isinstance(position, Mapping):
        facts = {name: position[name] for name in ("epoch", "samples") if name in position}
    return facts | dict(metrics_of(manifest.meta))


def _line(row: dict[str, Any]) -> list[str]:
    pinned = ", ".join(row["pinned"])
    if "damaged" in row:
        return [str(row["step"]), *[""] * 5, row["signed"], pinned, "not usable"]
    at = moment(row["created_s"])
    return [
        str(row["step"]),
        at,
        age(time.time() - row["created_s"]),
        size(row["bytes"]),
        size(row["bytes_new"]),
        str(row["world_size"]),
        row["signed"],
        pinned,
        "",
    ]


@ckpt_app.command(cls=_OfOneStep)
def show(
    url: Url, step: Step = None, config_file: ConfigFile = None, as_json: Json = False
) -> None:
    """Show one checkpoint: what it holds, tensor by tensor."""
    store, trust = open_url(url, config_file)
    ref = choose(store, step)
    manifest = commit.read_manifest(store, ref, trust)
    tensors = [
        {"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes}
        | ({"rank": t.rank} if t.rank >= 0 else {})
        for t in manifest.tensors
    ]
    facts = {"step": ref.step, "sequence": ref.sequence} | _facts(manifest)
    facts |= _training(manifest)
    facts |= {"manifest": ref.manifest, "sha256": ref.digest, "parent": manifest.parent}
    if as_json:
        _emit(facts | {"objects": manifest.objects, "tensors": tensors, "meta": manifest.meta})
        return
    out = screen()
    for name, value in facts.items():
        shown = size(value) if name.startswith("bytes") else value
        if name == "created_s":
            name, shown = "created", moment(value)
        out.print(f"{name:12} {shown}", highlight=False)
    table = Table("tensor", "dtype", "shape", "size", "rank", box=None)
    for t in manifest.tensors:
        rank = str(t.rank) if t.rank >= 0 else "all"
        table.add_row(t.name, t.dtype, str(list(t.shape)), size(t.nbytes), rank)
    out.print(table)
    kinds = Counter(name.rpartition("/")[0] for name in manifest.objects)
    told = f"{len(manifest.objects)} object{'s' * (len(manifest.objects) != 1)}"
    out.print(f"in {told} of {len(kinds)} write{'s' * (len(kinds) != 1)}", highlight=False)


@ckpt_app.command(cls=_OfOneStep)
def verify(
    url: Url,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="all checkpoints, not one")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Read every byte of a checkpoint; check all checksums, and the signature if there is one."""
    store, trust = open_url(url, config_file)
    refs = commit.list_commits(store) if every else [choose(store, step)]
    bad: list[CheckpointDamaged] = []
    for ref in refs:
        try:
            manifest = commit.read_manifest(store, ref, trust)
            with bar(
                f"verifying step {ref.step}, {size(manifest.nbytes)}", manifest.nbytes
            ) as tell:
                found = verify_blocks(counted(store, tell), ref, manifest)
        except CheckpointDamaged as error:
            found = [error]
        for fault in found:
            typer.echo(str(fault), err=True)
        typer.echo(f"step {ref.step}: {'damaged' if found else 'intact'}")
        bad += found
    if bad:
        raise CheckpointDamaged(
            f"{len(bad)} faults were found in {store.url}; use a checkpoint that is intact."
        )


@ckpt_app.command()
def diff(
    url: Url,
    first: Annotated[int, typer.Argument(help="step")],
    second: Annotated[int, typer.Argument(help="step")],
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Show which tensors differ between two checkpoints, and by how many bytes of blocks."""
    store, trust = open_url(url, config_file)
    one, other = (
        commit.read_manifest(store, choose(store, step), trust).tensors for step in (first, second)
    )
    rows = differences(one, other)
    if as_json:
        _emit([{"name": n, "rank": r, "change": c, "bytes": b} for n, r, c, b in rows])
        return
    table = Table("tensor", "rank", "", "bytes in changed blocks", box=None)
    for name, rank, change, nbytes in rows:
        table.add_row(name, str(rank) if rank >= 0 else "all", change, size(nbytes))
    screen().print(table if rows else "no tensor differs")


def differences(
    first: tuple[Piece, ...], second: tuple[Piece, ...]
) -> list[tuple[str, int, str, int]]:
    """(name, rank, what changed, bytes of blocks that are not the same) of all that differ."""
    old, new = ({(t.name, t.rank): t for t in side} for side in (first, second))
    rows = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before is None or after is None:
            there = before or after
            assert there is not None
            rows.append((*key, "added" if before is None else "removed", there.nbytes))
        elif (before.dtype, before.shape) != (after.dtype, after.shape):
            rows.append((*key, "another dtype or shape", after.nbytes))
        else:
            pairs = zip(before.blocks, after.blocks, strict=True)
            nbytes = sum(b.nbytes for a, b in pairs if a.digest != b.digest)
            if nbytes:
                rows.append((*key, "changed", nbytes))
    return rows


Who = Annotated[str, typer.Option(help="under this name (letters, digits and _)")]


@ckpt_app.command(cls=_OfOneStep)
def pin(url: Url, step: Step = None, who: Who = "user", config_file: ConfigFile = None) -> None:
    """Keep a checkpoint whatever retention says, until it is unpinned."""
    store, _ = open_url(url, config_file)
    ref = choose(store, step)
    if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", who):
        raise ConfigError(f"--who {who!r} must be letters, digits and _; use another name.")
    commit.pin(store, ref, who)
    typer.echo(f"step {ref.step} is pinned")


@ckpt_app.command(cls=_OfOneStep)
def unpin(url: Url, step: Step = None, who: Who = "user", config_file: ConfigFile = None) -> None:
    """Let retention decide about a checkpoint again."""
    store, _ = open_url(url, config_file)
    ref = choose(store, step)
    commit.unpin(store, ref.manifest, who)
    others = pinned_by_people(store).get(ref.manifest)
    still = f", but still by {', '.join(others)}" if others else ""
    typer.echo(f"step {ref.step} is no longer pinned by {who}{still}")


@ckpt_app.command()
def gc(
    url: Url,
    delete: Annotated[bool, typer.Option("--delete", help="do it; otherwise only tell")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Remove what no checkpoint refers to, by the newest writer's idea of what is kept.

    Safe while jobs are writing: they do the same after each commit.
    """
    store, _ = open_url(url, config_file)
    head = commit.newest_head(store)
    if head is None:
        raise CheckpointMismatch(f"{store.url} holds no checkpoint; correct the URL.")
    parsed = layout.parse(head.newest.manifest)
    assert parsed is not None
    with bar(f"looking through {store.url}", None, unit="objects deleted") as tell:
        names = collect(counted(store, tell), head, parsed.owner, dry_run=not delete)
    for name in names:
        typer.echo(name)
    typer.echo(f"{len(names)} objects {'deleted' if delete else 'would be deleted (--delete)'}")


@ckpt_app.command()
def keygen(
    directory: Annotated[str, typer.Argument(help="where the two files go; made if need be")],
) -> None:
    """Make a key pair to sign checkpoints with.

    checkpoint.sign_key is the private file, which only the trainer may read;
    checkpoint.trusted_keys names the public one, for everybody who loads.
    """
    private, public, name = make_keys(directory)
    typer.echo(f"private key: {private}\npublic key:  {public}\nid:          {name}")


@ckpt_app.command("export", cls=_OfOneStep)
def export_command(
    url: Url,
    to: Annotated[Path, typer.Option(help="new directory for the files")],
    step: Step = None,
    form: Annotated[Form, typer.Option("--format", help="of the files")] = "paddle",
    config_file: ConfigFile = None,
) -> None:
    """Write a checkpoint as files that Paddle, or whoever reads safetensors, can load."""
    store, trust = open_url(url, config_file)
    ref = choose(store, step)
    manifest = commit.read_manifest(store, ref, trust)
    with bar(f"exporting step {ref.step}, {size(manifest.nbytes)}", manifest.nbytes) as tell:
        files = export(counted(store, tell), ref, manifest, to, form)
    for file in files:
        typer.echo(str(file))


@ckpt_app.command("import")
def import_command(
    url: Url,
    files: Annotated[
        list[Path], typer.Argument(help="an exported directory, or .pdparams .pdopt .safetensors")
    ],
    step: Annotated[int | None, typer.Option(min=0, help="of the new checkpoint")] = None,
    config_file: ConfigFile = None,
) -> None:
    """Make a new checkpoint of files; nothing in them is run. The others in the store stay."""
    settings = settings_of(config_file)
    tensors, meta, known_step = read_files(files)
    at = known_step if step is None else step
    nbytes = sum(raw.data.nbytes for raw in tensors.values())
    with bar(f"importing {len(tensors)} tensors, {size(nbytes)}", nbytes) as tell:
        info, image = image_of(tensors, meta, at, tell)
        ref = standalone.save_image(url, info, image, config=settings).wait()
    typer.echo(f"step {ref.step}: {ref.manifest}")
