"""Patches of h5 files as batches on the training device; images of evaluation files.

Training files hold datasets `lr` (the network's input, called ilr here) and `hr`, float32,
N x P x P (with C channels N x C x P x P) in 0..255. Evaluation files hold groups `lr` and `hr`
with datasets "0", "1", ... of H x W (C x H x W). This is the layout of yjn870/SRCNN-pytorch.
"""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils import InputError, open_input, Pair, set_signal_handlers

MAX_RESIDENT_BYTES = 2 << 30  # larger sets of patches are streamed from disk by default
HINT = "create it again with prepare.py"


class DataLoadingError(InputError):
    """A lost worker or a damaged patch in the middle of a run."""


def read_layout(file: h5py.File, is_eval: bool, scale: int | None) -> dict:
    """Return the attributes of an open h5 file after checking its layout and scale."""
    kind = h5py.Group if is_eval else h5py.Dataset
    if not isinstance(file["lr"], kind) or not isinstance(file["hr"], kind):
        use = "an evaluation" if is_eval else "a training"
        raise InputError(f"is not {use} file; {HINT}, {'with' if is_eval else 'without'} --eval")
    file_scale = file.attrs.get("scale", scale)  # yjn870's files do not have it
    if scale is not None and file_scale != scale:
        raise InputError(f"was made for --scale {file_scale}, not {scale}; change one of them")
    hr = file["hr"]
    # 256 patches are enough to recognise values in 0..1.
    arrays = hr.values() if is_eval else [hr[:: max(1, len(hr) // 256)]]
    if 0 < max((np.max(array) for array in arrays if array.size), default=0) <= 1:
        raise InputError(f"contains values in 0..1 instead of 0..255; {HINT}")
    return {name: np.asarray(value).tolist() for name, value in file.attrs.items()}


def check_compatible(path: str | Path, attributes: dict, others: dict) -> None:
    """Refuse to combine files of different channels, degradations, value ranges or bit depths."""
    for name in ("channels", "degradation", "jpeg", "range", "bit_depth"):
        value, other = attributes.get(name), others.get(name)  # yjn870's files do not have them
        if None not in (value, other) and value != other:
            raise InputError(f"{path}: has {name} {value}, another file {other}; use equal ones")


def read_finite(dataset: h5py.Dataset, rows: object = ...) -> np.ndarray:
    """Return rows of a dataset as float32 after checking that they are finite."""
    values = np.asarray(dataset[rows], np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{dataset.name[1:]!r} contains NaN or infinity; {HINT}")
    return values


# --- training files -------------------------------------------------------------------------


class H5Patches(Dataset):
    """The patches of one or several training files, numbered through in order.

    Each process opens the files at its first access, so workers may be forked or spawned.

    Args:
        scale: for which the files must have been made; None accepts any.
        halo: of the network; a patch must leave at least one output pixel.

    Raises:
        InputError: a file that train.py cannot use, or files of different patches.
    """

    def __init__(self, paths: Sequence[str | Path], scale: int | None, halo: int) -> None:
        self.paths = list(paths)
        self.starts, self.opened, self.attributes, shapes = [0], {}, {}, []
        for path in paths:
            with open_input(path, "h5 file", HINT), h5py.File(path, "r") as file:
                attributes = read_layout(file, False, scale)
                ilr, hr = file["lr"].shape, file["hr"].shape
                if ilr != hr or len(ilr) not in (3, 4) or ilr[-1] != ilr[-2] or not ilr[0]:
                    raise InputError(f"'lr' is {ilr}, 'hr' {hr}, not both N x P x P; {HINT}")
                if ilr[-1] <= 2 * halo:
                    raise InputError(
                        f"has patches of {ilr[-1]} pixels; use --patch-size {2 * halo + 1} or more"
                    )
                shapes.append(ilr[1:] if len(ilr) == 4 else (1, *ilr[1:]))
                attributes["channels"] = shapes[-1][0]
                if shapes[-1] != shapes[0]:
                    raise InputError(f"has patches of {shapes[-1]}, not {shapes[0]}; use one kind")
                self.starts.append(self.starts[-1] + ilr[0])
            check_compatible(path, attributes, self.attributes)
            self.attributes = attributes | self.attributes  # the first file's, where they differ
        self.patch_shape = shapes[0]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def nbytes(self) -> int:
        """The size of all patches, `lr` and `hr`."""
        return 2 * 4 * len(self) * math.prod(self.patch_shape)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}  # open h5 files cannot be sent to a process

    def load(self) -> list[torch.Tensor]:
        """Return all of ilr and all of hr: N x C x P x P."""
        tensors = []
        for name in ("lr", "hr"):
            parts = []
            for path in self.paths:
                with open_input(path, "h5 file", HINT), h5py.File(path, "r") as file:
                    parts.append(read_finite(file[name]).reshape(-1, *self.patch_shape))
            tensors.append(torch.from_numpy(np.concatenate(parts)))
        return tensors

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return ilr and hr of these patches in this order, n x C x P x P."""
        pair = np.empty((2, len(indices), *self.patch_shape), np.float32)
        for i, index in enumerate(indices):
            k = np.searchsorted(self.starts, index, "right") - 1
            with open_input(self.paths[k], "h5 file", HINT):
                if k not in self.opened:  # looking datasets up for every patch is slow
                    file = h5py.File(self.paths[k], "r")
                    self.opened[k] = file["lr"], file["hr"]
                for planes, dataset in zip(pair, self.opened[k]):
                    planes[i] = read_finite(dataset, int(index - self.starts[k]))
        return [torch.from_numpy(planes) for planes in pair]


class Batches:
    """Shuffled, augmented batches on the training device.

    Patches up to MAX_RESIDENT_BYTES are read once and stay on the device; more are streamed by a
    DataLoader. Both ways give the same batches.

    Args:
        batch_size: of all ranks together; each rank gets an equal part of every batch.
        seed: decides, with the number of the epoch, the order and the augmentation.
        augment: flip and rotate each patch at random in one of eight ways.
        crop: pixels to cut off each side of `hr`: the network's halo.
        num_workers: processes that stream.
        stream: True or False overrides MAX_RESIDENT_BYTES.
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
        self.rank_slice = slice(rank, None, world_size)  # of every batch
        self.num_workers = min(num_workers, os.cpu_count() or 1)
        self.stream = patches.nbytes > MAX_RESIDENT_BYTES if stream is None else stream
        self.symmetries = square_symmetries(patches.patch_shape[-1]).to(device)
        self.resident = None if self.stream else [planes.to(device) for planes in patches.load()]

    def __len__(self) -> int:
        """The number of full batches in an epoch; the remainder is dropped."""
        return len(self.patches) // self.batch_size

    def epoch(self, number: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's batches of an epoch, starting with batch `first`.

        Yields:
            (ilr, hr), n x C x P x P in 0..1, `hr` cropped.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        shape = len(self), self.batch_size
        order = torch.randperm(len(self.patches), generator=generator)
        order = order[: math.prod(shape)].view(shape)
        transforms = torch.randint(8, shape, generator=generator)
        order = order[first:, self.rank_slice]
        transforms = transforms[first:, self.rank_slice].to(self.device)
        pairs = self._from_disk(order) if self.stream else self._from_memory(order)
        with closing(pairs):  # ends the workers also if an error occurs here
            for (ilr, hr), transform in zip(pairs, transforms):
                yield self._transform(ilr, transform, 0), self._transform(hr, transform, self.crop)

    def _from_memory(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order.to(self.device):
            yield self.resident[0][rows], self.resident[1][rows]

    def _from_disk(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(
            self.patches,
            batch_sampler=map(torch.Tensor.tolist, order),
            num_workers=self.num_workers,
            collate_fn=tuple,  # __getitems__ returns whole batches
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
        iterator = iter(loader)
        if hasattr(signal, "SIGCHLD"):
            # torch's handler raises at any point of a step; the loader notices a lost worker
            # at the next batch without it.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from iterator
        except InputError as error:  # from a worker: its traceback precedes the message
            message = str(error).rpartition("InputError: ")[2].strip()
            raise DataLoadingError(message) from error
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise DataLoadingError(
                "--num-workers: a worker was killed; continue with --resume and fewer workers if "
                "memory was short"
            ) from error
        finally:  # the error's traceback would keep the iterator, and so the workers, alive
            if self.num_workers:
                iterator._shutdown_workers()

    def _transform(self, batch: torch.Tensor, transform: torch.Tensor, crop: int) -> torch.Tensor:
        """Flip and rotate each patch, crop, and scale to 0..1."""
        batch = batch.to(self.device, non_blocking=True)
        if self.augment:
            flat = batch.flatten(2)
            source = self.symmetries[transform][:, None].expand_as(flat)
            batch = flat.gather(2, source).view_as(batch)
        end = batch.shape[-1] - crop
        batch = batch[..., crop:end, crop:end] / 255
        return batch.contiguous(memory_format=torch.channels_last)


def ignore_signals(worker: int) -> None:
    """Ignore signals in a DataLoader's worker: the parent process handles them and ends it."""
    set_signal_handlers(signal.SIG_IGN)


def square_symmetries(side: int) -> torch.Tensor:
    """Return 8 x side^2 indices: the source of each pixel of a flipped and rotated square."""
    square = torch.arange(side * side).view(side, side)
    rotated = [torch.rot90(square, k) for k in range(4)]
    return torch.stack([view.flatten() for r in rotated for view in (r, r.flip(1))])


# --- evaluation files -----------------------------------------------------------------------


def read_eval_pairs(path: str | Path, scale: int | None = None) -> tuple[list[Pair], dict]:
    """Return all images of an evaluation file, and its attributes.

    Raises:
        InputError: missing, or not a valid evaluation file for this scale.
    """
    pairs = []
    with open_input(path, "h5 file", HINT), h5py.File(path, "r") as file:
        attributes = read_layout(file, True, scale)
        quantum = float(attributes.get("rounding", 1.0))  # yjn870's files have 8 bits
        if not len(file["lr"]) or set(file["lr"]) != set(file["hr"]):
            raise InputError(f"'lr' has {len(file['lr'])} images, 'hr' {len(file['hr'])}; {HINT}")
        for name in sorted(file["lr"], key=lambda name: (len(name), name)):
            ilr, hr = read_finite(file["lr"][name]), read_finite(file["hr"][name])
            if ilr.shape != hr.shape or ilr.ndim not in (2, 3):
                raise InputError(f"image {name!r} differs in shape between 'lr' and 'hr'; {HINT}")
            pair = Pair(ilr, hr, quantum=quantum)
            pair.greyscale = bool(file["hr"][name].attrs.get("greyscale", False))
            pair.name = str(file["hr"][name].attrs.get("name", f"{Path(path).name}/{name}"))
            pairs.append(pair)
        attributes["channels"] = pairs[0].num_channels
    return pairs, attributes
