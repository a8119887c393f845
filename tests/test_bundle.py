"""A bundle proves itself or is refused; the store never holds half a model."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from models import bundle, signing
from models.bundle import MANIFEST, Manifest
from models.signing import SIGNATURE, Signer, Trust, keys_told, make_keys, signer_of, trust_of
from redqueen.errors import BundleError, InvalidInput, NotFound
from redqueen.settings import Settings
from redqueen.store import DirectoryStore
from tests.keys import keys
from tests.toy_model import toy_bundle

SIGNER, TRUST = keys()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed bundle of one's own to break."""
    copy = Path(shutil.copytree(toy_bundle(), tmp_path / "bundle"))
    SIGNER.sign(copy)
    return copy


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def reseal(folder: Path) -> Manifest:
    """Write a fresh manifest over whatever the folder holds now, as an honest trainer would."""
    old = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    return bundle.write_manifest(
        folder,
        policies=old.policies,
        features_version=old.features_version,
        feature_names=old.feature_names,
        selected=old.selected,
        snapshot=old.snapshot,
        code_version=old.code_version,
        parent=old.parent,
        created_at=old.created_at,
    )


def test_a_whole_bundle_verifies_and_says_what_it_is(folder: Path) -> None:
    manifest = bundle.verify(folder)
    assert manifest.model_id.startswith("m-")
    assert len(manifest.model_id) == 14
    assert manifest.policies == ("spam", "scam")
    assert manifest.feature_names == ("rate", "age")
    assert manifest.behaviour
    assert set(manifest.files) == {p.name for p in folder.iterdir()} - {MANIFEST, SIGNATURE}


FILES = (*bundle.REQUIRED, *bundle.ENCODER_FILES, bundle.TREES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_any_changed_byte_of_a_file_is_refused(folder: Path, name: str, where: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        bundle.verify(folder)


@settings(deadline=None)
@given(where=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_changed_bit_of_the_manifest_is_refused(where: float, bit: int) -> None:
    data = bytearray((toy_bundle() / MANIFEST).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1 << bit
    with pytest.raises(BundleError):
        Manifest.from_bytes(bytes(data))


@given(tail=st.binary(min_size=1, max_size=4))
def test_anything_appended_to_the_manifest_is_refused(tail: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_bytes((toy_bundle() / MANIFEST).read_bytes() + tail)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"'{name}' is missing"):
        bundle.verify(folder)


def test_an_extra_file_is_refused(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"weights\.pkl.*not in the manifest"):
        bundle.verify(folder)


def test_a_folder_inside_is_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    with pytest.raises(BundleError, match="not a plain file"):
        bundle.verify(folder)


@pytest.mark.parametrize("name", [bundle.FUSION, MANIFEST])
def test_a_symbolic_link_is_refused_though_its_content_is_right(
    folder: Path, name: str, tmp_path: Path
) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.verify(folder)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.verify(tmp_path / "link")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", "a\\b"])
def test_a_path_that_leaves_the_folder_is_refused_even_with_a_valid_seal(folder: Path, name: str) -> None:
    manifest = bundle.verify(folder)
    forged = dataclasses.replace(manifest, files={**manifest.files, name: "0" * 64})
    (folder / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(BundleError, match="leave the folder"):
        bundle.verify(folder)


def test_content_under_another_models_id_is_refused(folder: Path) -> None:
    manifest = bundle.verify(folder)
    forged = dataclasses.replace(manifest, model_id="m-000000000000")
    (folder / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(BundleError, match="calls itself m-000000000000"):
        bundle.verify(folder)


def test_an_absent_bundle_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Fetch or train it again"):
        bundle.verify(tmp_path / "nothing")


def test_the_id_follows_what_the_model_answers_and_nothing_else(folder: Path) -> None:
    before = bundle.verify(folder).model_id
    (folder / bundle.METRICS).write_text("{}")
    assert reseal(folder).model_id == before
    thresholds = json.loads((folder / bundle.FUSION).read_text())
    thresholds["thresholds"][0] += 0.01
    (folder / bundle.FUSION).write_text(json.dumps(thresholds))
    assert reseal(folder).model_id != before


# -- the signature -------------------------------------------------------------------------------------------


def test_a_signed_bundle_is_trusted_and_an_unsigned_one_is_not(folder: Path) -> None:
    assert bundle.verify(folder, TRUST) == bundle.verify(folder)
    (folder / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="not signed"):
        bundle.verify(folder, TRUST)


def test_another_keys_signature_is_refused(folder: Path) -> None:
    stranger, _ = keys("a stranger's")
    stranger.sign(folder)
    with pytest.raises(BundleError, match="signature does not hold"):
        bundle.verify(folder, TRUST)


def test_a_bundle_sealed_anew_after_signing_is_refused_though_its_digests_hold(folder: Path) -> None:
    (folder / bundle.METRICS).write_text("{}")
    reseal(folder)
    bundle.verify(folder)
    with pytest.raises(BundleError, match="signature does not hold"):
        bundle.verify(folder, TRUST)


@given(where=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_any_changed_bit_of_the_signature_that_parses_at_all_is_refused(where: float, bit: int) -> None:
    folder = _signed_once()
    good = (folder / SIGNATURE).read_bytes()
    data = bytearray(good)
    data[int(where * (len(data) - 1))] ^= 1 << bit
    try:
        (folder / SIGNATURE).write_bytes(data)
        if _means_the_same(good, bytes(data)):
            return
        with pytest.raises(BundleError):
            bundle.verify(folder, TRUST)
    finally:
        (folder / SIGNATURE).write_bytes(good)


@functools.cache
def _signed_once() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="redqueen-signed-")) / "bundle"
    shutil.copytree(toy_bundle(), folder)
    SIGNER.sign(folder)
    return folder


def _means_the_same(good: bytes, changed: bytes) -> bool:
    """Whether only prose changed: what is signed and the signature over it are the same."""
    try:
        told = [json.loads(data)["dsseEnvelope"] for data in (good, changed)]
        parts = [
            (base64.b64decode(t["payload"]), t["payloadType"], base64.b64decode(t["signatures"][0]["sig"]))
            for t in told
        ]
    except (ValueError, KeyError, LookupError, TypeError):
        return False
    return parts[0] == parts[1]


@pytest.mark.parametrize("good_first", [True, False])
def test_the_signature_that_is_verified_is_the_one_that_was_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_first: bool
) -> None:
    good, hashing = (folder / SIGNATURE).read_bytes(), signing._hashing
    make_keys(tmp_path / "other.pem", tmp_path / "other.pub")
    Signer(tmp_path / "other.pem").sign(folder)
    forged = (folder / SIGNATURE).read_bytes()
    first, then = (good, forged) if good_first else (forged, good)
    (folder / SIGNATURE).write_bytes(first)

    def swapping(of: Path) -> object:
        (folder / SIGNATURE).write_bytes(then)
        return hashing(of)

    monkeypatch.setattr(signing, "_hashing", swapping)
    if good_first:
        bundle.verify(folder, TRUST)
    else:
        with pytest.raises(BundleError, match="signature does not hold"):
            bundle.verify(folder, TRUST)


def test_a_link_in_place_of_the_signature_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / SIGNATURE).rename(tmp_path / "elsewhere")
    (folder / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.verify(folder, TRUST)


def test_without_a_key_nothing_is_trusted_and_the_error_names_the_setting(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="RQ_VERIFY_KEY"):
        bundle.verify(folder, Trust(tmp_path / "none.pem"))
    (tmp_path / "text.pem").write_text("not a key")
    with pytest.raises(InvalidInput, match="RQ_SIGNING_KEY"):
        Signer(tmp_path / "text.pem").sign(folder)


def test_a_home_makes_its_own_key_pair_once_readable_by_its_owner_alone(folder: Path, tmp_path: Path) -> None:
    home = Settings(home=tmp_path / "home")
    with ThreadPoolExecutor(4) as pool:
        made = {s.private_key.read_bytes() for s in pool.map(lambda _: signer_of(home), range(8))}
    assert len(made) == 1
    signer_of(home).sign(folder)
    bundle.verify(folder, trust_of(home))
    assert (tmp_path / "home" / "keys" / "signing.pem").stat().st_mode & 0o077 == 0
    make_keys(tmp_path / "k" / "a.pem", tmp_path / "k" / "b.pem")
    other = Settings(home=tmp_path / "home", verify_key=tmp_path / "k" / "b.pem")
    with pytest.raises(BundleError, match="signature does not hold"):
        bundle.verify(folder, trust_of(other))


def test_a_key_with_a_password_signs(folder: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    locked = pem.BestAvailableEncryption(b"swordfish")
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked)
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "s.pem").write_bytes(private)
    (tmp_path / "v.pem").write_bytes(public)
    home = Settings(
        home=tmp_path / "home",
        signing_key=tmp_path / "s.pem",
        verify_key=tmp_path / "v.pem",
        signing_key_password=SecretStr("swordfish"),
    )
    signer_of(home).sign(folder)
    bundle.verify(folder, trust_of(home))
    assert keys_told(home)[0] is True
    for password in (None, "cod"):
        wrong = home.model_copy(update={"signing_key_password": password and SecretStr(password)})
        with pytest.raises(InvalidInput, match="RQ_SIGNING_KEY_PASSWORD"):
            signer_of(wrong)
        assert keys_told(wrong)[0] is False


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "secp256k1"])
def test_a_key_that_cannot_sign_is_refused_before_anything_is_trained(tmp_path: Path, kind: str) -> None:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key: Any = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    }[kind]()
    plain = pem.NoEncryption()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, plain)
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "s.pem").write_bytes(secret)
    (tmp_path / "v.pem").write_bytes(shown)
    home = Settings(home=tmp_path / "home", signing_key=tmp_path / "s.pem", verify_key=tmp_path / "v.pem")
    with pytest.raises(InvalidInput, match=r"of another kind.*P-256, P-384 or P-521"):
        signer_of(home)
    assert keys_told(home)[0] is False


def test_half_a_key_pair_is_completed_or_refused_before_anything_is_trained(tmp_path: Path) -> None:
    home = Settings(home=tmp_path / "home")
    private, public = tmp_path / "home" / "keys" / "signing.pem", tmp_path / "home" / "keys" / "verify.pem"
    signer_of(home)
    shown = public.read_bytes()
    public.unlink()  # a kill between the two
    broken, told = keys_told(home)
    assert broken is False
    assert f"openssl ec -in {private} -pubout -out {public}" in told
    signer_of(home)
    assert public.read_bytes() == shown
    private.unlink()
    with pytest.raises(InvalidInput, match="put it back"):
        signer_of(home)
    assert not private.exists()
    assert "none can be signed here" in keys_told(home)[1]
    make_keys(tmp_path / "other.pem", tmp_path / "other.pub")
    foreign = Settings(home=tmp_path / "home", signing_key=tmp_path / "other.pem")
    with pytest.raises(InvalidInput, match="not the public half"):
        signer_of(foreign)
    assert keys_told(foreign)[0] is False
    (tmp_path / "text.pem").write_text("not a key")
    assert keys_told(Settings(home=tmp_path / "home", signing_key=tmp_path / "text.pem"))[0] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["x"]},
        {"files": None},
        {"files": {"a.bin": 5}},
        {"parent": 5},
        {"parent": "../../keys"},
        {"created_at": 5},
        {"created_at": "yesterday"},
        {"created_at": "2026-01-02T00:00:00"},
        {"feature_names": [["a"]]},
        {"policies": None},
        {"model_id": None},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused_though_its_seal_holds(
    folder: Path, changes: dict[str, Any]
) -> None:
    body = json.loads((folder / MANIFEST).read_bytes()) | changes
    del body["manifest_sha256"]
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    sealed = json.dumps(body | {"manifest_sha256": seal}, sort_keys=True, indent=1).encode()
    with pytest.raises(BundleError, match="not a bundle's manifest"):
        Manifest.from_bytes(sealed)
    with pytest.raises(BundleError):
        Manifest.from_bytes(b"[" * 200_000)


# -- through the store ---------------------------------------------------------------------------------------


def test_published_and_fetched_it_is_the_same_to_the_byte(
    folder: Path, store: DirectoryStore, tmp_path: Path
) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    fetched = bundle.fetch(store, model_id, tmp_path / "cache", TRUST)
    assert fetched == tmp_path / "cache" / model_id
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert bundle.fetch(store, model_id, tmp_path / "cache", TRUST) == fetched


def test_publishing_again_changes_nothing(folder: Path, store: DirectoryStore) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    before = store.get(f"models/{model_id}/{MANIFEST}").etag
    (folder / bundle.METRICS).write_text("{}")
    reseal(folder)
    SIGNER.sign(folder)
    assert bundle.publish(store, folder, TRUST) == model_id
    assert store.get(f"models/{model_id}/{MANIFEST}").etag == before


@pytest.mark.parametrize("damage", ["changed", "gone", "of another key"])
def test_publishing_again_repairs_what_cannot_be_loaded(
    folder: Path, store: DirectoryStore, tmp_path: Path, damage: str
) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    trust, key = TRUST, f"models/{model_id}/{bundle.LINEAR}"
    if damage == "changed":
        store.put(key, b"changed")
    elif damage == "gone":
        store.delete(key)
    else:
        signer, trust = keys("new")
        signer.sign(folder)
    assert bundle.problem(store, model_id, trust)
    with pytest.raises(BundleError, match="refused"):
        bundle.fetch(store, model_id, tmp_path / "cache", trust)
    assert bundle.publish(store, folder, trust) == model_id
    assert bundle.problem(store, model_id, trust) == ""


def test_an_upload_that_another_one_spoils_says_so(
    folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put_if_absent

    def spoilt(key: str, data: bytes) -> object:
        if key.endswith(MANIFEST):
            store.put(key.replace(MANIFEST, bundle.METRICS), b"of another upload")
        return put(key, data)

    monkeypatch.setattr(store, "put_if_absent", spoilt)
    with pytest.raises(BundleError, match="publish again"):
        bundle.publish(store, folder, TRUST)
    monkeypatch.undo()
    assert bundle.problem(store, bundle.publish(store, folder, TRUST), TRUST) == ""


def test_a_broken_bundle_is_not_published(folder: Path, store: DirectoryStore) -> None:
    (folder / bundle.ONNX).write_bytes(b"")
    with pytest.raises(BundleError):
        bundle.publish(store, folder, TRUST)
    assert store.list("models/") == []


def test_an_upload_that_died_is_completed(folder: Path, store: DirectoryStore, tmp_path: Path) -> None:
    model_id = bundle.verify(folder).model_id
    store.put(f"models/{model_id}/{bundle.ONNX}", (folder / bundle.ONNX).read_bytes())
    store.put(f"models/{model_id}/{bundle.METRICS}", b"of another attempt")
    with pytest.raises(NotFound):
        bundle.fetch(store, model_id, tmp_path / "cache", TRUST)
    bundle.publish(store, folder, TRUST)
    bundle.verify(bundle.fetch(store, model_id, tmp_path / "cache", TRUST))


@pytest.mark.parametrize("name", [bundle.ONNX, MANIFEST])
def test_what_was_changed_in_the_store_is_never_in_the_cache(
    folder: Path, store: DirectoryStore, tmp_path: Path, name: str
) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    key = f"models/{model_id}/{name}"
    store.put(key, store.get(key).data + b" ")
    with pytest.raises(BundleError):
        bundle.fetch(store, model_id, tmp_path / "cache", TRUST)
    assert [p for p in (tmp_path / "cache").glob("*") if p.is_dir()] == []


def test_a_spoilt_cache_is_fetched_again(folder: Path, store: DirectoryStore, tmp_path: Path) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    fetched = bundle.fetch(store, model_id, tmp_path / "cache", TRUST)
    (fetched / bundle.LINEAR).write_bytes(b"spoilt")
    bundle.verify(bundle.fetch(store, model_id, tmp_path / "cache", TRUST))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [model_id]


def test_many_may_fetch_at_once(folder: Path, store: DirectoryStore, tmp_path: Path) -> None:
    model_id = bundle.publish(store, folder, TRUST)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda _: bundle.fetch(store, model_id, tmp_path / "cache", TRUST), range(6)))
    assert {p.name for p in got} == {model_id}
    bundle.verify(got[0])
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [model_id]


def test_a_model_that_is_not_there_is_not_found(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        bundle.fetch(store, "m-000000000000", tmp_path / "cache", TRUST)


@pytest.mark.parametrize("of", ["nobody", "a stranger's"])
def test_the_store_cannot_slip_in_a_model_that_nobody_trusted_signed(
    folder: Path, store: DirectoryStore, tmp_path: Path, of: str
) -> None:
    stranger, their_trust = keys("a stranger's")
    stranger.sign(folder)
    model_id = bundle.publish(store, folder, their_trust)
    if of == "nobody":
        store.delete(f"models/{model_id}/{SIGNATURE}")
    with pytest.raises(BundleError, match=r"signature|signed"):
        bundle.fetch(store, model_id, tmp_path / "cache", TRUST)
    assert [p for p in (tmp_path / "cache").glob("*") if p.is_dir()] == []
