"""Build the embedded picture set `vlmkernels/data/emoji3` from four npm packages.

    python tools/build_emoji3.py [--packages FOLDER] [--check]

Names, tags and groups come from emojibase-data; the three drawing styles from emoji-datasource-google (Noto),
emoji-datasource-twitter (Twemoji) and @lobehub/fluent-emoji-3d (Fluent 3D). A concept is a base emoji (skin
tone variants are not entries of their own) that every style draws; the styles are joined by hex code without
the variation selector fe0f. Every entry that is left out is listed, with the reason, under "excluded" in
concepts.json.gz.

The packages are fetched with `npm pack` into a temporary folder, or taken from `--packages`. The same
packages and the same libwebp give the same bytes. `--check` builds into memory and compares with the
committed files: the text byte for byte, the sheets byte for byte or, under another libwebp, by their pixels.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PACKAGES = {
    "emojibase": ("emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz"),
    "noto": ("emoji-datasource-google", "16.0.0", "emoji-datasource-google-16.0.0.tgz"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "emoji-datasource-twitter-16.0.0.tgz"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"),
}
PICTURES = {
    "noto": "package/img/google/64/",
    "twemoji": "package/img/twitter/64/",
    "fluent": "package/assets/",
}
STYLES = tuple(PICTURES)
TILE = 48  # a multiple of WebP's 16-pixel macroblock: neighbouring pictures share no block
COLUMNS = 43
COMPONENT_GROUP = 2  # skin tones and hair: parts of other emoji, not pictures of something
OUTPUT = Path(__file__).resolve().parent.parent / "vlmkernels" / "data" / "emoji3"


def joined_code(hexcode: str) -> str:
    """Lower-case hex code without variation selectors, the key on which the packages are joined."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def fetch(folder: Path) -> None:
    """Put the four tarballs into `folder` with `npm pack`; those already there are kept."""
    for name, version, tarball in PACKAGES.values():
        if not (folder / tarball).exists():
            subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}"],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )


def read_pictures(tarball: Path, prefix: str, wanted: set[str]) -> dict[str, bytes]:
    """Picture files of one style by joined code; where a code occurs twice the name with fe0f wins."""
    found: dict[str, tuple[str, bytes]] = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(prefix):
                continue
            name = member.name[len(prefix) :].rsplit(".", 1)[0].lower()
            code = joined_code(name)
            if code not in wanted or (code in found and len(found[code][0]) >= len(name)):
                continue
            stream = tar.extractfile(member)
            if stream is None:
                raise ValueError(f"{tarball.name}: {member.name} has no content")
            found[code] = (name, stream.read())
    return {code: content for code, (_, content) in found.items()}


def on_white(content: bytes) -> Image.Image:
    """Decode, keep the aspect ratio, centre on a white TILE x TILE square (Lanczos)."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    ratio = TILE / max(picture.size)
    size = tuple(max(1, round(side * ratio)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    tile = Image.new("RGBA", (TILE, TILE), "white")
    tile.alpha_composite(picture, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile.convert("RGB")


def encode_sheet(pictures: list[bytes]) -> bytes:
    """One WebP sheet, quality 90, COLUMNS pictures a row in the order of the concepts."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
    for i, content in enumerate(pictures):
        sheet.paste(on_white(content), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def build(packages: Path) -> dict[str, bytes]:
    """All output files by name."""
    with tarfile.open(packages / PACKAGES["emojibase"][2]) as tar:

        def load(name: str):
            stream = tar.extractfile(name)
            if stream is None:
                raise ValueError(f"{name} is not a file of the emojibase package")
            return json.load(stream)

        entries = load("package/en/data.json")
        groups = load("package/meta/groups.json")

    wanted = {joined_code(entry["hexcode"]) for entry in entries}
    pictures = {s: read_pictures(packages / PACKAGES[s][2], PICTURES[s], wanted) for s in STYLES}
    group_ids = [int(g) for g in groups["groups"] if int(g) != COMPONENT_GROUP]
    concepts, excluded = [], []
    for entry in sorted(entries, key=lambda e: (e.get("order", -1), e["hexcode"])):
        code = joined_code(entry["hexcode"])
        missing = [style for style in STYLES if code not in pictures[style]]
        reason = f"no picture in {', '.join(missing)}" if missing else ""
        if not reason and entry.get("group") not in group_ids:
            reason = "component of other emoji" if entry.get("group") == COMPONENT_GROUP else "no group"
        if reason:
            excluded.append({"hex": entry["hexcode"], "label": entry["label"], "reason": reason})
            continue
        concepts.append(
            {
                "hex": entry["hexcode"],
                "label": entry["label"],
                "tags": entry.get("tags", []),
                "group": group_ids.index(entry["group"]),
                "subgroup": groups["subgroups"][str(entry["subgroup"])],
            }
        )
    codes = [joined_code(concept["hex"]) for concept in concepts]
    if len(set(codes)) != len(codes):
        raise ValueError("two concepts share a hex code")

    document = {
        "tile": TILE,
        "columns": COLUMNS,
        "styles": list(STYLES),
        "packages": {style: f"{name}@{version}" for style, (name, version, _) in PACKAGES.items()},
        "group_names": [groups["groups"][str(g)] for g in group_ids],
        "concepts": concepts,
        "excluded": excluded,
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    files = {"concepts.json.gz": gzip.compress(text.encode(), compresslevel=9, mtime=0)}
    for style in STYLES:
        files[f"{style}.webp"] = encode_sheet([pictures[style][code] for code in codes])
    return files


def differs(name: str, built: bytes, committed: bytes) -> bool:
    """True if a committed file is not what was built (content of the text, pixels of a sheet)."""
    if built == committed:
        return False
    if name.endswith(".gz"):
        return gzip.decompress(built) != gzip.decompress(committed)
    return Image.open(io.BytesIO(built)).tobytes() != Image.open(io.BytesIO(committed)).tobytes()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder with the four npm tarballs (fetched if absent)")
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files, write nothing"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        fetch(packages)
        files = build(packages)
    document = json.loads(gzip.decompress(files["concepts.json.gz"]))
    sys.stdout.write(f"{len(document['concepts'])} concepts, {len(document['excluded'])} entries left out\n")
    if options.check:
        wrong = [
            name for name, content in files.items() if differs(name, content, (OUTPUT / name).read_bytes())
        ]
        sys.stdout.write(
            f"differs: {', '.join(wrong)}\n" if wrong else "the committed files are up to date\n"
        )
        return 1 if wrong else 0
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary_path = OUTPUT / f".{name}.part"
        temporary_path.write_bytes(content)
        os.replace(temporary_path, OUTPUT / name)
        sys.stdout.write(f"{name}: {len(content):,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
