"""h5 files of patches to batches on the training device, h5 pictures to arrays.

Training files hold datasets `lr` (the network's input, here called ilr) and `hr`, float32,
N x P x P (of C channels N x C x P x P) in 0..255. Evaluation files hold groups `lr` and `hr`
with datasets "0", "1", ... of H x W (of C channels C x H x W). That is the layout of yjn870's
files.
"""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils import InputError, Pair, available_memory, ignore_signals, reading

# Of the free memory that patches may fill: on a CPU the network works in the same memory and
# every process keeps patches of its own; on a GPU half is enough for the activations.
CPU_MEMORY, CUDA_MEMORY = 1 / 8, 1 / 2
CURE = "make it anew with prepare.py"


def check_train_file(path: str | Path, scale: int | None, halo: int) -> tuple[tuple, dict]:
    """Check a training file.

    Args:
        scale: what the file must have been made for, or None.
        halo: of the network; a patch must leave at least one output pixel.

    Returns:
        Its shape, always as (N, C, P, P), and its attributes, as text.

    Raises:
        InputError: no such file, or not what train.py can use.
    """
    with reading(path, "h5 file", CURE), h5py.File(path, "r") as file:
        attributes = check_layout(file, h5py.Dataset, scale)
        ilr, hr = file["lr"].shape, file["hr"].shape
        if ilr != hr or len(ilr) not in (3, 4) or ilr[-1] != ilr[-2]:
            raise InputError(f"'lr' is {ilr} and 'hr' {hr}, not both the same N x P x P; {CURE}")
        if not ilr[0]:
            raise InputError(f"holds no patch; {CURE} from larger pictures")
        if ilr[-1] < 2 * halo + 1:
            cure = f"this network needs --patch-size {2 * halo + 1} or more"
            raise InputError(f"{ilr[-1]}-pixel patches; {cure}")
    return (ilr if len(ilr) == 4 else (ilr[0], 1, *ilr[1:])), attributes


def read_eval_pairs(path: str | Path, scale: int | None = None) -> tuple[list[Pair], dict]:
    """Check and read an evaluation file.

    Returns:
        All pictures, and the file's attributes, as text.

    Raises:
        InputError: no such file, or not what can be evaluated.
    """
    pairs = []
    with reading(path, "h5 file", CURE), h5py.File(path, "r") as file:
        attributes = check_layout(file, h5py.Group, scale)
        step = float(attributes.get("rounding", 1.0))  # the forks' pictures have 8 bits
        if not len(file["lr"]) or set(file["lr"]) != set(file["hr"]):
            counts = f"'lr' holds {len(file['lr'])} pictures and 'hr' {len(file['hr'])}"
            raise InputError(f"{counts}; {CURE}")
        for name in sorted(file["lr"], key=lambda name: (len(name), name)):
            ilr, hr = (read_rows(file[key][name], ...) for key in ("lr", "hr"))
            if ilr.shape != hr.shape or ilr.ndim not in (2, 3):
                raise InputError(f"picture {name!r} differs in shape between 'lr' and 'hr'; {CURE}")
            pairs.append(Pair(ilr, hr, step=step))
    return pairs, attributes


def check_layout(file: h5py.File, kind: type, scale: int | None) -> dict:
    """Check that `lr` and `hr` are of this kind and made for this scale; the attributes."""
    for name in ("lr", "hr"):
        if name not in file:
            raise InputError(f"holds no {name!r}; {CURE}")
        if not isinstance(file[name], kind):
            use, flag = ("training", "without") if kind is h5py.Dataset else ("evaluation", "with")
            raise InputError(f"is no {use} file; {CURE}, {flag} --eval")
    made_for = file.attrs.get("scale", scale)  # the forks' files do not say
    if scale is not None and made_for != scale:
        raise InputError(f"was made for --scale {made_for}, not {scale}; change one of them")
    return {name: str(value) for name, value in file.attrs.items()}


def read_rows(dataset: h5py.Dataset, rows: object) -> np.ndarray:
    """Rows of a dataset as float32, checked to be finite."""
    values = np.asarray(dataset[rows], np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{dataset.name[1:]!r} holds NaN or infinity; {CURE}")
    return values


class H5Patches(Dataset):
    """The patches of one or several training files; index i runs through them in order.

    The files are opened on first use in each process: workers may be forked or spawned.
    """

    def __init__(self, paths: Sequence[str | Path], scale: int | None, halo: int) -> None:
        self.paths = list(paths)
        shapes, attributes = zip(*(check_train_file(path, scale, halo) for path in paths))
        for path, shape in zip(paths, shapes):
            if shape[1:] != shapes[0][1:]:
                reason = f"patches are {shape[1:]}, those of {paths[0]} {shapes[0][1:]}"
                raise InputError(f"{path}: {reason}; use one kind")
        self.patch_shape, self.attributes = shapes[0][1:], attributes[0]
        self.starts = np.cumsum([0] + [shape[0] for shape in shapes])
        self.datasets = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        # An open h5 file does not survive the way to another process.
        return self.__dict__ | {"datasets": None}

    def load(self) -> Iterator[torch.Tensor]:
        """All of ilr, then all of hr: len(self) x C x P x P."""
        for name in ("lr", "hr"):
            parts = []
            for path in self.paths:
                with reading(path, "h5 file", CURE), h5py.File(path, "r") as file:
                    parts.append(read_rows(file[name], ...).reshape(-1, *self.patch_shape))
            yield torch.from_numpy(np.concatenate(parts))

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """(ilr, hr) of these patches, in this order, each len(indices) x C x P x P."""
        self.datasets = self.datasets or [None] * len(self.paths)
        pair = np.empty((2, len(indices), *self.patch_shape), np.float32)
        for i, index in enumerate(indices):
            k = np.searchsorted(self.starts, index, "right") - 1
            with reading(self.paths[k], "h5 file", CURE):
                if not self.datasets[k]:  # to find them by name for every patch takes long
                    file = h5py.File(self.paths[k], "r")
                    self.datasets[k] = file["lr"], file["hr"]
                for target, dataset in zip(pair, self.datasets[k]):
                    target[i] = read_rows(dataset, int(index - self.starts[k]))
        return [torch.from_numpy(planes) for planes in pair]


class Batches:
    """Shuffled, augmented batches on the training device.

    Where the patches fit into a part of the device's free memory they are read once and
    stay there; else a DataLoader streams them. Both ways give the same batches.

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
        self.own = slice(rank, None, world_size)  # of every batch
        self.num_workers = min(num_workers, os.cpu_count() or 1)
        if stream is None:
            if device.type == "cuda":
                room = CUDA_MEMORY * torch.cuda.mem_get_info(device)[0]
            else:
                room = CPU_MEMORY * available_memory() / world_size
            stream = 2 * 4 * len(patches) * math.prod(patches.patch_shape) > room
        self.stream = stream
        self.table = symmetries(patches.patch_shape[-1]).to(device)
        self.resident = None if stream else [planes.to(device) for planes in patches.load()]

    def __len__(self) -> int:
        """Batches in an epoch; what does not fill a last one is left out of it."""
        return len(self.patches) // self.batch_size

    def epoch(self, number: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's batches of an epoch, from the `first` on.

        Yields:
            (ilr, hr), n x C x P x P in 0..1, `hr` cropped.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        shape = len(self), self.batch_size
        order = torch.randperm(len(self.patches), generator=generator)
        order = order[: math.prod(shape)].view(shape)[first:, self.own]
        turns = torch.randint(8, shape, generator=generator)[first:, self.own].to(self.device)
        for (ilr, hr), turn in zip(self._gather(order), turns):
            yield self._finish(ilr, turn, 0), self._finish(hr, turn, self.crop)

    def _gather(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.resident:
            for rows in order.to(self.device):
                yield self.resident[0][rows], self.resident[1][rows]
            return
        loader = DataLoader(
            self.patches,
            batch_sampler=map(torch.Tensor.tolist, order),
            num_workers=self.num_workers,
            collate_fn=tuple,  # they come as batches
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,  # the parent decides what a signal means
        )
        try:
            batches = iter(loader)
            if hasattr(signal, "SIGCHLD"):
                # torch's handler would raise anywhere in a step where a worker dies; the
                # loader itself notices it at the next batch.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ilr, hr in batches:
                yield ilr.to(self.device, non_blocking=True), hr.to(self.device, non_blocking=True)
        except InputError as error:  # of a worker, below its traceback
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
        except RuntimeError as error:
            cure = "go on with --resume, with fewer of them if memory was short"
            raise InputError(f"--num-workers: a worker has died; {cure}") from error

    def _finish(self, batch: torch.Tensor, turn: torch.Tensor, crop: int) -> torch.Tensor:
        """Turn and flip each patch its own way, crop, and bring to 0..1."""
        if self.augment:
            flat = batch.flatten(2)
            source = self.table[turn][:, None].expand_as(flat)
            batch = flat.gather(2, source).view_as(batch)
        end = batch.shape[-1] - crop
        batch = batch[..., crop:end, crop:end] / 255
        return batch.contiguous(memory_format=torch.channels_last)


def symmetries(side: int) -> torch.Tensor:
    """8 x side^2 indices: where each pixel of a turned or flipped square comes from."""
    square = torch.arange(side * side).view(side, side)
    turned = [torch.rot90(square, k) for k in range(4)]
    return torch.stack([view.flatten() for t in turned for view in (t, t.flip(1))])
