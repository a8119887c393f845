"""Who made a bundle: signed with an offline key, verified with its public half before every load.

Signatures are those of the OpenSSF model-signing specification, so that its own command verifies a bundle
too. They cover every file of the folder, the manifest included. Keys live outside the store: whoever can
write to the store cannot make a model that anybody loads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redqueen.errors import BundleError, InvalidInput

if TYPE_CHECKING:
    from redqueen.settings import Settings

SIGNATURE = "signature.json"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""Those that the specification allows."""


@dataclass(frozen=True)
class Signer:
    """The private half: a PEM file with an elliptic-curve key (P-256, P-384 or P-521)."""

    private_key: Path
    password: str | None = None

    def sign(self, folder: Path) -> None:
        """Sign what lies in `folder`; an older signature is replaced. The last step, after the manifest.

        Raises:
            InvalidInput: the key cannot be read, or is not an elliptic-curve key.
        """
        from model_signing import signing

        try:
            signer = signing.Config().use_elliptic_key_signer(
                private_key=self.private_key,
                password=self._password,  # type: ignore[arg-type]  # it is declared as str and used as bytes
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise self._unusable(type(error).__name__) from None
        signer.set_hashing_config(_hashing(folder))
        partial = folder / f".{SIGNATURE}"
        signer.sign(folder, partial)
        partial.replace(folder / SIGNATURE)

    def public_key(self) -> Any:
        """Its public half; raises `InvalidInput` as `sign` does."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            public = load_pem_private_key(self.private_key.read_bytes(), self._password).public_key()
        except (OSError, ValueError, TypeError) as error:
            raise self._unusable(type(error).__name__) from None
        if getattr(getattr(public, "curve", None), "name", None) not in CURVES:
            raise self._unusable("it is of another kind")
        return public

    @property
    def _password(self) -> bytes | None:
        return self.password.encode() if self.password else None

    def _unusable(self, why: str) -> InvalidInput:
        return InvalidInput(
            f"{self.private_key} is no usable signing key ({why}): set RQ_SIGNING_KEY to an elliptic-curve "
            "key (P-256, P-384 or P-521) in PEM, and RQ_SIGNING_KEY_PASSWORD if it has one"
        )


@dataclass(frozen=True)
class Trust:
    """The public half: whose bundles are loaded."""

    public_key: Path

    def check(self, folder: Path, contents: Mapping[str, bytes]) -> None:
        """Verify the folder's signature, and that it speaks of exactly these bytes by file name.

        Raises:
            BundleError: there is no signature, it is of another key, or of other files.
            OSError: there is nowhere to keep what is verified.
        """
        from model_signing import verifying

        try:
            signature = (folder / SIGNATURE).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise BundleError("it is not signed") from None
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=self.public_key)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(
                f"there is no key to verify it with: {self.public_key} ({type(error).__name__}). Set "
                "RQ_VERIFY_KEY to the public key of the one who signs"
            ) from None
        with _private(signature) as kept:
            try:
                verifier.set_hashing_config(_hashing(folder)).verify(folder, kept)
                signed = _signed(signature)
            except Exception as error:  # the library raises what its parsers and its cryptography raise
                raise BundleError(f"its signature does not hold ({_first_line(error)})") from None
        # The library hashed what lay on disk; what will be used is what was read.
        if signed != {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}:
            raise BundleError("its signature is of other files")


@contextlib.contextmanager
def _private(data: bytes) -> Iterator[Path]:
    """A file with this in it that nobody else can change; in memory where the system can, so that verifying
    needs no room on a disk.
    """
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create(SIGNATURE), "wb") as file:
            file.write(data)
            file.flush()
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    with tempfile.NamedTemporaryFile(prefix="redqueen-") as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


def _hashing(folder: Path) -> Any:
    from model_signing import hashing

    ignored = [folder / SIGNATURE, folder / f".{SIGNATURE}"]
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _signed(signature: bytes) -> dict[str, str]:
    """sha256 by file name, out of the statement that was signed."""
    envelope = json.loads(signature)["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# -- keys ----------------------------------------------------------------------------------------------------


def signer_of(settings: Settings) -> Signer:
    """The signer that the settings name; a home without one makes a key pair of its own, once.

    Raises:
        InvalidInput: the key cannot be used, or what it signs would be refused here.
    """
    private, public = _home_keys(settings)
    # The private one is made first, so looked for last: another process may be making both.
    shown, kept = public.exists(), private.exists()
    if settings.signing_key is None and not (shown and kept):
        if shown:
            raise InvalidInput(
                f"{private} is gone and {public} is not: put it back, or remove {public} as well to begin "
                "with new keys, by which the models there are will be refused"
            )
        make_keys(private, public)
    signer = _signer(settings)
    check_pair(signer, trust_of(settings))
    return signer


def _signer(settings: Settings) -> Signer:
    password = settings.signing_key_password
    secret = password.get_secret_value() if password is not None else None
    if settings.signing_key is not None:
        return Signer(settings.signing_key, secret)
    return Signer(_home_keys(settings)[0])


def check_pair(signer: Signer, trust: Trust) -> None:
    """Raises `InvalidInput` where what the one signs would not be trusted by the other."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = signer.public_key()
    try:
        same = load_pem_public_key(trust.public_key.read_bytes()) == public
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"{trust.public_key} is no public key ({type(error).__name__}): set RQ_VERIFY_KEY to that of "
            f"{signer.private_key}, here too, where models are signed"
        ) from None
    if not same:
        raise InvalidInput(
            f"{trust.public_key} is not the public half of {signer.private_key}: what is signed here would "
            "be refused. Set RQ_VERIFY_KEY to it (`openssl ec -in signing.pem -pubout`)"
        )


def keys_told(settings: Settings) -> tuple[bool | None, str]:
    """Whether models can be signed and loaded here, and a sentence: True, None (no keys yet) or False."""
    private, public = _home_keys(settings)
    trusted = trust_of(settings).public_key
    if settings.signing_key is None and not private.exists():
        if settings.verify_key is None and not public.exists():
            return None, "none yet; the first training makes a pair in `keys/` of the home"
        if not trusted.is_file():
            return False, f"{trusted} is not there: set RQ_VERIFY_KEY to the signer's public key"
        return True, f"models are loaded if {trusted} verifies their signature; none can be signed here"
    if settings.signing_key is None and settings.verify_key is None and not public.exists():
        how = f"`openssl ec -in {private} -pubout -out {public}` makes it again"
        return False, f"{public} is gone, so every model is refused: {how}, and so does the next training"
    try:
        check_pair(_signer(settings), trust_of(settings))
    except InvalidInput as error:
        return False, str(error)
    return True, f"models are signed here, and loaded if {trusted} verifies their signature"


def trust_of(settings: Settings) -> Trust:
    """Whose bundles this home loads: `RQ_VERIFY_KEY`, or the key pair of the home."""
    return Trust(settings.verify_key or _home_keys(settings)[1])


def _home_keys(settings: Settings) -> tuple[Path, Path]:
    folder = settings.home / "keys"
    return folder / "signing.pem", folder / "verify.pem"


def make_keys(private: Path, public: Path) -> None:
    """Write a new P-256 key pair; the private one is readable by its owner alone. Whoever is first wins."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        _link(private, secret)
    kept = serialization.load_pem_private_key(private.read_bytes(), password=None)
    shown = kept.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with contextlib.suppress(FileExistsError):
        _link(public, shown)


def _link(path: Path, data: bytes) -> None:
    """Create `path` whole, with mode 0600, or raise FileExistsError."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)
    finally:
        os.unlink(name)
