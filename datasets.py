"""h5 files of patches to batches on the training device, h5 pictures to arrays.

Training files hold datasets `lr` and `hr`, float32, N x P x P (of RGB N x 3 x P x P) in
0..255. Evaluation files hold groups `lr` and `hr` with datasets "0", "1", ... of H x W
(of RGB 3 x H x W). That is the layout of yjn870's files.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils import InputError

CPU_SHARE, CUDA_SHARE = 1 / 8, 1 / 2  # of the free memory that patches may fill
BLOCK = 64 << 20  # bytes read at once where a whole file is gone through
CURE = "make it anew with prepare.py"
Pair = tuple[torch.Tensor, torch.Tensor]  # (lr, hr)


def open_h5(path: str | Path) -> h5py.File:
    """Open an h5 file for reading, or raise InputError with the reason."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such h5 file; make it with prepare.py")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: no h5 file, or truncated; {CURE}") from error


def open_pair(path: str | Path, use: str, scale: int | None) -> h5py.File:
    """Open a file whose `lr` and `hr` fit its `use`, "training" or "evaluation"."""
    kind = h5py.Dataset if use == "training" else h5py.Group
    file = open_h5(path)
    for name in ("lr", "hr"):
        if name not in file:
            raise InputError(f"{path}: holds no {name!r}; {CURE}")
        if not isinstance(file[name], kind):
            flag = "without" if use == "training" else "with"
            raise InputError(f"{path}: is no {use} file; {CURE}, {flag} --eval")
    made_for = file.attrs.get("scale", scale)  # the forks' files do not say
    if scale is not None and made_for != scale:
        difference = f"was made for --scale {made_for}, not {scale}"
        raise InputError(f"{path}: {difference}; change --scale or the file")
    return file


def check_train_file(path: str | Path, scale: int | None, halo: int) -> tuple[int, ...]:
    """Check a training file and return its shape, always as (N, C, P, P).

    Args:
        scale: what the file must have been made for, or None.
        halo: of the network; a patch must leave at least one output pixel.
    """
    with open_pair(path, "training", scale) as file:
        lr, hr = file["lr"].shape, file["hr"].shape
    if lr != hr:
        raise InputError(f"{path}: 'lr' is {lr} and 'hr' {hr}, must be equal; {CURE}")
    if len(lr) not in (3, 4) or lr[-1] != lr[-2]:
        raise InputError(f"{path}: 'lr' is {lr}, not N x P x P; {CURE}")
    if not lr[0]:
        raise InputError(f"{path}: holds no patch; {CURE} from larger pictures")
    if lr[-1] < 2 * halo + 1:
        cure = f"this network needs --patch-size {2 * halo + 1} or more"
        raise InputError(f"{path}: {lr[-1]}-pixel patches; {cure}")
    return lr if len(lr) == 4 else (lr[0], 1, *lr[1:])


def read_eval_pairs(
    path: str | Path, scale: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All (ilr, hr) pictures of an evaluation file, float32 in 0..255."""
    pairs = []
    with open_pair(path, "evaluation", scale) as file:
        lr, hr = file["lr"], file["hr"]
        if not len(lr) or set(lr) != set(hr):
            counts = f"'lr' holds {len(lr)} pictures and 'hr' {len(hr)}"
            raise InputError(f"{path}: {counts}; {CURE}")
        for name in sorted(lr, key=lambda name: (len(name), name)):
            pair = tuple(_read(path, half[name], slice(None)) for half in (lr, hr))
            if pair[0].shape != pair[1].shape:
                reason = f"picture {name!r} differs in shape between 'lr' and 'hr'"
                raise InputError(f"{path}: {reason}; {CURE}")
            pairs.append(pair)
    return pairs


def _read(
    path: str | Path, dataset: h5py.Dataset, rows: slice | np.ndarray
) -> np.ndarray:
    """Rows of a dataset as float32, checked to be finite."""
    try:
        values = np.asarray(dataset[rows], np.float32)
    except OSError as error:
        raise InputError(f"{path}: truncated or damaged; {CURE}") from error
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {dataset.name[1:]!r} holds NaN or infinity; {CURE}")
    return values


class H5Patches(Dataset):
    """The patches of one or several training files; index i runs through them in order.

    The files are opened on first use in each process: workers may be forked or spawned.
    """

    def __init__(
        self, paths: Sequence[str | Path], scale: int | None, halo: int
    ) -> None:
        self.paths = list(paths)
        shapes = [check_train_file(path, scale, halo) for path in self.paths]
        for path, shape in zip(self.paths, shapes):
            if shape[1:] != shapes[0][1:]:
                reason = f"patches are {shape[1:]}, those of {paths[0]} {shapes[0][1:]}"
                raise InputError(f"{path}: {reason}; use one kind")
        self.patch_shape = shapes[0][1:]
        self.starts = np.cumsum([0] + [shape[0] for shape in shapes])
        self.files = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        # An open h5 file does not survive the way to another process.
        return self.__dict__ | {"files": None}

    def __getitems__(self, indices: Sequence[int]) -> Pair:
        """(lr, hr) of these patches, in this order, each len(indices) x C x P x P."""
        self.files = self.files or [open_h5(path) for path in self.paths]
        indices = np.asarray(indices)
        pair = np.empty((2, len(indices), *self.patch_shape), np.float32)
        for i, file in enumerate(self.files):
            start, stop = self.starts[i : i + 2]
            (places,) = np.nonzero((indices >= start) & (indices < stop))
            if not len(places):
                continue
            # h5py takes rising rows only, and a run of them faster as a slice.
            rows, inverse = np.unique(indices[places] - start, return_inverse=True)
            if rows[-1] - rows[0] + 1 == len(rows):
                rows = slice(rows[0], rows[-1] + 1)
            for half, name in zip(pair, ("lr", "hr")):
                read = _read(self.paths[i], file[name], rows)
                half[places] = read.reshape(-1, *self.patch_shape)[inverse]
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def _as_read(pair: Pair) -> Pair:
    return pair  # a batch already; a lambda could not travel to a spawned worker


def free_memory(device: torch.device) -> int:
    """Free bytes on the device; 8 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return 8 << 30


class Batches:
    """Shuffled, augmented batches on the training device.

    Where the patches fit into a share of the device's free memory they are read once
    and stay there; else a DataLoader streams them. Both ways give the same batches.

    Args:
        patches: where they come from.
        batch_size: of all ranks together; each takes its equal part of every batch.
        seed: with the epoch's number it decides order and flips.
        augment: turn and flip each patch at random, in one of eight ways.
        crop: pixels cut off each side of `hr`, the network's halo.
        num_workers: processes that read where patches are streamed.
        stream: for (True) or against (False) the DataLoader; None looks at the memory.
    """

    def __init__(
        self,
        patches: H5Patches,
        batch_size: int,
        seed: int,
        device: torch.device,
        augment: bool = True,
        crop: int = 0,
        num_workers: int = 0,
        stream: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.patches, self.seed, self.device = patches, seed, device
        self.augment, self.crop = augment, crop
        self.batch_size = min(batch_size, len(patches) // world_size * world_size)
        self.part = slice(rank, None, world_size)
        self.num_workers = min(num_workers, os.cpu_count() or 1)
        size = 2 * 4 * len(patches) * math.prod(patches.patch_shape)
        share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE / world_size
        self.stream = size > share * free_memory(device) if stream is None else stream
        self.table = symmetries(patches.patch_shape[-1]).to(device)
        self.resident = None if self.stream else self._load()

    def __len__(self) -> int:
        """Batches in an epoch; what does not fill a last one is left out of it."""
        return len(self.patches) // self.batch_size

    def _load(self) -> Pair:
        """Read everything, block by block, to the device."""
        shape = len(self.patches), *self.patches.patch_shape
        resident = tuple(torch.empty(shape, device=self.device) for _ in range(2))
        step = max(1, BLOCK // (4 * math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            rows = range(start, min(start + step, shape[0]))
            for whole, block in zip(resident, self.patches.__getitems__(rows)):
                whole[rows.start : rows.stop] = block
        return resident

    def epoch(self, number: int, first: int = 0) -> Iterator[Pair]:
        """This rank's batches of an epoch, from the `first` on.

        Yields:
            (lr, hr), n x C x P x P in 0..1, `hr` cropped.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        shape = len(self), self.batch_size
        order = torch.randperm(len(self.patches), generator=generator)
        order = order[: math.prod(shape)].view(shape)[first:, self.part]
        ways = torch.randint(8, shape, generator=generator)[first:, self.part]
        ways = ways.to(self.device)
        if not self.augment:
            ways = torch.zeros_like(ways)
        for (lr, hr), way in zip(self._gather(order), ways):
            yield self._finish(lr, way, 0), self._finish(hr, way, self.crop)

    def _gather(self, order: torch.Tensor) -> Iterator[Pair]:
        if self.resident:
            for rows in order.to(self.device):
                yield self.resident[0][rows], self.resident[1][rows]
            return
        loader = DataLoader(
            self.patches,
            batch_sampler=map(torch.Tensor.tolist, order),
            num_workers=self.num_workers,
            collate_fn=_as_read,
            pin_memory=self.device.type == "cuda",
        )
        for pair in loader:
            yield tuple(half.to(self.device, non_blocking=True) for half in pair)

    def _finish(
        self, batch: torch.Tensor, way: torch.Tensor, crop: int
    ) -> torch.Tensor:
        """Turn and flip each patch its own way, crop, and bring to 0..1."""
        if self.augment:
            flat = batch.flatten(2)
            source = self.table[way][:, None].expand_as(flat)
            batch = flat.gather(2, source).view_as(batch)
        side = batch.shape[-1] - crop
        batch = batch[..., crop:side, crop:side] / 255
        return batch.contiguous(memory_format=torch.channels_last)


def symmetries(side: int) -> torch.Tensor:
    """8 x side^2 indices: where each pixel of a turned or flipped square comes from."""
    square = torch.arange(side * side).view(side, side)
    turned = [torch.rot90(square, k) for k in range(4)]
    return torch.stack([way.flatten() for t in turned for way in (t, t.flip(1))])
