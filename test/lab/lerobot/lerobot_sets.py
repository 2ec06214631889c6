"""Small LeRobotDataset folders for the tests, of both formats, whose frames show their own numbers."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STATIC, GRIPPER = "observation.images.scene", "observation.images.wrist"
FPS = 30
SIZE = 64
BITS = 8
ENCODERS = {
    "h264": ("libx264", {"bf": "3", "g": "24", "preset": "ultrafast", "x264-params": "b-adapt=0"}),
    "av1": ("libsvtav1", {"preset": "13", "g": "24"}),
}


@dataclass
class DatasetPlan:
    """What a dataset shall hold. lengths: of the episodes. codec: a key of ENCODERS, or "image".

    state(i): row i's numbers of observation.state. lost: frames (by number in the dataset) that the videos
    lack. lost_rows: rows that the parquet files lack. tasks: of each episode; None: without.
    """

    version: str = "v2.1"
    lengths: tuple[int, ...] = (30, 24)
    codec: str = "h264"
    state: object = None
    names: object = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    lost: tuple[int, ...] = ()
    lost_rows: tuple[int, ...] = ()
    tasks: tuple[str | None, ...] = ("lift the block", "open the drawer")
    cameras: tuple[str, ...] = (STATIC, GRIPPER)


def pose(i: int) -> list[float]:
    """x y z [m] and roll pitch yaw [rad] of row i: a slow screw motion."""
    return [0.4 + 0.002 * i, 0.1, 0.3 - 0.001 * i, 3.1 + 0.004 * i, 0.01 * np.sin(i), 0.005 * i]


def gripper(i: int) -> float:
    """The command of row i: 0 is open, 1 is closed. It changes every five rows."""
    return float(i // 5 % 2)


def picture(number: int) -> np.ndarray:
    """(64, 64, 3) uint8: the bits of the number as bright and dark columns."""
    bits = [(number >> k) & 1 for k in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 200 + 20, SIZE // BITS)
    return np.broadcast_to(row[None, :, None], (SIZE, SIZE, 3)).copy()


def number_in(image: np.ndarray) -> int:
    """The number that a frame shows."""
    columns = image.mean((0, 2)).reshape(BITS, -1).mean(1)
    return sum(1 << k for k, value in enumerate(columns) if value > 120)


def make(folder: Path, plan: DatasetPlan) -> Path:
    """Writes the dataset, and returns its folder."""
    meta, firsts = folder / "meta", np.concatenate([[0], np.cumsum(plan.lengths)])
    meta.mkdir(parents=True)
    state = plan.state or (lambda i: [*pose(i), gripper(i)])
    is_v3 = plan.version == "v3.0"
    texts = list(dict.fromkeys(text for text in plan.tasks if text))
    spans = [range(firsts[k], firsts[k + 1]) for k in range(len(plan.lengths))]
    tables = [_table(plan, k, rows, firsts[k], state, texts) for k, rows in enumerate(spans)]
    if is_v3:
        _write(folder / "data/chunk-000/file-000.parquet", pa.concat_tables(tables))
    else:
        for k, table in enumerate(tables):
            _write(folder / f"data/chunk-000/episode_{k:06d}.parquet", table)
    for key in (STATIC, GRIPPER) if plan.codec != "image" else ():
        for k, rows in enumerate([range(firsts[-1])] if is_v3 else spans):
            place = f"{key}/chunk-000/file-000" if is_v3 else f"chunk-000/{key}/episode_{k:06d}"
            _encode(folder / f"videos/{place}.mp4", rows, plan)
    number = {"dtype": "float32", "shape": [len(state(0))], "names": plan.names}
    camera = {"dtype": "image" if plan.codec == "image" else "video", "shape": [SIZE, SIZE, 3], "names": None}
    info = {
        "codebase_version": plan.version,
        "total_episodes": len(spans),
        "chunks_size": 1000,
        "fps": FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if is_v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if is_v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            **dict.fromkeys(plan.cameras, camera),
            "observation.state": number,
            "action": {"dtype": "float32", "shape": [7], "names": None},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        },
    }
    (meta / "info.json").write_text(json.dumps(info))
    _write_meta(meta, plan, spans, firsts, texts)
    return folder


def _write_meta(meta: Path, plan: DatasetPlan, spans, firsts, texts) -> None:
    episodes = [
        {"episode_index": k, "tasks": [plan.tasks[k] or ""], "length": len(rows)}
        for k, rows in enumerate(spans)
    ]
    tasks = [{"task_index": k, "task": text} for k, text in enumerate(texts)]
    if plan.version != "v3.0":
        for name, lines in (("episodes", episodes), ("tasks", tasks)):
            (meta / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    for k, episode in enumerate(episodes):
        episode |= {"data/chunk_index": 0, "data/file_index": 0}
        for key in (STATIC, GRIPPER):
            episode |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            episode |= {f"videos/{key}/from_timestamp": firsts[k] / FPS, f"videos/{key}/to_timestamp": 0.0}
    _write(meta / "episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(episodes))
    table = {
        "task_index": pa.array(range(len(texts)), pa.int64()),
        "__index_level_0__": pa.array(texts, pa.string()),
    }
    _write(meta / "tasks.parquet", pa.table(table))


def _table(plan: DatasetPlan, episode: int, rows: range, first: int, state, texts) -> pa.Table:
    rows = [i for i in rows if i not in plan.lost_rows]
    text = plan.tasks[episode]
    columns = {
        "observation.state": pa.array([state(i) for i in rows], pa.list_(pa.float32())),
        "action": pa.array([[0.0] * 6 + [gripper(i)] for i in rows], pa.list_(pa.float32())),
        "timestamp": pa.array([(i - first) / FPS for i in rows], pa.float32()),
        "episode_index": pa.array([episode] * len(rows), pa.int64()),
        "task_index": pa.array([texts.index(text) if text else None] * len(rows), pa.int64()),
    }
    if plan.codec == "image":
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        cells = [{"bytes": _png(picture(i)), "path": None} for i in rows]
        columns |= {key: pa.array(cells, image) for key in (STATIC, GRIPPER)}
    return pa.table(columns)


def _encode(path: Path, rows: range, plan: DatasetPlan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder, options = ENCODERS[plan.codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for i in rows:
            if i not in plan.lost:
                frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
                frame.pts, frame.time_base = i - rows[0], Fraction(1, FPS)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
