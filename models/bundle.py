"""A model as a directory that proves itself: write, verify, publish, fetch.

A bundle is a flat folder of files and `manifest.json`, which holds the digest of every file and of itself.
Nothing is read from a bundle before all of it is verified, and what is then used are the very bytes that were
verified. Belongs here: the folder and its way through the store. What the files mean is `models.detector`'s
business; who made them is proven in `models.signing`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from models.signing import SIGNATURE, Trust
from redqueen.errors import BundleError, Conflict, NotFound
from redqueen.store import ObjectStore

MANIFEST = "manifest.json"
FORMAT = 2

ENCODER, NETWORK, ONNX, READER = "encoder.safetensors", "encoder.json", "encoder.onnx", "reader.json"
LINEAR, MARKOV = "linear.safetensors", "markov.safetensors"
TREES, FUSION = "trees.ubj", "fusion.json"
METRICS, CARD = "metrics.json", "model_card.md"

ONNX_INT8, CASCADE = "encoder.int8.onnx", "cascade.json"
"""What serving may use to answer sooner; there only if it passed its gate."""

IDENTITY = (ENCODER, NETWORK, ONNX, READER, LINEAR, MARKOV, TREES, FUSION, ONNX_INT8, CASCADE)
"""The files that decide what a model answers; `model_id` hashes them, and not metrics, prose or times."""

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,100}")

REQUIRED = (LINEAR, FUSION, METRICS, CARD)

ENCODER_FILES = (ENCODER, NETWORK, ONNX, READER)
"""All of them, or none: a model may do without an encoder."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle is and what it was made from.

    Attributes:
        model_id: "m-" and 12 hex digits, the hash of what the model answers with.
        selected: "fusion" or "linear", the one that is served.
        feature_names: the order of the feature matrix; empty where there is no behaviour.
        snapshot: digest of the training set.
        code_version: of the training code.
        parent: model_id of the champion at the time, or None.
        created_at: ISO 8601, UTC.
        files: sha256 by file name, the manifest itself excepted.
    """

    model_id: str
    policies: tuple[str, ...]
    features_version: str
    feature_names: tuple[str, ...]
    behaviour: bool
    selected: str
    snapshot: str
    code_version: str
    parent: str | None
    created_at: str
    files: Mapping[str, str]
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """The manifest's only valid serialisation, its own digest included."""
        body = asdict(self)
        sealed = body | {"manifest_sha256": _sha256(json.dumps(body, sort_keys=True).encode())}
        return json.dumps(sealed, sort_keys=True, indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """The inverse of `to_bytes`; raises `BundleError` for anything that `to_bytes` would not have
        written.
        """
        try:
            body = json.loads(data)
            names = {f.name for f in fields(Manifest)}
            values: dict[str, Any] = {k: v for k, v in body.items() if k in names}
            for name in ("policies", "feature_names"):
                values[name] = tuple(values[name])
            manifest = Manifest(**values)
            manifest._check_types()
            same = manifest.to_bytes() == data
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not a bundle's manifest: {error}") from None
        if not same:
            raise BundleError(f"{MANIFEST} was changed after it was written: its own digest does not hold")
        if manifest.format != FORMAT:
            raise BundleError(
                f"{MANIFEST} has format {manifest.format}; this version reads {FORMAT}: train a new model"
            )
        return manifest

    def _check_types(self) -> None:
        plain = ("model_id", "features_version", "selected", "snapshot", "code_version", "created_at")
        for name in plain:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is no text")
        if not isinstance(self.files, dict) or not all(isinstance(v, str) for v in self.files.values()):
            raise TypeError("files is no table of digests")
        if not all(isinstance(name, str) for name in (*self.policies, *self.feature_names)):
            raise TypeError("policies and feature_names are no names")
        if self.parent is not None and (not isinstance(self.parent, str) or not _is_plain(self.parent)):
            raise TypeError("parent is no model id")
        if datetime.fromisoformat(self.created_at).tzinfo is None:
            raise ValueError("created_at has no time zone")


def _is_plain(name: str) -> bool:
    """Whether it names a file in a folder, and nothing outside."""
    return _PLAIN.fullmatch(name) is not None and name not in (".", "..")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def identify(
    files: Mapping[str, str],
    policies: tuple[str, ...],
    features_version: str,
    feature_names: tuple[str, ...],
    selected: str,
) -> str:
    """The `model_id` of files with these digests, answering for these policies from these features."""
    parts = [
        {k: v for k, v in files.items() if k in IDENTITY},
        policies,
        features_version,
        feature_names,
        selected,
    ]
    return "m-" + _sha256(json.dumps(parts, sort_keys=True).encode())[:12]


def write_manifest(
    folder: Path,
    *,
    policies: tuple[str, ...],
    features_version: str,
    feature_names: tuple[str, ...],
    selected: str,
    snapshot: str,
    code_version: str,
    parent: str | None,
    created_at: str,
) -> Manifest:
    """Seal the folder: hash what lies in it and write `manifest.json`. The last step of making a bundle."""
    apart = (MANIFEST, SIGNATURE)
    files = {p.name: _sha256(p.read_bytes()) for p in sorted(folder.iterdir()) if p.name not in apart}
    manifest = Manifest(
        model_id=identify(files, policies, features_version, feature_names, selected),
        policies=policies,
        features_version=features_version,
        feature_names=feature_names,
        behaviour=TREES in files,
        selected=selected,
        snapshot=snapshot,
        code_version=code_version,
        parent=parent,
        created_at=created_at,
        files=files,
    )
    partial = folder / f".{MANIFEST}"
    partial.write_bytes(manifest.to_bytes())
    partial.replace(folder / MANIFEST)
    return manifest


# -- verifying -----------------------------------------------------------------------------------------------


def verify(folder: Path, trust: Trust | None = None) -> Manifest:
    """Check every byte of a bundle.

    Raises:
        BundleError: a file is missing, is extra, was changed, is a link, or lies outside the folder; the id
            is not that of the content; or, where `trust` is given, it is not signed by the key that is
            trusted. The message names the file. Nothing of the bundle may be used then.
    """
    return read(folder, trust)[0]


def read(folder: Path, trust: Trust | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the verified bytes of every file; raises as `verify`."""
    try:
        return _read(Path(folder), trust)
    except BundleError as error:
        raise BundleError(f"bundle {folder} is refused: {error}. Fetch or train it again.") from None
    except OSError as error:
        raise BundleError(f"bundle {folder} cannot be read: {error}. Fetch or train it again.") from None


def _read(folder: Path, trust: Trust | None) -> tuple[Manifest, dict[str, bytes]]:
    if folder.is_symlink() or not folder.is_dir():
        raise BundleError("it is not a directory" if not folder.is_symlink() else "it is a symbolic link")
    found = {}
    for entry in os.scandir(folder):
        if entry.is_symlink():
            raise BundleError(f"'{entry.name}' is a symbolic link")
        if not entry.is_file():
            raise BundleError(f"'{entry.name}' is not a plain file")
        found[entry.name] = Path(entry.path)
    if MANIFEST not in found:
        raise BundleError(f"'{MANIFEST}' is missing")
    sealed = found.pop(MANIFEST).read_bytes()
    found.pop(SIGNATURE, None)
    manifest = Manifest.from_bytes(sealed)
    check_names(manifest)
    if missing := sorted(manifest.files.keys() - found.keys()):
        raise BundleError(f"'{missing[0]}' is missing")
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise BundleError(f"'{extra[0]}' is not in the manifest")
    contents = {name: path.read_bytes() for name, path in found.items()}
    for name, data in contents.items():
        if _sha256(data) != manifest.files[name]:
            raise BundleError(f"'{name}' was changed: its sha256 is not the manifest's")
    if trust is not None:
        trust.check(folder, contents | {MANIFEST: sealed})
    return manifest, contents


def check_names(manifest: Manifest) -> None:
    """Every name is a plain file name, what a bundle needs is listed, no feature twice, and the id is the
    content's.
    """
    for name in manifest.files:
        if not _is_plain(name):
            raise BundleError(f"'{name}' would leave the folder")
    needed = {*REQUIRED, *(ENCODER_FILES if set(ENCODER_FILES) & manifest.files.keys() else ())}
    if missing := sorted(needed - manifest.files.keys()):
        raise BundleError(f"'{missing[0]}' is not in the manifest")
    names = manifest.feature_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BundleError(f"it lists feature '{twice[0]}' twice")
    expected = identify(
        manifest.files,
        manifest.policies,
        manifest.features_version,
        manifest.feature_names,
        manifest.selected,
    )
    if manifest.model_id != expected:
        raise BundleError(f"it calls itself {manifest.model_id}, but its content is {expected}")


# -- the store -----------------------------------------------------------------------------------------------


def prefix(model_id: str) -> str:
    """Where a model lies in the store."""
    return f"models/{model_id}/"


def publish(store: ObjectStore, folder: Path, trust: Trust) -> str:
    """Verify a signed bundle and put it into the store; returns its `model_id`.

    The manifest goes last: a model without one is not there. A model that is there already stays as it is,
    since the same id answers the same; one that was damaged, or is of a key that is no longer trusted, is
    replaced.
    """
    manifest, contents = read(folder, trust)
    at = prefix(manifest.model_id)
    if store.exists(at + MANIFEST):
        if not problem(store, manifest.model_id, trust):
            return manifest.model_id
        store.delete(at + MANIFEST)
    contents[SIGNATURE] = (folder / SIGNATURE).read_bytes()
    for name, data in sorted(contents.items()):
        try:
            store.put_if_absent(at + name, data)
        except Conflict:
            # Left by an upload that died, or damaged: without a manifest nobody relies on it.
            if store.get(at + name).data != data:
                store.put(at + name, data)
    with contextlib.suppress(Conflict):
        store.put_if_absent(at + MANIFEST, manifest.to_bytes())
    if why := problem(store, manifest.model_id, trust):
        raise BundleError(f"another upload of the same model came in between; publish again: {why}")
    return manifest.model_id


def load_manifest(store: ObjectStore, model_id: str) -> Manifest:
    """A published model's manifest; raises `NotFound` or `BundleError`."""
    try:
        sealed = store.get(prefix(model_id) + MANIFEST).data
    except NotFound as error:
        raise NotFound(
            error.key, "`redqueen models list` shows what is there, `redqueen doctor` what is missed"
        ) from None
    try:
        manifest = Manifest.from_bytes(sealed)
        check_names(manifest)
        if manifest.model_id != model_id:
            raise BundleError(f"it holds {manifest.model_id}: it was moved or overwritten")
    except BundleError as error:
        raise _refused(model_id, error) from None
    return manifest


def _refused(model_id: str, why: object) -> BundleError:
    return BundleError(
        f"{prefix(model_id)} in the store is refused: {why}. `redqueen models repair {model_id}` publishes a "
        "whole copy again; `redqueen doctor` says whether the one before it is whole"
    )


def problem(store: ObjectStore, model_id: str, trust: Trust) -> str:
    """Why the store's copy of a model cannot be loaded, whatever a cache still holds; empty if it can."""
    with tempfile.TemporaryDirectory(prefix="rq-bundle-") as cache:
        try:
            fetch(store, model_id, Path(cache), trust)
        except NotFound:
            return f"there is no model {model_id} in the store; `redqueen models repair {model_id}`"
        except BundleError as error:
            return str(error)
    return ""


def fetch(store: ObjectStore, model_id: str, cache: Path, trust: Trust) -> Path:
    """The bundle as a verified local directory `cache/<model_id>`; one that is there and whole is kept.

    Raises:
        NotFound: there is no such model.
        BundleError: what the store holds does not verify, or is not signed by the key that is trusted.
    """
    target = Path(cache) / model_id
    with contextlib.suppress(BundleError):
        if verify(target, trust).model_id == model_id:
            return target
    manifest = load_manifest(store, model_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{model_id}-", dir=target.parent))
    try:
        for name in manifest.files:
            (scratch / name).write_bytes(_part(store, model_id, name))
        (scratch / MANIFEST).write_bytes(manifest.to_bytes())
        with contextlib.suppress(BundleError):  # that it is missing is for `verify` to say
            (scratch / SIGNATURE).write_bytes(_part(store, model_id, SIGNATURE))
        try:
            _read(scratch, trust)
        except BundleError as error:
            raise _refused(model_id, error) from None
        _settle(scratch, target, trust)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _part(store: ObjectStore, model_id: str, name: str) -> bytes:
    try:
        return store.get(prefix(model_id) + name).data
    except NotFound:
        raise _refused(model_id, f"'{name}' is missing") from None


def _settle(scratch: Path, target: Path, trust: Trust) -> None:
    """Rename into place; whoever came first wins, unless what lies there is broken."""
    for _ in range(2):
        try:
            os.rename(scratch, target)
            return
        except OSError:
            try:
                verify(target, trust)
                return
            except BundleError:
                with contextlib.suppress(OSError):
                    broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=target.parent))
                    os.rename(target, broken / target.name)
                    shutil.rmtree(broken, ignore_errors=True)
    verify(target, trust)


def summary(manifest: Manifest) -> dict[str, Any]:
    """What a person wants to see of a manifest, without the digests."""
    shown = asdict(manifest)
    shown["files"] = sorted(manifest.files)
    return shown
