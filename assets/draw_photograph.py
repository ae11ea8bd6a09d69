"""Make assets/astronaut.png, the default image of test.py, and assets/photograph.png.

python assets/draw_photograph.py   # needs scikit-image

photograph.png shows a photograph, downscaled by 3, then upscaled by bicubic and SRCNN, each above a
magnified crop. The photograph is scikit-image's `astronaut`: Eileen Collins, by NASA, in the public
domain.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import load_srcnn, upscale
from utils import luma, protocol_psnr

SCALE, PART, CROP, ZOOM, MARGIN, LABEL = 3, (88, 0, 358, 270), (24, 136, 92, 204), 4, 8, 24


def image_luma(image: Image.Image) -> np.ndarray:
    """Return the luma that the protocol measures."""
    return luma(np.asarray(image, np.float32).transpose(2, 0, 1))


def main() -> None:
    original = Image.fromarray(data.astronaut()).crop(PART)  # sides divide by 3
    original.save(ROOT / "assets" / "astronaut.png", optimize=True)
    hr = image_luma(original)  # before a frame is drawn on it
    small = original.resize([side // SCALE for side in original.size], Image.Resampling.BICUBIC)
    bicubic = small.resize(original.size, Image.Resampling.BICUBIC)
    srcnn = upscale(small, load_srcnn(ROOT / "weights" / f"srcnn_x{SCALE}.pth"), SCALE)
    side = ZOOM * (CROP[2] - CROP[0])
    height = LABEL + original.height + MARGIN + side
    sheet = Image.new("RGB", (3 * side + 2 * MARGIN, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    images = {"original": original, "bicubic": bicubic, "SRCNN": srcnn}
    for i, (name, image) in enumerate(images.items()):
        left = i * (side + MARGIN)
        score = protocol_psnr(image_luma(image), hr, SCALE)
        label = name if image is original else f"{name}, {score:.1f} dB"
        draw.text((left + 2, 1), label, fill="black", font=font)
        magnified = image.crop(CROP).resize((side, side), Image.Resampling.NEAREST)
        ImageDraw.Draw(image).rectangle(CROP, outline="yellow")
        sheet.paste(image, (left, LABEL))
        sheet.paste(magnified, (left, height - side))
    sheet.save(ROOT / "assets" / "photograph.png", optimize=True)


if __name__ == "__main__":
    main()
