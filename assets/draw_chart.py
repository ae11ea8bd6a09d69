"""Draw chart.png, a synthetic test image.

python assets/draw_chart.py
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, FACTOR = 192, 4  # drawn FACTOR times as large and downscaled to get soft edges


def draw_chart() -> Image.Image:
    """Return a chart with text, fans of fine lines, rings and bars, SIDE pixels per side."""
    big = SIDE * FACTOR
    image = Image.new("RGB", (big, big), (244, 241, 232))
    draw = ImageDraw.Draw(image)
    for i, size in enumerate((22, 15, 11)):
        font = ImageFont.load_default(size * FACTOR)
        place = (8 * FACTOR, (6 + 24 * i - 2 * i * i) * FACTOR)
        draw.text(place, "SRCNN 9-5-5", (32, 38, 60), font)
    centre = 150 * FACTOR, 66 * FACTOR
    for i in range(36):  # a fan, finer towards its middle
        angle = math.tau * i / 36
        end = [c + 36 * FACTOR * f(angle) for c, f in zip(centre, (math.cos, math.sin))]
        draw.line((*centre, *end), (150, 30, 40), FACTOR)
    centre = 46 * FACTOR, 138 * FACTOR
    for i in range(8):  # rings, wider apart outwards
        r = (4 + 4.6 * i) * FACTOR
        box = [c + sign * r for sign in (-1, 1) for c in centre]
        draw.ellipse(box, outline=(20, 90, 120), width=(1 + i // 3) * FACTOR)
    base = 176 * FACTOR
    curve = [(x, base - 44 * FACTOR - 22 * FACTOR * math.sin(x / 70)) for x in range(big)]
    right = [point for point in curve if point[0] > 96 * FACTOR]
    draw.line(right, (40, 120, 60), 2 * FACTOR, joint="curve")
    for i in range(10):  # bars, one to three pixels wide
        left = (100 + 8 * i) * FACTOR
        width = (1 + i // 4) * FACTOR
        draw.rectangle((left, base - 20 * FACTOR, left + width, base), (60, 50, 110))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


if __name__ == "__main__":
    draw_chart().save(Path(__file__).with_name("chart.png"), optimize=True)
