"""Draw assets/photograph.png: a photograph, reduced by 3, and enlarged again in two ways.

python assets/draw_photograph.py   # needs scikit-image

Original, bicubic and SRCNN, each above a magnified crop. The photograph is scikit-image's
`astronaut`: Eileen Collins, by NASA, in the public domain.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw
from skimage import data

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import enlarge, load_srcnn

SCALE, CROP, ZOOM, MARGIN = 3, (132, 84, 212, 164), 4, 8


def main() -> None:
    original = Image.fromarray(data.astronaut()).crop((60, 0, 390, 330))  # sides divide by 3
    small = original.resize([side // SCALE for side in original.size], Image.Resampling.BICUBIC)
    bicubic = small.resize(original.size, Image.Resampling.BICUBIC)
    srcnn = enlarge(small, load_srcnn(ROOT / "weights" / f"srcnn_x{SCALE}.pth"), SCALE)
    side = ZOOM * (CROP[2] - CROP[0])
    width, height = max(original.width, side), original.height + side
    sheet = Image.new("RGB", (3 * width + 2 * MARGIN, 16 + height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(
        [("original", original), ("bicubic x3", bicubic), ("SRCNN x3", srcnn)]
    ):
        left = i * (width + MARGIN)
        draw.text((left, 2), name, fill="black")
        magnified = image.crop(CROP).resize((side, side), Image.Resampling.NEAREST)
        ImageDraw.Draw(image).rectangle(CROP, outline="yellow")
        sheet.paste(image, (left, 16))
        sheet.paste(magnified, (left, 16 + original.height + MARGIN))
    sheet.save(ROOT / "assets" / "photograph.png", optimize=True)


if __name__ == "__main__":
    main()
