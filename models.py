"""SRCNN: the network, its loading from a file, and its run over pictures of any size.

model = SRCNN()                             # 9-5-5, 64 and 32 filters, the paper's best
model = load_srcnn("weights/srcnn_x3.pth")  # shapes are read from the file
y = restore(model, ilr)                     # grey levels 0..255, tile by tile
large = enlarge(Image.open("photo.jpg"), model, scale=3)
"""

import itertools
import math
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from utils import InputError, Planes, available_memory, decode, fill_transparent, needing
from utils import reading, resize, rgb_to_ycbcr, ycbcr_to_rgb

INITS = ("identity", "gaussian", "default")


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
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], kernel_size))
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
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu_(layer(x))
        fast = x.device.type == "cpu" and not torch.is_grad_enabled()
        return shifted_sums(last, x) if fast else last(x)

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
            nn.init.dirac_(layer.weight[:channels])  # the first filters hand the picture through
        # Tiny, not zero: the other filters then learn from the first step on.
        nn.init.normal_(self.layers[-1].weight, std=1e-5)
        nn.init.dirac_(self.layers[-1].weight[:, :channels])


def load_srcnn(path: str | Path, device: str | torch.device = "cpu") -> SRCNN:
    """Build the network that a weights file holds; its shapes decide what it is like.

    Args:
        path: a plain state dict (ours or yjn870's), or a checkpoint that holds one as
            "average" (train.py's running average), "model" or "state_dict".
        device: where the network goes.

    Raises:
        InputError: no such file, truncated, no SRCNN, not finite, or holding anything
            but tensors and plain values.
    """
    kind, cure = "weights file of SRCNN: conv1.weight, conv1.bias, ...", "make one with train.py"
    with reading(path, kind, cure), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error will say it in one line
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("average", "model", "state_dict"):
            if isinstance(state.get(key), dict):
                state = state[key]
        # Weights saved from DataParallel carry a prefix.
        state = {re.sub(r"^module\.", "", name): w for name, w in state.items()}
        weights = [state[f"conv{i + 1}.weight"] for i in range(max(2, len(state) // 2))]
        if not all(w.is_floating_point() for w in state.values()):
            raise TypeError("complex or whole numbers")
        model = SRCNN(
            num_channels=weights[0].shape[1],
            filters=[w.shape[0] for w in weights[:-1]],
            kernel_sizes=[w.shape[2] for w in weights],
        )
        model.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise InputError("holds NaN or infinity; take another file")
    return model.to(device)


def to_onnx(model: SRCNN, scale: int) -> bytes:
    """The content of an ONNX file: Pad, Conv, Relu, ..., Conv, for pictures of any size.

    Its input `ilr` and its output `sr` are N x C x H x W, 0..1, as in SRCNN.forward; what they
    are also stands in the file's metadata.

    Raises:
        InputError: the package onnx is not installed.
    """
    with needing("onnx", "--export"):
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    kernels = [str(layer.kernel_size[0]) for layer in model.layers]
    pads = np.array(2 * [0, 0, model.halo, model.halo])
    tensors = {"pads": pads} | {name: w.cpu().numpy() for name, w in model.state_dict().items()}
    nodes, x = [helper.make_node("Pad", ["ilr", "pads"], ["padded"], mode="edge")], "padded"
    for i in range(1, len(kernels) + 1):
        y = "sr" if i == len(kernels) else f"conv{i}"
        nodes.append(helper.make_node("Conv", [x, f"conv{i}.weight", f"conv{i}.bias"], [y]))
        if y != "sr":
            nodes.append(helper.make_node("Relu", [y], [x := f"relu{i}"]))
    shape = ["N", model.num_channels, "H", "W"]
    ilr, sr = (helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in ("ilr", "sr"))
    weights = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "SRCNN", [ilr], [sr], weights)
    opset = helper.make_opsetid("", 13)
    exported = helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="SRCNN")
    what = {1: "luma (BT.601, Y / 255)", 3: "RGB"}.get(model.num_channels, "planes")
    says = f"ilr: {what} in 0..1, enlarged {scale} times by bicubic, N x C x H x W of any size; "
    says += "sr: the same, restored, not clipped"
    properties = {"names": "ilr, sr", "scale": str(scale), "channels": str(model.num_channels)}
    properties |= {"kernel_sizes": "-".join(kernels), "input": says}
    helper.set_model_props(exported, properties)
    onnx.checker.check_model(exported)
    return exported.SerializeToString()


# --- inference ------------------------------------------------------------------------------

TILE = 256  # output pixels a side on a CPU: a core's activations then take 20 MB, not gigabytes
ACCELERATOR_TILE = 1024  # keeps a GPU busy with 0.6 GB of activations
BAND = 3 << 20  # output pixels that are enlarged at once: 0.1 GB of planes


def pick_device(name: str | None, tf32: bool = False) -> torch.device:
    """The device asked for, else this process's GPU where there is one, else the CPU.

    Args:
        name: cpu, cuda (this process's GPU), cuda:1, mps, or None.
        tf32: whether a GPU may round the factors of float32 products to ten bits.

    Raises:
        InputError: no such device here.
    """
    rank = os.environ.get("LOCAL_RANK", "0")  # torchrun's: the process's number on its machine
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{int(rank)}" if name == "cuda" else name)
        torch.empty(1, device=device).cpu()
    except Exception as error:
        where = f"--device {name}: is not available here (LOCAL_RANK is {rank})"
        raise InputError(f"{where}; use --device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return device


def restore(
    model: nn.Module, ilr: np.ndarray, tile: int | None = None, skip: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Run the network over a whole picture in tiles that overlap by its halo.

    The picture is the same as in one pass, within 1e-3 grey levels. On the CPU every core
    works on a tile of its own and waits for no other.

    Args:
        ilr: H x W, or C x H x W for a network of C channels, float32, 0..255.
        tile: output pixels a side at most; None picks what is fast on the network's device.
        skip: rows at the top and at the bottom that nobody needs, and that may stay as they are.

    Returns:
        The restored picture, float32, same shape, neither rounded nor clipped.

    Raises:
        InputError: the weights make values that are not finite.
    """
    halo, parameter = model.halo, next(model.parameters())
    planes = ilr if ilr.ndim == 3 else ilr[None]
    padded = np.pad(planes, ((0, 0), (halo, halo), (halo, halo)), mode="edge")
    restored = planes.copy()
    threads = torch.get_num_threads()
    side, workers = (TILE, threads) if parameter.device.type == "cpu" else (ACCELERATOR_TILE, 1)
    first, last, columns = skip[0], planes.shape[1] - skip[1], planes.shape[2]
    sides = last - first, columns
    height, width = (math.ceil(n / math.ceil(n / (tile or side))) for n in sides)  # equal tiles

    @torch.inference_mode()
    def restore_tile(corner: tuple[int, int]) -> None:
        top, left = corner
        patch = padded[:, top : top + height + 2 * halo, left : left + width + 2 * halo]
        x = torch.from_numpy(np.ascontiguousarray(patch))[None]
        x = (x.to(parameter.device) / 255).to(parameter.dtype)
        y = model(x.contiguous(memory_format=torch.channels_last), valid=True)[0]
        restored[:, top : top + height, left : left + width] = (y.float() * 255).cpu().numpy()

    corners = itertools.product(range(first, last, height), range(0, columns, width))
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(restore_tile, corners))
    torch.set_num_threads(threads)  # parts of what the pool set hold for all
    if not np.isfinite(restored).all():
        raise InputError("--weights-file: their output is not finite; take other weights")
    return restored.reshape(ilr.shape)


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
            turned = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
            back = torch.rot90(self.model(turned, valid), -turns, (2, 3))
            total = total + (back.flip(3) if flip else back).float()
        return total / 8


# --- enlarging ------------------------------------------------------------------------------


def back_project(sr: np.ndarray, lr: np.ndarray, steps: int) -> np.ndarray:
    """Change a restored picture so that reducing it gives the picture that came in.

    Irani and Peleg, "Improving resolution by image registration", 1991; as a last step in
    Timofte et al., "Seven ways", CVPR 2016. Areas of one colour become exact.
    """
    for _ in range(steps):
        sr = sr + resize(lr - resize(sr, lr.shape[-2:]), sr.shape[-2:])
    return sr


def enlarge(
    image: Image.Image | Planes,
    model: nn.Module,
    scale: int,
    back_projection: int = 1,
    tile: int | None = None,
    band: int = BAND,
) -> Image.Image:
    """A picture `scale` times as wide and high: grey stays grey, 16 bits stay 16 bits.

    Luma goes through bicubic and the network, chroma and alpha through bicubic alone; all
    three colours go through a network of three channels.

    Args:
        image: of any of Pillow's modes, or what `decode` makes of it.
        model: for luma (1 channel) or for RGB (3), as `load_srcnn` gives it.
        back_projection: steps, see `back_project`; 0 is the network alone.
        tile: as of `restore`.
        band: output pixels in memory at once; the same picture comes out whatever it is.

    Raises:
        InputError: a picture and a network that do not go together, or a result that does
            not fit into the memory.
    """
    planes = image if isinstance(image, Planes) else decode(image)
    height, width = planes.colour.shape[1:]
    if 4 * scale**2 * width * height > available_memory():  # Pillow takes four bytes a pixel
        size = f"{scale * width} x {scale * height}"
        raise InputError(f"{size} pixels do not fit into the memory; lower --scale")
    lr, learned = planes.levels(), model.num_channels
    if learned not in (1, len(lr)):
        raise InputError("is grey, but these weights are for RGB; take others")
    if planes.alpha is not None:
        alpha = np.asarray(planes.alpha[None], np.float32)
        lr = np.concatenate([fill_transparent(lr, alpha / 255), alpha])
    convert = learned == 1 and len(lr) >= 3
    if convert:
        lr = np.concatenate([rgb_to_ycbcr(lr[:3]), lr[3:]])
    rows = max(1, band // (scale * scale * width))
    # Rows that a row depends on: the network's view and bicubic's, and four a back-projection.
    view = math.ceil(model.halo / scale) + 2
    back_projection *= scale > 1  # where nothing was reduced it would undo the network
    margin = view + 4 * back_projection
    enlarged = Image.new(planes.mode, (scale * width, scale * height))
    for top in tqdm(range(0, height, rows), "bands", delay=1, leave=False, disable=None):
        first, last = max(top - margin, 0), min(top + rows + margin, height)
        skip = scale * view * (first > 0), scale * view * (last < height)
        part = lr[:, first:last]
        sr = resize(part, (scale * part.shape[1], scale * width))
        restored = restore(model, sr[:learned], tile, skip)
        sr[:learned] = back_project(restored, part[:learned], back_projection)
        sr = np.concatenate([ycbcr_to_rgb(sr[:3]), sr[3:]]) if convert else sr
        sr = sr[:, scale * (top - first) :][:, : scale * rows]
        enlarged.paste(planes.to_image(sr), (0, scale * top))
    return enlarged
