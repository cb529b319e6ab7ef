"""Signed manifests: what is refused, by which sentence, on every way to load (B7)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from typer.testing import CliRunner

from paddle_ft import config as settings
from paddle_ft.checkpoint import commit, layout, retention, standalone
from paddle_ft.checkpoint.cli import ckpt_app
from paddle_ft.checkpoint.collect import collect
from paddle_ft.checkpoint.manifest import canonical, decode_manifest, encode_manifest
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.checkpoint.sign import Trust, make_keys
from paddle_ft.checkpoint.store import open_store
from paddle_ft.checkpoint.write import digest_of
from paddle_ft.config import CheckpointConfig, Config
from paddle_ft.errors import CheckpointDamaged, ConfigError
from paddle_ft.types import CommitRef, Head

STATE = {"w": np.arange(2000.0), "b": np.ones(3, np.float32)}


class Keys:
    """A key pair in files."""

    def __init__(self, place: Path) -> None:
        private, public, self.id = make_keys(place)
        self.private, self.public = str(private), str(public)

    def signing(self, **more: object) -> CheckpointConfig:
        return CheckpointConfig.model_validate({"sign_key": self.private, **more})

    def trusting(self, verify: str = "required") -> CheckpointConfig:
        return CheckpointConfig.model_validate({"trusted_keys": [self.public], "verify": verify})


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


@pytest.fixture
def other(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "other")


@pytest.fixture
def url(tmp_path: Path, keys: Keys) -> str:
    """A store with the signed checkpoints of steps 1 and 2."""
    place = str(tmp_path / "store")
    for step in (1, 2):
        state = {**STATE, "step": np.array([step])}
        standalone.save(place, state, step, config=keys.signing()).wait()
    return place


def newest(url: str) -> CommitRef:
    return commit.list_commits(open_store(url))[0]


def unsign(url: str, ref: CommitRef) -> None:
    open_store(url).delete([layout.signature_name(ref.manifest)])


def rewrite(url: str, ref: CommitRef, content: bytes) -> CommitRef:
    """What an attacker with write access does: another manifest, and a marker that fits it."""
    store = open_store(url)
    head = commit.read_marker(store, layout.commit_name(ref.manifest))
    forged = replace(ref, digest=digest_of(content))
    store.put(ref.manifest, content)
    commit.mark_committed(store, replace(head, newest=forged))
    return forged


# ---------------------------------------------------------------- ways to load


def by_room(url: str, config: CheckpointConfig, place: Path) -> int:
    """As an agent does; the step."""
    room = CheckpointRoom(open_store(url, config), Config(checkpoint=config))
    image = place / "image"
    image.unlink(missing_ok=True)
    return room.restore(newest(url), ranks=[0], world_size=1, path=image)[0].step


def by_library(url: str, config: CheckpointConfig, place: Path) -> int:
    return int(standalone.load(url, step=newest(url).step, config=config)["step"][0])


def by_command(name: str) -> Callable[[str, CheckpointConfig, Path], int]:
    def load(url: str, config: CheckpointConfig, place: Path) -> int:
        file = place / "config.toml"
        lines = [f"trusted_keys = {json.dumps(config.trusted_keys)}", f'verify = "{config.verify}"']
        file.write_text("\n".join(["[checkpoint]", *lines]))
        arguments = [name, url, "--config", str(file)]
        if name == "export":
            shutil.rmtree(place / "out", ignore_errors=True)
            arguments += ["--to", str(place / "out"), "--format", "safetensors"]
        result = CliRunner().invoke(ckpt_app, arguments)
        if isinstance(result.exception, CheckpointDamaged):
            raise CheckpointDamaged(result.output + str(result.exception))
        assert result.exception is None, result.output
        return newest(url).step

    return load


WAYS = [
    pytest.param(by_room, id="room"),
    pytest.param(by_library, id="library"),
    pytest.param(by_command("verify"), id="verify"),
    pytest.param(by_command("show"), id="show"),
    pytest.param(by_command("export"), id="export"),
]
Way = Callable[[str, CheckpointConfig, Path], int]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_signed_by_the_trusted_is_loaded(
    url: str, keys: Keys, tmp_path: Path, way: Way
) -> None:
    for verify in ("required", "if-present", "off"):
        assert way(url, keys.trusting(verify), tmp_path) == 2


@pytest.mark.parametrize("way", WAYS)
def test_an_altered_manifest_with_a_digest_that_fits(
    url: str, keys: Keys, tmp_path: Path, way: Way
) -> None:
    ref = newest(url)
    manifest = decode_manifest(open_store(url).get(ref.manifest), "here")
    forged = replace(manifest, meta={**manifest.meta, "metrics": {"loss": 0.0}})
    rewrite(url, ref, encode_manifest(forged))
    for verify in ("required", "if-present"):
        with pytest.raises(CheckpointDamaged, match="not what was signed"):
            way(url, keys.trusting(verify), tmp_path)
    assert way(url, keys.trusting("off"), tmp_path) == 2  # so the attack would have worked


@pytest.mark.parametrize("way", WAYS)
def test_the_signature_of_another_checkpoint(
    url: str, keys: Keys, tmp_path: Path, way: Way
) -> None:
    store = open_store(url)
    new, old = commit.list_commits(store)
    store.put(layout.signature_name(new.manifest), store.get(layout.signature_name(old.manifest)))
    for verify in ("required", "if-present"):
        with pytest.raises(CheckpointDamaged, match="belongs to another checkpoint"):
            way(url, keys.trusting(verify), tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_signature_taken_away(url: str, keys: Keys, tmp_path: Path, way: Way) -> None:
    ref = newest(url)
    unsign(url, ref)
    with pytest.raises(CheckpointDamaged, match=f"{ref.manifest} is not signed"):
        way(url, keys.trusting(), tmp_path)
    assert way(url, keys.trusting("if-present"), tmp_path) == 2


@pytest.mark.parametrize("way", WAYS)
def test_signed_with_another_key(
    url: str, keys: Keys, other: Keys, tmp_path: Path, way: Way
) -> None:
    for verify in ("required", "if-present"):
        with pytest.raises(CheckpointDamaged, match=f"the key {keys.id}, which is not trusted"):
            way(url, other.trusting(verify), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format":1,"kind":"signature"}', b"\xff"]
)
def test_a_signature_that_is_none(url: str, keys: Keys, tmp_path: Path, content: bytes) -> None:
    open_store(url).put(layout.signature_name(newest(url).manifest), content)
    with pytest.raises(CheckpointDamaged, match="signature of .* is damaged"):
        by_room(url, keys.trusting("if-present"), tmp_path)


def test_a_signature_that_claims_to_be_by_a_trusted_key(
    url: str, keys: Keys, other: Keys, tmp_path: Path
) -> None:
    store, ref = open_store(url), newest(url)
    manifest = decode_manifest(store.get(ref.manifest), "here")
    Trust.of(other.signing()).sign(store, ref, manifest)
    name = layout.signature_name(ref.manifest)
    store.put(name, canonical(json.loads(store.get(name)) | {"key": keys.id}))
    with pytest.raises(CheckpointDamaged, match="not what was signed"):
        by_room(url, keys.trusting(), tmp_path)


def test_an_old_checkpoint_under_a_new_name(url: str, keys: Keys, tmp_path: Path) -> None:
    store = open_store(url)
    new, old = commit.list_commits(store)
    name = layout.manifest_name(9, old.step, "forged", "0f")
    store.put(name, store.get(old.manifest))
    store.put(layout.signature_name(name), store.get(layout.signature_name(old.manifest)))
    ref = replace(old, manifest=name, sequence=9)
    commit.mark_committed(store, Head(ref, (new,), commit.identify(store)))
    with pytest.raises(CheckpointDamaged, match="not what was signed"):
        by_room(url, keys.trusting(), tmp_path)


def test_a_checkpoint_that_is_refused_gives_way_to_the_one_before(
    url: str, keys: Keys, tmp_path: Path
) -> None:
    unsign(url, newest(url))
    assert standalone.load(url, config=keys.trusting())["step"][0] == 1
    standalone.save(url, {**STATE, "step": np.array([3])}, 3, config=keys.signing()).wait()
    assert by_room(url, keys.trusting(), tmp_path) == 3


def test_nobody_is_trusted_where_nothing_is_configured(url: str, tmp_path: Path) -> None:
    assert by_library(url, CheckpointConfig(), tmp_path) == 2
    rows = json.loads(CliRunner().invoke(ckpt_app, ["ls", url, "--json"]).output)
    assert [row["signed"] for row in rows] == ["unchecked"] * 2


def test_ls_tells_who_is_signed(url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    unsign(url, newest(url))
    monkeypatch.setenv("PADDLE_FT_CHECKPOINT__TRUSTED_KEYS", keys.public)
    rows = json.loads(CliRunner().invoke(ckpt_app, ["ls", url, "--json"]).output)
    assert [row["signed"] for row in rows] == ["no", "yes"]
    monkeypatch.setenv("PADDLE_FT_CHECKPOINT__VERIFY", "required")
    assert "is not signed" in CliRunner().invoke(ckpt_app, ["ls", url]).output


def test_an_agent_signs_and_its_own_key_is_trusted(tmp_path: Path, keys: Keys) -> None:
    url = str(tmp_path / "mine")
    config = keys.signing(verify="required")
    standalone.save(url, STATE, 1, config=config).wait()
    assert standalone.load(url, config=config)["b"][0] == 1
    assert layout.signature_name(newest(url).manifest) in {
        i.name for i in open_store(url).find(layout.SIGNATURES)
    }


# ---------------------------------------------------------------- the collector


def test_signatures_go_with_their_manifests(url: str, keys: Keys) -> None:
    config = keys.signing()
    for step in range(3, 7):
        handle = standalone.save(
            url, {"w": np.full(9, step)}, step, keep=retention.KeepLast(2), config=config
        )
        handle.wait()
    store = open_store(url)
    names = {i.name for i in store.find("signatures/")}
    assert names == {layout.signature_name(r.manifest) for r in commit.list_commits(store)}
    assert len(names) == 2


def test_a_signature_whose_manifest_never_came_is_garbage(url: str) -> None:
    store = open_store(url)
    head = commit.newest_head(store)
    assert head
    parsed = layout.parse(head.newest.manifest)
    assert parsed
    lost = layout.signature_name(layout.manifest_name(2, 2, parsed.owner, "0f"))
    coming = layout.signature_name(layout.manifest_name(3, 3, parsed.owner, "0f"))
    for name in (lost, coming):
        store.put(name, b"x")
    assert collect(store, head, parsed.owner) == [lost]


# ---------------------------------------------------------------- keys that are none


def rsa_key() -> bytes:
    key = generate_private_key(65537, 2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def sentence(config: CheckpointConfig, tmp_path: Path) -> str:
    """What stops the start, of an agent and of a script."""
    with pytest.raises(ConfigError) as caught:
        CheckpointRoom.open(Config(checkpoint=config.model_copy(update={"url": str(tmp_path)})))
    text = str(caught.value)
    with pytest.raises(ConfigError) as caught:
        standalone.save(str(tmp_path), STATE, 1, config=config)
    assert str(caught.value) == text
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_keys_that_cannot_be_used(tmp_path: Path, keys: Keys) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(rsa_key())
    text = tmp_path / "text"
    text.write_text("hello")
    key = serialization.load_pem_private_key(Path(keys.private).read_bytes(), None)
    locked = tmp_path / "locked"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open"),
        )
    )

    def said(**given: object) -> str:
        return sentence(CheckpointConfig.model_validate(given), tmp_path / "store")

    assert "cannot read" in said(sign_key=str(tmp_path / "none"))
    assert "cannot read" in said(sign_key=str(tmp_path))
    assert "not a private key" in said(sign_key=str(text))
    assert "not a private key" in said(sign_key=keys.public)
    assert "not an ed25519 key" in said(sign_key=str(wrong))
    assert "password" in said(sign_key=str(locked))
    assert "BEGIN" not in said(sign_key="-----BEGIN PRIVATE KEY-----\nx\n")
    assert "no public key" in said(trusted_keys=[str(text)])
    assert "no public key" in said(trusted_keys=[keys.private])
    assert "cannot read" in said(trusted_keys=["none"])
    assert "nobody is trusted" in said(verify="required")


def test_the_key_may_stand_in_the_environment_and_is_not_shown(keys: Keys) -> None:
    content = Path(keys.private).read_text()
    loaded = settings.load({}, {"PADDLE_FT_CHECKPOINT__SIGN_KEY": content})
    assert Trust.of(loaded.config.checkpoint).signer is not None
    assert "BEGIN" not in "\n".join(loaded.describe()) + repr(loaded.config)


def test_several_keys_in_files_and_lists(keys: Keys, other: Keys, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(Path(keys.public).read_text() + Path(other.public).read_text())
    trust = Trust.of(CheckpointConfig(trusted_keys=(str(both),)))
    assert trust.keys
    assert set(trust.keys) == {keys.id, other.id}
    loaded = settings.load(
        {}, {"PADDLE_FT_CHECKPOINT__TRUSTED_KEYS": f"{keys.public},{other.public}"}
    )
    assert Trust.of(loaded.config.checkpoint).keys == trust.keys


def test_keygen(tmp_path: Path) -> None:
    place = tmp_path / "made"
    result = CliRunner().invoke(ckpt_app, ["keygen", str(place)], catch_exceptions=False)
    private, public = sorted(place.iterdir())
    assert str(private) in result.output
    assert str(public) in result.output
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="there already"):
        CliRunner().invoke(ckpt_app, ["keygen", str(place)], catch_exceptions=False)
    assert "BEGIN" not in result.output
