"""Makes small parquet folders in the exact layout of the HuggingFace hub."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(pixels, kind="PNG", **options):
    """An image file's bytes from an array ``(H, W)``, ``(H, W, D)`` or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colour(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def grey(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)


def write(path, images, labels, *, image_name="img", names=None, metadata=True, raw=False, row_group_size=None):
    """One shard. ``images``: bytes or None each; ``labels``: dict of columns; ``names``: class names per column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = (
        pa.array(images, pa.binary())
        if raw
        else pa.array(
            [{"bytes": content, "path": None} for content in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    )
    types = {name: values.type if isinstance(values, pa.Array) else pa.int64() for name, values in labels.items()}
    table = pa.table(
        {image_name: column, **{name: pa.array(list(values), types[name]) for name, values in labels.items()}}
    )
    if metadata:
        features = {image_name: {"_type": "Image"}}
        for name in labels:
            known = (names or {}).get(name)
            features[name] = {"names": known, "_type": "ClassLabel"} if known else {"dtype": "int64", "_type": "Value"}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_set(root, images, labels, *, names=("x", "y", "z"), test="test", **options):
    """Two training shards and a test shard of the same images; labels are a list."""
    content = [encode(pixels) for pixels in images]
    named = {"label": list(names)} if names else None
    half = len(content) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        path = root / f"train-0000{number}-of-00002.parquet"
        write(path, content[part], {"label": labels[part]}, names=named, **options)
    write(root / f"{test}-00000-of-00001.parquet", content, {"label": labels}, names=named, **options)
