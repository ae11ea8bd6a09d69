"""SRCNN: the network, its loading from a file, and its run over pictures of any size.

model = SRCNN()                             # 9-5-5, 64 and 32 filters, the paper's best
model = load_srcnn("weights/srcnn_x3.pth")  # shapes are read from the file
restored = restore(model, ilr)              # grey levels 0..255, tile by tile
"""

import itertools
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import InputError, shaved_psnr, to_8bit

TILE = 192  # output pixels a side: on a CPU the activations then stay in the cache
CUDA_TILE = 1024  # fills a GPU with 0.6 GB of activations
INITS = ("identity", "gaussian", "default")
EXPECTED = "expected are conv1.weight, conv1.bias, ... that fit together"


class SRCNN(nn.Module):
    """Patch extraction (conv1), non-linear mapping (conv2), reconstruction (conv3).

    Dong, Loy, He, Tang, "Image Super-Resolution Using Deep Convolutional Networks",
    TPAMI 2016, section 3.

    Args:
        num_channels: 1 for luma, 3 for RGB.
        filters: outputs of every layer but the last.
        kernel_sizes: odd sides, one more than `filters`: (9, 5, 5), (9, 1, 1, 5), ...
        init: "identity" (the untrained network returns its input), "gaussian" (the
            paper's) or "default" (PyTorch's).

    Raises:
        ValueError: numbers that make no network, or an unknown `init`.
    """

    def __init__(
        self,
        num_channels: int = 1,
        filters: Sequence[int] = (64, 32),
        kernel_sizes: Sequence[int] = (9, 5, 5),
        init: str = "identity",
    ) -> None:
        super().__init__()
        if len(kernel_sizes) != len(filters) + 1 or len(kernel_sizes) < 2:
            raise ValueError("there must be one more kernel size than filter counts")
        if min(num_channels, *filters) < 1 or any(k % 2 == 0 for k in kernel_sizes):
            raise ValueError("filter counts must be positive and kernel sizes odd")
        widths = (num_channels, *filters, num_channels)
        for i, kernel_size in enumerate(kernel_sizes):
            layer = nn.Conv2d(widths[i], widths[i + 1], kernel_size)
            self.add_module(f"conv{i + 1}", layer)
        self.num_channels = num_channels
        self.halo = sum(k // 2 for k in kernel_sizes)
        self._initialize(init)

    @property
    def layers(self) -> list[nn.Conv2d]:
        """The convolutions in order: conv1, conv2, ..."""
        return list(self.children())

    def forward(self, x: torch.Tensor, valid: bool = False) -> torch.Tensor:
        """Restore a picture that bicubic interpolation has already enlarged.

        Args:
            x: N x C x H x W, grey levels in 0..1.
            valid: skip the padding, as the paper does in training: then no output
                depends on an invented border.

        Returns:
            N x C x H x W, or with `valid` N x C x (H - 2 halo) x (W - 2 halo).
        """
        if not valid:
            x = F.pad(x, [self.halo] * 4, mode="replicate")
        *hidden, last = self.children()
        for layer in hidden:
            x = F.relu_(layer(x))
        if torch.is_grad_enabled() or x.is_cuda:
            return last(x)
        return shifted_sums(last, x)

    @torch.no_grad()
    def _initialize(self, init: str) -> None:
        if init not in INITS:
            raise ValueError(f"unknown init {init!r}: choose one of {', '.join(INITS)}")
        if init == "default":
            return
        for layer in self.layers:
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.001)
        if init == "gaussian":
            return
        channels = self.num_channels
        for layer in self.layers[:-1]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            # The first filters hand the picture through.
            nn.init.dirac_(layer.weight[:channels])
        # Tiny, not zero: the other filters then learn from the first step on.
        nn.init.normal_(self.layers[-1].weight, std=1e-5)
        nn.init.dirac_(self.layers[-1].weight[:, :channels])


def load_srcnn(path: str | Path, device: str | torch.device = "cpu") -> SRCNN:
    """Build the network that a weights file holds; its shapes decide what it is like.

    Args:
        path: a plain state dict (ours or yjn870's), or a checkpoint that holds one as
            "model" or "state_dict".
        device: where the network goes.

    Raises:
        InputError: no such file, truncated, no SRCNN, not finite, or holding anything
            but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; make one with train.py")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error will say it in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused, it holds more than weights") from error
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise InputError(
            f"{path}: empty, truncated or no PyTorch file; copy it again"
        ) from error
    return srcnn_from_state(state, path).to(device)


def srcnn_from_state(state: object, path: str | Path) -> SRCNN:
    """The network of what a file holds; `path` only names the file in errors."""
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise InputError(f"{path}: no SRCNN weights; {EXPECTED}")
    # Weights saved from DataParallel carry a prefix.
    state = {re.sub(r"^module\.", "", str(key)): w for key, w in state.items()}
    try:
        weights = [state[f"conv{i + 1}.weight"] for i in range(max(2, len(state) // 2))]
        model = SRCNN(
            num_channels=weights[0].shape[1],
            filters=[w.shape[0] for w in weights[:-1]],
            kernel_sizes=[w.shape[2] for w in weights],
        )
        model.load_state_dict(state)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: no SRCNN weights; {EXPECTED}") from error
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{path}: holds NaN or infinity; take another file")
    return model


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else this rank's GPU where there is one, else the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name is None:
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: is not available here") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
    return device


def tiles(height: int, width: int, side: int) -> list[tuple[int, int, int, int]]:
    """Equal rectangles (top, bottom, left, right) of `side` pixels at most."""

    def cuts(length: int) -> list[int]:
        count = math.ceil(length / side)
        return [length * i // count for i in range(count + 1)]

    rows, columns = cuts(height), cuts(width)
    return [
        (t, b, l, r)
        for t, b in itertools.pairwise(rows)
        for l, r in itertools.pairwise(columns)
    ]


def restore(model: nn.Module, ilr: np.ndarray, tile: int | None = None) -> np.ndarray:
    """Run the network over a whole picture in tiles that overlap by its halo.

    The picture is the same as in one pass, within 1e-3 grey levels.

    Args:
        ilr: H x W, or C x H x W for a network of C channels, float32, 0..255.
        tile: output pixels a side; None picks what is fast on the network's device.

    Returns:
        The restored picture, float32, same shape, neither rounded nor clipped.
    """
    planes = ilr[None] if ilr.ndim == 2 else ilr
    restored = np.empty(planes.shape, np.float32)

    def restore_tile(top: int, bottom: int, left: int, right: int) -> None:
        patch = clamped_crop(planes, top, bottom, left, right, model.halo)
        restored[:, top:bottom, left:right] = restore_patch(model, patch)

    for_each_tile(model, restore_tile, *planes.shape[1:], tile)
    return restored.reshape(ilr.shape)


def for_each_tile(
    model: nn.Module,
    function: Callable[[int, int, int, int], None],
    height: int,
    width: int,
    tile: int | None = None,
) -> None:
    """Call function(top, bottom, left, right) for every tile, with a progress bar.

    On the CPU every core works on a tile of its own: its activations stay in its cache
    and no core waits for another.
    """
    parameter = next(model.parameters())
    jobs = tiles(height, width, tile or (CUDA_TILE if parameter.is_cuda else TILE))
    bar = tqdm(total=len(jobs), desc="tiles", delay=1, leave=False, disable=None)
    threads = torch.get_num_threads()
    workers = threads if parameter.device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in as_completed([pool.submit(function, *job) for job in jobs]):
            done.result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        torch.set_num_threads(threads)  # parts of what the pool set hold for all


def clamped_crop(
    planes: np.ndarray, top: int, bottom: int, left: int, right: int, margin: int
) -> np.ndarray:
    """Cut a rectangle and a margin around it out of C x H x W.

    Beyond the picture's border the edge pixel is repeated.
    """
    cuts, pads = [slice(None)], [(0, 0)]
    for low, high, length in zip((top, left), (bottom, right), planes.shape[1:]):
        low, high = low - margin, high + margin
        cuts.append(slice(max(low, 0), high))
        pads.append((max(-low, 0), max(high - length, 0)))
    return np.pad(planes[tuple(cuts)], pads, mode="edge")


@torch.inference_mode()
def restore_patch(model: nn.Module, patch: np.ndarray) -> np.ndarray:
    """Grey levels C x H x W, 0..255, to C x (H - 2 halo) x (W - 2 halo)."""
    parameter = next(model.parameters())
    x = torch.from_numpy(np.ascontiguousarray(patch))[None]
    x = x.to(parameter.device, parameter.dtype) / 255
    x = x.contiguous(memory_format=torch.channels_last)
    return (model(x, valid=True)[0].float() * 255).cpu().numpy()


def shifted_sums(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What a convolution of few outputs gives, 1.3 to 2 times faster on a CPU.

    One matrix product makes the k * k products of every pixel, as planes; the result is
    the sum of these planes, each shifted by its place in the kernel.
    """
    outputs, channels, k, _ = layer.weight.shape
    pixels = x.permute(0, 2, 3, 1).reshape(len(x), -1, channels).transpose(1, 2)
    weight = layer.weight.permute(2, 3, 0, 1).reshape(-1, channels)
    planes = (weight @ pixels).view(len(x), k, k, outputs, *x.shape[2:])
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    total = layer.bias[:, None, None].expand(len(x), outputs, height, width).clone()
    for i, j in itertools.product(range(k), range(k)):
        total += planes[:, i, j, :, i : i + height, j : j + width]
    return total


class SelfEnsemble(nn.Module):
    """The mean over a picture's 8 flips and rotations, each restored and turned back.

    Timofte, Rothe, Van Gool, "Seven ways to improve example-based single image super
    resolution", CVPR 2016. Eight times the work.
    """

    def __init__(self, model: SRCNN) -> None:
        super().__init__()
        self.model, self.halo, self.num_channels = model, model.halo, model.num_channels

    def forward(self, x: torch.Tensor, valid: bool = False) -> torch.Tensor:
        """As SRCNN.forward."""
        total = 0
        for turns, flip in itertools.product(range(4), (False, True)):
            way = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
            back = torch.rot90(self.model(way, valid), -turns, (2, 3))
            total = total + (back.flip(3) if flip else back)
        return total / 8


def evaluate(
    model: nn.Module,
    ilr: np.ndarray,
    hr: np.ndarray,
    scale: int,
    tile: int | None = None,
) -> tuple[np.ndarray, float]:
    """Restore a picture and measure it as the paper does (protocol steps 4 and 5).

    Args:
        ilr, hr: H x W or C x H x W, float32, grey levels in 0..255.
        scale: also the border that is cut off before measuring.

    Returns:
        The restored picture, rounded and clipped, and its PSNR in dB.
    """
    restored = to_8bit(restore(model, ilr, tile))
    return restored, shaved_psnr(restored, hr, scale)
