"""Install the programs that read a LoRA, as far as a CPU can import them: `python tests/readers/install.py FOLDER`.

Their wheels want CUDA and gigabytes beside them, so each is unpacked alone, without its compiled kernels, and what its
loader imports of other packages goes into FOLDER/site. What cannot be had is told, and its tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# Folder -> what is downloaded, and whether it is of use without its compiled files.
PACKAGES = {
    "vllm": ("vllm==0.33.0", True),
    "sglang": ("sglang==0.5.23", True),
    "llama_cpp": ("llama-cpp-py-sync==0.11739", False),
    # Its source has llama.cpp's own scripts of conversion, which no wheel has.
    "llama_cpp_source": ("llama-cpp-python==0.3.36", True),
}
# What the loaders import; without dependencies, which would bring another torch.
SITE = (
    "aiohappyeyeballs aiohttp aiosignal apache-tvm-ffi astor blake3 cachetools cbor2 cffi compressed-tensors==0.17.0 "
    "depyf==0.20.0 distro einops fastapi==0.136.3 frozenlist ijson ipython jiter lark llguidance loguru msgspec "
    "multidict openai openai-harmony orjson partial-json-parser prometheus-client prometheus-fastapi-instrumentator "
    "propcache py-cpuinfo pybase64 pycparser python-json-logger python-multipart pyzmq sentencepiece setproctitle "
    "sniffio starlette tiktoken torchvision traitlets triton uvloop watchfiles xgrammar yarl"
).split()


def pip(*arguments: str) -> bool:
    """Whether it worked; pip says why not."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet"]).returncode == 0


def unpack(archive: Path, out: Path, without_compiled: bool) -> None:
    """A wheel as it is, but for compiled files where they are not wanted; of a source the scripts of llama.cpp."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if not (without_compiled and name.endswith(".so"))]
            wheel.extractall(out, names)
        return
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and name.endswith(".py"):
                member.name = name
                source.extract(member, out, filter="data")


def main(folder: Path) -> None:
    for name, (package, without_compiled) in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        place = folder / "downloads" / name
        source = ["--no-binary", ":all:"] if name.endswith("_source") else ["--only-binary", ":all:"]
        if not pip("download", "--dest", str(place), *source, package):
            print(f"{package} cannot be had here; the tests of {name} are skipped")
            continue
        (archive,) = place.iterdir()
        unpack(archive, folder / name, without_compiled)
    if not (folder / "site").is_dir() and not pip("install", "--target", str(folder / "site"), *SITE):
        print("what the loaders import cannot be had here; their tests are skipped")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
