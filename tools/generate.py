"""Generates gen/ from protos/; run by `make gen` and so by every set-up.

Nothing generated is committed, so the generated code always fits the installed grpcio-tools. The two google/api protos
that the HTTP annotations need are copied beside ours from the installed googleapis-common-protos (an ignored folder):
buf's `breaking` refuses a path outside the tree and stumbles over a symbolic link. gen/ is replaced as a whole, so a
proto that was removed leaves nothing behind.
"""

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import google.api
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GOOGLE_API = ("annotations.proto", "http.proto")


def main() -> int:
    """Writes gen/; returns protoc's exit status."""
    source = Path(next(iter(google.api.__path__)))
    target = PROTOS / "google" / "api"
    target.mkdir(parents=True, exist_ok=True)
    for name in GOOGLE_API:
        shutil.copyfile(source / name, target / name)

    well_known = Path(next(iter(grpc_tools.__path__))) / "_proto"
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "openmanager").rglob("*.proto"))
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gen-") as scratch:
        plugins = [f"--python_out={scratch}", f"--grpc_python_out={scratch}"]
        # The comments, which generated code does not carry: /openapi.json and /docs are made from them.
        plugins += [f"--descriptor_set_out={scratch}/descriptors.binpb", "--include_source_info"]
        if find_spec("mypy_protobuf") is not None:  # only where the development tools are installed
            scripts = Path(sys.executable).parent
            plugins += [
                f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
                f"--mypy_out=quiet:{scratch}",
                f"--mypy_grpc_out=quiet:{scratch}",
            ]
        status = int(protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *plugins, *files]))
        if status == 0:
            gen = ROOT / "gen"
            shutil.rmtree(gen, ignore_errors=True)
            gen.mkdir()
            shutil.move(f"{scratch}/openmanager", gen / "openmanager")
            shutil.move(f"{scratch}/descriptors.binpb", gen / "openmanager" / "descriptors.binpb")
    return status


if __name__ == "__main__":
    sys.exit(main())
