"""One signing key for all tests: what is signed with it is trusted, what is not is not."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from models.signing import Signer, Trust, make_keys


@functools.cache
def keys(name: str = "ours") -> tuple[Signer, Trust]:
    """A key pair made once a process, by name."""
    folder = Path(tempfile.mkdtemp(prefix=f"redqueen-keys-{name}-"))
    make_keys(folder / "signing.pem", folder / "verify.pem")
    return Signer(folder / "signing.pem"), Trust(folder / "verify.pem")
