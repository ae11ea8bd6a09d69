"""SRCNN: the network, its weights files, and its application to images of any size.

model = SRCNN()                             # 9-5-5 with 64 and 32 filters, the paper's best
model = load_srcnn("weights/srcnn_x3.pth")  # the architecture is read from the file
sr = restore(model, ilr)                    # grey levels 0..255, tile by tile
large = upscale(Image.open("photo.jpg"), model, scale=3)
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

from utils import decode, fill_transparent, InputError, open_input, optional_import, Planes
from utils import resize, rgb_to_ycbcr, ycbcr_to_rgb

INITS = ("identity", "gaussian", "default")


class SRCNN(nn.Module):
    """Patch extraction (conv1), non-linear mapping (conv2), reconstruction (conv3).

    Dong, Loy, He, Tang, "Image Super-Resolution Using Deep Convolutional Networks",
    TPAMI 2016, section 3.

    Args:
        num_channels: 1 for luma, 3 for RGB.
        filters: output channels of every layer but the last.
        kernel_sizes: odd, one more than `filters`: (9, 5, 5), (9, 1, 1, 5), ...
        init: "identity" (the untrained network returns its input), "gaussian" (the paper's)
            or "default" (PyTorch's).

    Attributes:
        num_channels, filters, kernel_sizes: the arguments.
        halo: pixels by which a `valid` output is smaller on each side.
        info: the attributes of the training file, as far as they are known: "degradation"
            ("bicubic", "jpeg" or "pairs"), "jpeg", "scale", "range", "bit_depth", ... Stored in
            weights files.

    Raises:
        ValueError: arguments that describe no network, or an unknown `init`.
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
        self.num_channels, self.info = num_channels, {}
        self.filters, self.kernel_sizes = list(filters), list(kernel_sizes)
        self.halo = sum(k // 2 for k in kernel_sizes)
        self._initialize(init)

    @property
    def layers(self) -> list[nn.Conv2d]:
        """The convolutions in order: conv1, conv2, ..."""
        return list(self.children())

    @property
    def architecture(self) -> str:
        """The kernel sizes as the paper writes them, such as 9-5-5."""
        name = "-".join(map(str, self.kernel_sizes))
        return name if self.num_channels == 1 else f"{name} with {self.num_channels} channels"

    def forward(self, x: torch.Tensor, valid: bool = False) -> torch.Tensor:
        """Restore an image that bicubic interpolation has upscaled.

        Args:
            x: N x C x H x W, grey levels in 0..1.
            valid: do not pad, as the paper does in training: no output then depends on pixels
                outside of the image.

        Returns:
            N x C x H x W, or with `valid` N x C x (H - 2 halo) x (W - 2 halo).
        """
        if not valid:
            x = F.pad(x, [self.halo] * 4, mode="replicate")
        return self.layers[-1](self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations in front of the last layer, without padding."""
        for layer in self.layers[:-1]:
            x = F.relu_(layer(x))
        return x

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
            nn.init.dirac_(layer.weight[:channels])  # the first filters are the identity
        # Tiny instead of zero, so that the other filters learn from the first step.
        nn.init.normal_(self.layers[-1].weight, std=1e-5)
        nn.init.dirac_(self.layers[-1].weight[:, :channels])


def load_srcnn(path: str | Path, device: str | torch.device = "cpu") -> SRCNN:
    """Build the network of a weights file; the architecture is read from the tensors' shapes.

    Args:
        path: a plain state dict (ours or yjn870's), or a checkpoint that contains one as "ema"
            (of our last.pth), "model" or "state_dict".

    Raises:
        InputError: missing, truncated, not SRCNN's, not finite, or with other objects than
            tensors and plain values.
    """
    with (
        open_input(path, "SRCNN weights file", "pass one with conv1.weight, conv1.bias, ..."),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # an exception follows
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("ema", "model", "state_dict"):
            if isinstance(state.get(key), dict):
                state = state[key]
        info = dict(getattr(state, "_metadata", {}).get("srcnn", {}))
        # DataParallel saves names with a prefix.
        state = {re.sub(r"^module\.", "", name): w for name, w in state.items()}
        weights = [state[f"conv{i + 1}.weight"] for i in range(max(2, len(state) // 2))]
        model = SRCNN(
            num_channels=weights[0].shape[1],
            filters=[w.shape[0] for w in weights[:-1]],
            kernel_sizes=[w.shape[2] for w in weights],
        )
        model.load_state_dict(state)
        if not all(w.isfinite().all() for w in state.values()):
            raise InputError("contains NaN or infinity; use another file")
        model.info = info
    return model.to(device)


# --- inference ------------------------------------------------------------------------------

CPU_TILE = 256  # output pixels per side: the activations of a core then take 20 MB
GPU_TILE = 1024  # keeps a GPU busy with 0.6 GB of activations
BAND = 3 << 20  # output pixels that are upscaled at once: 0.1 GB of planes


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device; by default cuda, or cpu where there is no GPU.

    Args:
        name: cpu, cuda, cuda:1, mps, or None. Among torchrun's processes cuda is cuda:LOCAL_RANK.

    Raises:
        InputError: no such device.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")  # torchrun's number of this process
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{int(local_rank)}" if name == "cuda" else name)
        torch.empty(1, device=device).cpu()
    except Exception as error:
        raise InputError(
            f"--device {name}: not available here (LOCAL_RANK is {local_rank}); use --device cpu"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def restore(
    model: nn.Module, ilr: np.ndarray, tile: int | None = None, discard: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Apply the network to a whole image in tiles that overlap by its halo.

    The result differs from that of a single pass by less than 1e-3 grey levels. On a CPU each
    core computes its own tiles.

    Args:
        model: SRCNN or SelfEnsemble.
        ilr: H x W, or C x H x W for a network of C channels, float32, 0..255.
        tile: output pixels per side; None selects a fast size for the network's device.
        discard: rows at the top and at the bottom that the caller discards; they are not
            computed.

    Returns:
        The SR image, float32, of the same shape, neither rounded nor clipped.

    Raises:
        InputError: the weights produce values that are not finite.
    """
    halo, parameter = model.halo, next(model.parameters())
    planes = ilr if ilr.ndim == 3 else ilr[None]
    if len(planes) != model.num_channels:
        raise InputError(f"image has {len(planes)} channels, the network {model.num_channels}")
    on_cpu, threads = parameter.device.type == "cpu", torch.get_num_threads()
    padded = np.pad(planes, ((0, 0), (halo, halo), (halo, halo)), mode="edge")
    sr = planes.copy()  # discarded rows keep the input
    top, bottom, columns = discard[0], planes.shape[1] - discard[1], planes.shape[2]
    tile = tile or (CPU_TILE if on_cpu else GPU_TILE)
    # Tiles of equal size, of at most `tile` pixels per side.
    height, width = (math.ceil(n / math.ceil(n / tile)) for n in (bottom - top, columns))

    @torch.inference_mode()
    def restore_tile(corner: tuple[int, int]) -> None:
        y, x = corner
        patch = padded[:, y : y + height + 2 * halo, x : x + width + 2 * halo]
        batch = torch.from_numpy(np.ascontiguousarray(patch))[None]
        batch = (batch.to(parameter.device) / 255).to(parameter.dtype)
        output = predict(model, batch.contiguous(memory_format=torch.channels_last))[0]
        sr[:, y : y + height, x : x + width] = (output.float() * 255).cpu().numpy()

    corners = itertools.product(range(top, bottom, height), range(0, columns, width))
    workers = threads if on_cpu else 1
    with (
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        # TF32, PyTorch's default for convolutions on a GPU, changes grey levels by up to 0.5.
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        list(pool.map(restore_tile, corners))
    torch.set_num_threads(threads)  # the workers' setting is partly global
    if not np.isfinite(sr).all():
        raise InputError("model: its output is not finite; lower --lr, or use other weights")
    return sr.reshape(ilr.shape)


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return model(x, valid=True); on a CPU the last layer is computed by shifted_sums."""
    if isinstance(model, SRCNN) and x.device.type == "cpu":
        return shifted_sums(model.layers[-1], model.features(x))
    return model(x, valid=True)


def shifted_sums(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute a convolution with few output channels, 1.3 to 2 times faster on a CPU.

    One matrix product gives the k * k products of every pixel, as planes; the result is the sum
    of these planes, each shifted by its position in the kernel.
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
    """The mean over an image's 8 flips and rotations, each restored and transformed back.

    Timofte, Rothe, Van Gool, "Seven ways to improve example-based single image super
    resolution", CVPR 2016. Eight times the work.
    """

    def __init__(self, model: SRCNN) -> None:
        super().__init__()
        self.model, self.halo = model, model.halo
        self.num_channels, self.info = model.num_channels, model.info
        self.architecture = f"{model.architecture} self-ensemble"

    def forward(self, x: torch.Tensor, valid: bool = True) -> torch.Tensor:
        """Return N x C x (H - 2 halo) x (W - 2 halo); `valid` is always True."""
        total = 0
        for rotation, flip in itertools.product(range(4), (False, True)):
            transformed = torch.rot90(x.flip(3) if flip else x, rotation, (2, 3))
            output = torch.rot90(predict(self.model, transformed), -rotation, (2, 3))
            total = total + (output.flip(3) if flip else output).float()
        return total / 8


# --- upscaling ------------------------------------------------------------------------------


def back_project(sr: np.ndarray, lr: np.ndarray, steps: int) -> np.ndarray:
    """Adjust an SR image so that downscaling it reproduces the LR image.

    Irani and Peleg, "Improving resolution by image registration", 1991; as the last step in
    Timofte et al., "Seven ways", CVPR 2016. Areas of one colour become exact.
    """
    if sr.shape == lr.shape:  # at scale 1 it would undo the network
        return sr
    for _ in range(steps):
        sr = sr + resize(lr - resize(sr, lr.shape[-2:]), sr.shape[-2:])
    return sr


def back_projection_steps(model: nn.Module, steps: int | None = None) -> int:
    """Return `steps`; by default 1, or 0 for networks whose LR images were not bicubic's."""
    if steps is not None:
        return steps
    return 1 if model.info.get("degradation", "bicubic") == "bicubic" else 0


def upscale(
    image: Image.Image | Planes,
    model: nn.Module,
    scale: int,
    back_projection: int | None = None,
    edges: str = "edge",
) -> Image.Image:
    """Upscale an image; greyscale and 16-bit greyscale are preserved.

    With a luma network (1 channel) chroma is upscaled by bicubic, with an RGB network (3
    channels) all colours pass through the network; alpha is always upscaled by bicubic.

    Args:
        image: an image of any Pillow mode, or the result of `decode`.
        model: what load_srcnn returns, or SelfEnsemble.
        scale: a whole number.
        back_projection: steps, see `back_project`; None: see back_projection_steps.
        edges: "edge", or "wrap" for seamless textures, which then stay seamless.

    Raises:
        TypeError: an argument of another type, such as a file name.
        InputError: a scale or a network that cannot be used.
    """
    scale = check_arguments(image, model, scale)
    planes = image if isinstance(image, Planes) else decode(image)
    lr, num_colours = planes.levels(), len(planes.colour)
    if planes.alpha is not None:
        alpha = np.asarray(planes.alpha[None], np.float32)
        lr = np.concatenate([fill_transparent(lr, alpha / 255), alpha])
    luma_only = model.num_channels == 1 and num_colours == 3
    if luma_only:
        lr = np.concatenate([rgb_to_ycbcr(lr[:3]), lr[3:]])
        num_colours = 1  # that the network restores
    steps = back_projection_steps(model, back_projection)
    # LR rows that an output row depends on: by the network and bicubic, and by back-projection.
    network_margin = math.ceil(model.halo / scale) + 2
    margin = network_margin + 4 * steps
    if edges == "wrap":
        lr = np.pad(lr, ((0, 0), (margin, margin), (margin, margin)), mode="wrap")
    height, width = lr.shape[1:]
    rows = max(1, BAND // (scale * scale * width))
    result = Image.new(planes.mode, (scale * width, scale * height))
    for top in tqdm(range(0, height, rows), "bands", delay=1, leave=False, disable=None):
        first, last = max(top - margin, 0), min(top + rows + margin, height)
        band = lr[:, first:last]
        sr = resize(band, (scale * band.shape[1], scale * width))
        discard = scale * network_margin * (first > 0), scale * network_margin * (last < height)
        restored = restore_colours(model, sr[:num_colours], discard)
        sr[:num_colours] = back_project(restored, band[:num_colours], steps)
        sr = np.concatenate([ycbcr_to_rgb(sr[:3]), sr[3:]]) if luma_only else sr
        sr = sr[:, scale * (top - first) :][:, : scale * rows]
        result.paste(planes.to_image(sr), (0, scale * top))
    if edges == "wrap":
        border = scale * margin
        result = result.crop((border, border, result.width - border, result.height - border))
    return result


def check_arguments(image: object, model: object, scale: object) -> int:
    """Raise the errors of upscale, which name the argument; return the scale."""
    if not isinstance(image, Image.Image | Planes):
        raise TypeError(f"image: must be a PIL image, not {image!r}; open it with open_image")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a network, not {model!r}; load it with load_srcnn")
    if model.num_channels not in (1, 3):
        raise InputError(f"model: is for {model.num_channels} channels; images have 1 or 3")
    if scale not in range(1, 65):
        raise InputError(f"scale: must be a whole number from 1 to 64, not {scale!r}")
    return int(scale)


def restore_colours(model: nn.Module, ilr: np.ndarray, discard: tuple[int, int]) -> np.ndarray:
    """Restore C x H x W; an RGB network gets greyscale three times, and its mean is returned."""
    if len(ilr) == 1 and model.num_channels == 3:
        rgb = restore(model, np.repeat(ilr, 3, axis=0), discard=discard)
        return rgb.mean(axis=0, keepdims=True)
    return restore(model, ilr, discard=discard)


# --- ONNX -----------------------------------------------------------------------------------


def to_onnx(model: SRCNN, scale: int) -> bytes:
    """Return the content of an ONNX file: Pad, Conv, Relu, ..., Conv, for images of any size.

    Its input `ilr` and its output `sr` are N x C x H x W in 0..1, as in SRCNN.forward; the
    file's metadata describes them.

    Raises:
        InputError: the package onnx is not installed.
    """
    with optional_import("onnx", "--export"):
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    pads = np.array(2 * [0, 0, model.halo, model.halo], np.int64)
    tensors = {"pads": pads} | {name: w.cpu().numpy() for name, w in model.state_dict().items()}
    nodes = [helper.make_node("Pad", ["ilr", "pads"], ["x0"], mode="edge")]
    for i, layer in enumerate(model.layers, 1):
        is_last = i == len(model.layers)
        conv_output = "sr" if is_last else f"conv{i}"
        inputs = [f"x{i - 1}", f"conv{i}.weight", f"conv{i}.bias"]
        # OpenCV up to 4.12 needs the kernel's shape as an attribute.
        kernel_shape = list(layer.kernel_size)
        nodes.append(helper.make_node("Conv", inputs, [conv_output], kernel_shape=kernel_shape))
        if not is_last:
            nodes.append(helper.make_node("Relu", [conv_output], [f"x{i}"]))
    shape = ["N", model.num_channels, "H", "W"]
    ilr, sr = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("ilr", "sr")
    )
    weights = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "SRCNN", [ilr], [sr], weights)
    opset = helper.make_opsetid("", 13)
    exported = helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="SRCNN")
    content = {1: "luma (BT.601, Y / 255)", 3: "RGB"}.get(model.num_channels, "channels")
    properties = {
        "names": "ilr, sr",
        "scale": str(scale),
        "channels": str(model.num_channels),
        "kernel_sizes": "-".join(str(layer.kernel_size[0]) for layer in model.layers),
        "input": f"ilr: {content} in 0..1, upscaled {scale} times by bicubic, N x C x H x W of "
        "any size; sr: the same, restored, not clipped",
    }
    helper.set_model_props(exported, properties)
    onnx.checker.check_model(exported)
    return exported.SerializeToString()
