"""Make the photographs in assets/: astronaut.png, photograph.png and jpeg.png.

python assets/draw_photograph.py   # needs scikit-image

All show scikit-image's `astronaut`: Eileen Collins, by NASA, in the public domain. astronaut.png is
the default image of test.py. photograph.png: downscaled by 3, then upscaled by bicubic and SRCNN,
each above a magnified crop. jpeg.png: downscaled by 2, saved as JPEG of quality 40, then upscaled;
crops at 400 %.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import load_srcnn, upscale
from utils import luma, protocol_psnr

PART, ZOOM, MARGIN, LABEL = (88, 0, 358, 270), 4, 8, 24
CROP = (24, 136, 92, 204)  # of PART
JPEG_CROP, JPEG_QUALITY = (92, 96, 160, 164), 40


def weights(name: str) -> object:
    """Return a network in weights/."""
    return load_srcnn(ROOT / "weights" / f"{name}.pth")


def labelled(images: dict[str, Image.Image], scale: int) -> dict[str, Image.Image]:
    """Return the images with their luma PSNR against `original` in the label."""
    lumas = {n: luma(np.asarray(i, np.float32).transpose(2, 0, 1)) for n, i in images.items()}
    hr = lumas.pop("original")
    scores = {name: protocol_psnr(sr, hr, scale) for name, sr in lumas.items()}
    return {f"{n}, {scores[n]:.1f} dB" if n in scores else n: i for n, i in images.items()}


def draw(images: dict[str, Image.Image], crop: tuple, whole: bool, path: Path) -> None:
    """Save the crops side by side, magnified with square pixels, below the whole images."""
    side = ZOOM * (crop[2] - crop[0])
    top = LABEL + whole * (next(iter(images.values())).height + MARGIN)
    sheet = Image.new("RGB", (len(images) * (side + MARGIN) - MARGIN, top + side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for i, (label, image) in enumerate(images.items()):
        left = i * (side + MARGIN)
        pen.text((left + 2, 1), label, fill="black", font=font)
        sheet.paste(image.crop(crop).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if whole:
            framed = image.copy()
            ImageDraw.Draw(framed).rectangle(crop, outline="yellow")
            sheet.paste(framed, (left, LABEL))
    sheet.save(path, optimize=True)


def main() -> None:
    original = Image.fromarray(data.astronaut()).crop(PART)  # sides divide by 2 and 3
    original.save(ROOT / "assets" / "astronaut.png", optimize=True)
    third, half = (
        original.resize([side // s for side in original.size], Image.Resampling.BICUBIC)
        for s in (3, 2)
    )
    images = {
        "original": original,
        "bicubic": third.resize(original.size, Image.Resampling.BICUBIC),
        "SRCNN": upscale(third, weights("srcnn_x3"), 3),
    }
    draw(labelled(images, 3), CROP, True, ROOT / "assets" / "photograph.png")

    encoded = io.BytesIO()
    half.save(encoded, "JPEG", quality=JPEG_QUALITY)
    half = Image.open(encoded)
    images = {
        "original": original,
        "bicubic": half.resize(original.size, Image.Resampling.BICUBIC),
        "9-5-5": upscale(half, weights("srcnn_x2"), 2, 0),
        "photo": upscale(half, weights("srcnn_photo_x2"), 2),
    }
    draw(labelled(images, 2), JPEG_CROP, False, ROOT / "assets" / "jpeg.png")


if __name__ == "__main__":
    main()
