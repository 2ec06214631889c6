"""Records what OpenCV makes of raw images, for test_images.py: python test/ros/record_opencv.py

It needs opencv-python-headless, which no test needs. test/data/opencv.npz was recorded with 5.0.0.
The colour codes are those that cv_bridge uses for these encodings; it has none for nv12 and nv21.
"""

from pathlib import Path

import cv2
import numpy as np

CODES = {
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
    "nv12": cv2.COLOR_YUV2RGB_NV12,
    "nv21": cv2.COLOR_YUV2RGB_NV21,
    "bayer_rggb": cv2.COLOR_BayerRGGB2RGB,
    "bayer_bggr": cv2.COLOR_BayerBGGR2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGBRG2RGB,
    "bayer_grbg": cv2.COLOR_BayerGRBG2RGB,
}
HEIGHT, WIDTH = 12, 18


def main() -> None:
    random = np.random.default_rng(0)
    shapes = {"uyvy": (HEIGHT, WIDTH, 2), "yuyv": (HEIGHT, WIDTH, 2)}
    shapes |= dict.fromkeys(("nv12", "nv21"), (HEIGHT * 3 // 2, WIDTH))
    found = {}
    for name, code in CODES.items():
        raw = random.integers(0, 256, shapes.get(name, (HEIGHT, WIDTH)), dtype=np.uint8)
        if not name.startswith("bayer"):
            found[f"{name} raw"], found[f"{name} rgb"] = raw, cv2.cvtColor(raw, code)
            continue
        found[f"{name}8 raw"], found[f"{name}8 rgb"] = raw, cv2.cvtColor(raw, code)
        raw = random.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
        rgb = cv2.cvtColor(raw, code)
        found[f"{name}16 raw"] = raw
        found[f"{name}16 rgb"] = cv2.convertScaleAbs(rgb, alpha=255 / 65535)  # as cv_bridge
    np.savez_compressed(Path(__file__).parents[1] / "data" / "opencv.npz", **found)


if __name__ == "__main__":
    main()
