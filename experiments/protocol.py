"""Why numbers differ: PSNR on Set5 x3 with one deviation from the paper's protocol per row.

python experiments/paper.py protocol

Every number is computed, for bicubic and for weights/srcnn_x3.pth, the network alone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import load_srcnn, restore
from utils import crop_to_multiple, find_images, psnr, quantize, read_levels, resize, rgb_to_ycbcr
from utils import shave, ycbcr_to_rgb

SCALE = 3


def studio_luma(rgb: np.ndarray, red: float = 65.481) -> np.ndarray:
    """Return BT.601's studio-swing luma of 3 x H x W, not rounded."""
    return 16 + np.tensordot(np.array([red, 128.553, 24.966]) / 255, rgb, axes=1)


def full_range_luma(rgb: np.ndarray) -> np.ndarray:
    """Return JPEG's luma, 0..255, as Pillow's convert("YCbCr") does."""
    return np.tensordot(np.array([0.299, 0.587, 0.114]), rgb, axes=1)


def matlab_bicubic(hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return LR and ILR by the protocol's bicubic."""
    lr = resize(hr, tuple(side // SCALE for side in hr.shape[-2:]))
    return lr, resize(lr, hr.shape[-2:])


def rounded_lr(hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return LR rounded to 8 bits, and its ILR."""
    lr = quantize(matlab_bicubic(hr)[0])
    return lr, resize(lr, hr.shape[-2:])


def without_antialiasing(hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return LR and ILR by torch's interpolate, which like OpenCV's INTER_CUBIC has a = -0.75."""
    x = torch.from_numpy(np.atleast_3d(hr.T).T.astype(np.float32))[None]
    size = tuple(side // SCALE for side in hr.shape[-2:])
    lr = F.interpolate(x, size, mode="bicubic")
    ilr = F.interpolate(lr, x.shape[-2:], mode="bicubic")
    return tuple(
        planes[0].numpy().reshape(*hr.shape[:-2], *planes.shape[-2:]) for planes in (lr, ilr)
    )


def pillow_rgb(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return LR and ILR by Pillow's bicubic on 8-bit RGB."""
    image = Image.fromarray(rgb.astype(np.uint8).transpose(1, 2, 0))
    lr = image.resize([side // SCALE for side in image.size], Image.Resampling.BICUBIC)
    ilr = lr.resize(image.size, Image.Resampling.BICUBIC)
    return tuple(np.asarray(i, np.float32).transpose(2, 0, 1) for i in (lr, ilr))


def resize_to_multiple(rgb: np.ndarray) -> np.ndarray:
    """Resize instead of crop, as yjn870's prepare.py does."""
    image = Image.fromarray(rgb.astype(np.uint8).transpose(1, 2, 0))
    size = [side // SCALE * SCALE for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)


@dataclass(frozen=True)
class Protocol:
    """The paper's protocol; a row of the table replaces one part."""

    name: str = "the paper's protocol"
    prepare: Callable = lambda rgb: crop_to_multiple(rgb, SCALE)
    luma: Callable = studio_luma
    degrade: Callable = matlab_bicubic
    degrade_rgb: Callable | None = None  # instead of luma
    over_rgb: bool = False
    border: int = SCALE
    rounded: bool = True
    pooled: bool = False
    reference: str = "hr"


PROTOCOLS = [
    Protocol(),
    Protocol("PSNR over RGB instead of luma", over_rgb=True),
    Protocol("luma of full range (JPEG's YCbCr)", luma=full_range_luma),
    Protocol("no border shaved off", border=0),
    Protocol("LR image rounded to 8 bits", degrade=rounded_lr),
    Protocol("resized to a multiple of the scale, not cropped", prepare=resize_to_multiple),
    Protocol("Pillow's bicubic on 8-bit RGB", degrade_rgb=pillow_rgb),
    Protocol("bicubic without antialiasing (OpenCV, torch)", degrade=without_antialiasing),
    Protocol("64.738 as the weight of red", luma=lambda rgb: studio_luma(rgb, 64.738 * 255 / 256)),
    Protocol("output not rounded", rounded=False),
    Protocol("PSNR of the MSE over all images", pooled=True),
    Protocol("PSNR against bicubic, not the ground truth", reference="bicubic"),
]


def measure(protocol: Protocol, paths: list[Path], model: torch.nn.Module) -> tuple[float, float]:
    """Return the PSNR in dB of bicubic and of the network."""
    errors = {"bicubic": [], "srcnn": []}
    for path in paths:
        rgb = protocol.prepare(read_levels(path, 3)[0])
        hr = quantize(protocol.luma(rgb)).astype(np.float32)
        if protocol.degrade_rgb:
            ilr = protocol.luma(protocol.degrade_rgb(rgb)[1]).astype(np.float32)
        else:
            ilr = protocol.degrade(hr)[1]
        images = {"bicubic": ilr, "srcnn": restore(model, ilr)}
        if protocol.over_rgb:
            chroma = rgb_to_ycbcr(matlab_bicubic(rgb)[1])[1:]
            images = {
                method: ycbcr_to_rgb(np.concatenate([planes[None], chroma]))
                for method, planes in images.items()
            }
            hr = rgb
        if protocol.rounded:
            images = {method: quantize(planes) for method, planes in images.items()}
        reference = images["bicubic"] if protocol.reference == "bicubic" else hr
        for method, planes in images.items():
            a, b = (shave(p, protocol.border) for p in (planes, reference))
            errors[method].append(np.mean((a.astype(np.float64) - b) ** 2))
    return tuple(mean_psnr(errors[method], protocol.pooled) for method in ("bicubic", "srcnn"))


def mean_psnr(errors: list[float], pooled: bool) -> float:
    """Return the mean PSNR of squared errors, or the PSNR of their mean."""
    errors = [fmean(errors)] if pooled else errors
    return fmean(psnr(np.zeros(1), np.full(1, error**0.5)) for error in errors)


def print_protocol(folder: str) -> None:
    """Print the table: PSNR of bicubic and of our network, and the differences to the protocol."""
    paths = list(find_images([folder], folders_only=True))
    model = load_srcnn(ROOT / "weights" / f"srcnn_x{SCALE}.pth")
    print(f"{Path(folder).name} x{SCALE}, PSNR in dB{'':28}{'bicubic':>16}{'9-5-5':>16}")
    first = None
    for protocol in PROTOCOLS:
        scores = measure(protocol, paths, model)
        first = first or scores
        cells = (f"{score:8.2f} {score - base:+6.2f}" for score, base in zip(scores, first))
        print(f"{protocol.name:48}{''.join(f'{cell:>16}' for cell in cells)}")
