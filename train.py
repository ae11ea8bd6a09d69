"""Train SRCNN on h5 files of patches; the best weights on the evaluation file are kept.

python train.py --train-file t91_x3.h5 --eval-file set5_x3.h5 --scale 3 --minutes 10
python train.py --resume outputs/x3/last.pth               # go on with a stopped run
torchrun --standalone --nproc_per_node=2 train.py ...      # on several GPUs or processes

Writes to outputs-dir/xS: best.pth (weights), last.pth (everything, for --resume),
history.csv (a row per epoch).
"""

import argparse
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent while libraries load

import copy
import io
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets import Batches, H5Patches, read_eval_pairs, symmetries
from models import INITS, SRCNN, load_srcnn, pick_device, restore
from utils import ArgumentParser, InputError, exit_by_signal, number, on_stop_signals, run
from utils import Pair, expand, needing, reading, shaved_psnr, to_8bit, write_csv, write_whole

if dist.is_available():
    # Imported after the process group is made, as an optimizer would do it, its functions'
    # defaults keep the group, and its threads live on into the interpreter's end.
    import torch.distributed.nn

CHECK_EVERY = 20  # steps between looks at the loss, and between the ranks' agreements
COLUMNS = ("epoch", "loss", "psnr", "learning_rate", "seconds")


@dataclass
class Counters:
    """Where a run is; last.pth keeps it."""

    epoch: int = 1  # the epoch under way
    step: int = 0  # its steps done
    steps: int = 0  # all steps done
    seconds: float = 0.0  # of training and evaluation
    best: float = -math.inf  # the PSNR of best.pth
    loss_sum: float = 0.0  # of the epoch under way
    history: list = field(default_factory=list)  # a dict per epoch, of COLUMNS


def train(
    args: argparse.Namespace, folder: Path, device: torch.device, checkpoint: dict | None
) -> int:
    """A run, from its h5 files to best.pth; returns 0, or 128 + the signal that stopped it.

    Order and flips of the patches follow from seed and epoch: no random state is to be kept.
    """
    distributed = "RANK" in os.environ
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    batches, pairs, data, bicubic = load_data(args, device, rank, world_size)
    torch.manual_seed(args.seed)
    model = initial_model(args, batches.patches.patch_shape[0])
    model = model.to(device, memory_format=torch.channels_last)
    tables = symmetry_tables(model, args.symmetry)
    average = copy.deepcopy(model)  # what is evaluated and kept
    bf16 = args.bf16 if has_bf16(device) else 0.0
    if bf16 != args.bf16 and rank == 0:
        print("--bf16: this device has no instructions for it; float32 is used", flush=True)
    optimizers = make_optimizers(model, args.optimizer, args.lr)
    counters, best = Counters(), weights_of(model)
    models = {"model": model, "average": average}
    if checkpoint:
        counters, best = load_run(args, checkpoint, data, models, optimizers)
    elif rank == 0:
        counters.best = evaluate(average, pairs, args.scale)
    held = picture_filters(model) if args.optimizer == "muon" else []
    last = folder / "last.pth"
    written = last.read_bytes() if checkpoint and last.exists() else None
    network = DistributedDataParallel(model) if distributed else model

    def save() -> None:
        """Write the run's files; last.pth is the truth, from which a resume mends the others."""
        nonlocal written
        check_finite(counters, optimizers)
        if rank == 0:
            if written and last.exists() and last.read_bytes() != written:
                reason = f"another train.py writes to {folder} now"
                raise InputError(f"--outputs-dir: {reason}; name another folder")
            state = {"version": VERSION, "args": vars(args), "counters": asdict(counters)}
            state |= {"data": data, "ran": {"bf16": bool(bf16), "world_size": world_size}}
            state |= {name: m.state_dict() for name, m in models.items()}
            state |= {"best": best, "optimizers": [o.state_dict() for o in optimizers]}
            written = to_bytes(state)
            write_whole(last, written)
            write_results(folder, state)

    against = "no --eval-file: the last weights are kept"
    if rank == 0:
        if checkpoint:
            where = f"epoch {counters.epoch}, step {counters.step}"
            print(f"{args.resume}: going on in {where}", flush=True)
            write_results(folder, checkpoint)
        else:
            with moved_aside(folder):
                save()
        where = "streamed" if batches.stream else f"on {device}"
        if pairs:
            against = f"bicubic has {bicubic:.2f} dB"
        print(f"{len(batches.patches)} patches {where}; {against}", flush=True)
    board = open_board(folder) if args.tensorboard and rank == 0 else None
    received = remember_signals()
    while counters.step or planned(args, counters, len(batches)) < 1:
        epoch, title = batches.epoch(counters.epoch, counters.step), f"epoch {counters.epoch}"
        bar = tqdm(epoch, title, len(batches), False, initial=counters.step, disable=rank or None)
        started = time.perf_counter() - counters.seconds
        loss_sum = torch.tensor(counters.loss_sum, device=device)
        try:
            for ilr, hr in bar:
                progress = planned(args, counters, len(batches))
                set_learning_rate(optimizers, args, counters.steps, progress)
                with torch.autocast(device.type, torch.bfloat16, enabled=progress < bf16):
                    restored = network(ilr, valid=True)
                loss = F.mse_loss(restored.float(), hr)
                model.zero_grad()
                # The paper's loss, to which its rates for SGD belong, sums over the pixels.
                (loss * hr[0].numel() if args.optimizer == "sgd" else loss).backward()
                average_gradients(tables)
                for p, axis in held:
                    p.grad.narrow(axis, 0, model.num_channels).zero_()
                for optimizer in optimizers:
                    optimizer.step()
                # Over a ninth of the steps so far, in long runs less.
                update_average(average, model, max(1 - args.ema, 9 / (9 + counters.steps)))
                loss_sum += loss.detach()
                counters.step, counters.steps = counters.step + 1, counters.steps + 1
                if counters.steps % CHECK_EVERY == 0:  # a GPU is waited for
                    counters.loss_sum = loss_sum.item()
                    check_finite(counters, optimizers)
                    bar.set_postfix(loss=f"{counters.loss_sum / counters.step:.6f}")
                if counters.steps % CHECK_EVERY == 0 or not distributed:
                    counters.seconds = time.perf_counter() - started
                    if distributed:
                        agree(counters, received, loss_sum)
                    if received:
                        break
                if planned(args, counters, len(batches)) >= 1:
                    break
        except InputError:  # a lost worker or a damaged patch: what rank 0 has learned is kept
            counters.loss_sum = loss_sum.item()
            save()
            raise
        counters.seconds = time.perf_counter() - started
        if distributed:
            agree(counters, received, loss_sum)
            dist.all_reduce(loss_sum)
            loss_sum /= world_size
        counters.loss_sum = loss_sum.item()
        if received:
            save()
            if rank == 0:
                print(f"stopped; go on with: python train.py --resume {folder / 'last.pth'}")
            return 128 + received[0]
        check_finite(counters, optimizers)
        if rank == 0:
            score = evaluate(average, pairs, args.scale)
            counters.seconds = time.perf_counter() - started
            rate, loss = optimizers[0].param_groups[0]["lr"], counters.loss_sum / counters.step
            psnr = score if pairs else None
            row = dict(zip(COLUMNS, (counters.epoch, loss, psnr, rate, counters.seconds)))
            counters.history.append(row)
            if score > counters.best or not pairs:
                counters.best, best = score, weights_of(average)
            if board:
                add_to_board(board, average, pairs[:1], row)
        counters.epoch, counters.step, counters.loss_sum = counters.epoch + 1, 0, 0.0
        save()
        if rank == 0:
            if args.save_every and row["epoch"] % args.save_every == 0:
                write_whole(folder / f"epoch_{row['epoch']}.pth", to_bytes(weights_of(average)))
            text = "epoch {epoch}  loss {loss:.6f}" + "  PSNR {psnr:.3f} dB" * bool(pairs)
            text += "  learning rate {learning_rate:.2g}  {seconds:.1f} s"
            print(text.format(**row), flush=True)
        if distributed:
            agree(counters, received, loss_sum)
    if rank == 0:
        score = f"{counters.best:.3f} dB, {against}" if pairs else "the last weights"
        print(f"{folder / 'best.pth'}: {score}")
    return 0


def evaluate(model: SRCNN, pairs: list[Pair], scale: int) -> float:
    """Mean PSNR in dB by the paper's protocol; without pictures -inf."""
    scores = [shaved_psnr(restore(model, p.ilr), p.hr, scale, p.step) for p in pairs]
    return fmean(scores) if pairs else -math.inf


def planned(args: argparse.Namespace, counters: Counters, steps_per_epoch: int) -> float:
    """How much of the planned training is done, 0..1."""
    if args.minutes:
        return min(1.0, counters.seconds / (60 * args.minutes))
    steps = args.steps or (args.num_epochs or NUM_EPOCHS) * steps_per_epoch
    return min(1.0, counters.steps / steps)


def check_finite(counters: Counters, optimizers: list[torch.optim.Optimizer]) -> None:
    """Stop a run whose loss is not finite; best.pth and last.pth stay those of before."""
    if not math.isfinite(counters.loss_sum):
        rate = optimizers[0].param_groups[0]["lr"]
        where = f"in epoch {counters.epoch} at a learning rate of {rate:.2g}"
        cure = "try a lower --lr, a longer --warmup or --init identity"
        raise InputError(f"--lr: the loss is not finite {where}; {cure}")


# --- recipe: start, optimizers, schedule ----------------------------------------------------

LEARNING_RATES = {"adam": 1e-3, "muon": 5e-3, "sgd": 1e-4}
ADAM_IN_MUON = 0.1  # Adam's rate for biases, as a fraction of Muon's
SMALLER = 0.25  # size of hidden filters where Muon starts: it takes longer to turn larger ones
LAST_LAYER = 0.1  # the paper's (and the forks') smaller learning rate in the last layer
NUM_EPOCHS = 400  # the forks'
HISTORICAL = {"schedule": "constant", "warmup": 0, "ema": 0.0, "augment": False}
RECIPES = {
    "adam": {},
    "fast": {"optimizer": "muon", "symmetry": 4, "lr": 0.008, "batch_size": 4, "bf16": 0.7},
    "forks": {"lr": 1e-4, "init": "default", **HISTORICAL},
    "paper": {"optimizer": "sgd", "init": "gaussian", **HISTORICAL},
}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: all directions of a layer learn equally fast.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, on
    the filters as an out x (in * k * k) or in x (out * k * k) matrix: as that of more rows.
    """

    def __init__(self, params: object, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - beta)
                rows = 0 if weight.shape[0] >= weight.shape[1] else 1
                filters = weight.grad.lerp(momentum, beta).transpose(0, rows)
                update = orthogonal(filters.flatten(1))
                stretch = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view(filters.shape).transpose(0, rows), alpha=-rate * stretch)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T, by Newton-Schulz steps.

    The quintic's coefficients are Jordan's, chosen for speed: five steps bring singular
    values above 0.003 of the norm to between 0.68 and 1.21, not to exactly 1.
    """
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_optimizers(model: SRCNN, name: str, rate: float) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe, at their full learning rates."""
    *hidden, last = model.layers
    if name == "muon":
        first = {"params": [layer.weight for layer in hidden]}
        groups = [first, {"params": [last.weight], "lr": rate * LAST_LAYER}]
        biases = [layer.bias for layer in model.layers]
        return [Muon(groups, rate), torch.optim.Adam(biases, rate * ADAM_IN_MUON)]
    first = {"params": [p for layer in hidden for p in layer.parameters()]}
    groups = [first, {"params": last.parameters(), "lr": rate * LAST_LAYER}]
    if name == "adam":
        return [torch.optim.Adam(groups, rate)]
    return [torch.optim.SGD(groups, rate, momentum=0.9)]


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer], args: argparse.Namespace, steps: int, progress: float
) -> None:
    """Linear warm-up, then constant or half a cosine; a group keeps its full rate as `full_lr`."""
    factor = min(1.0, (steps + 1) / (args.warmup + 1))
    if args.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("full_lr", group["lr"]) * factor


@torch.no_grad()
def update_average(average: SRCNN, model: SRCNN, weight: float) -> None:
    """Move the running average towards the network's weights, without waiting for a GPU."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def picture_filters(model: SRCNN) -> list[tuple[torch.nn.Parameter, int]]:
    """Where the filters lie that hand the picture through: first along these axes of parameters.

    Muon's steps are as long for them as for the others, and would spoil the picture: with it
    they stay as the identity start makes them, and what is to be added to the picture is learned.
    No places where a network has no such filters, or no others.
    """
    channels = model.num_channels
    first = model.layers[0].weight[:channels]
    handed = torch.equal(first, torch.nn.init.dirac_(torch.empty_like(first)))
    if not handed or min(layer.out_channels for layer in model.layers[:-1]) <= channels:
        return []
    *hidden, last = model.layers
    return [(p, 0) for layer in hidden for p in layer.parameters()] + [(last.weight, 1)]


# Symmetric training: turns of a square (and flips) act on the filters, as in Cohen and Welling,
# "Group equivariant convolutional networks", ICML 2016. The network commutes with them where
# W[p_out(g)(o), p_in(g)(i)] = act(W[o, i], g) for all g, with p(g) what g does to the channels.
SINGLE = 8  # hidden channels that no turn changes; the others come in sets of turned copies


@torch.no_grad()
def symmetry_tables(model: SRCNN, order: int) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Make the weights symmetric; for each parameter the `order` x numel indices of its copies.

    Args:
        order: of the group: 1 (no symmetry, no tables), 4 turns, or 8 turns and flips.
    """
    if order == 1:
        return []
    group = symmetries(3)[:: 8 // order]  # each element as a table of a 3 x 3 square's pixels
    # Element m of products[g] is what g makes of element m.
    products = [[(group == k[g]).all(1).nonzero().item() for k in group] for g in group]
    # Where each element sends the channels before, between and after the layers; a picture's stay.
    widths = [layer.in_channels for layer in model.layers] + [model.num_channels]
    places = [torch.arange(width).repeat(order, 1) for width in widths]
    for width, moved in zip(widths[1:-1], places[1:-1]):
        sets = max(0, width - SINGLE) // order
        first = width - sets * order
        copies = moved[0, first:].view(sets, order)[:, torch.tensor(products)]
        moved[:, first:] = copies.transpose(0, 1).flatten(1)
    tables = []
    for layer, sources, targets in zip(model.layers, places, places[1:]):
        index = torch.arange(layer.weight.numel()).view(layer.weight.shape)
        turns = symmetries(index.shape[-1])[:: 8 // order]
        weight = index.repeat(order, 1, 1, 1, 1)
        for table, turn, source, target in zip(weight, turns, sources, targets):
            table[target[:, None], source] = index.flatten(2)[..., turn].view(index.shape)
        for p, table in (layer.weight, weight.flatten(1)), (layer.bias, targets.argsort(1)):
            # Of all copies the first: their mean would shrink the variance.
            p.copy_(p.flatten()[table.amin(0).to(p.device)].view(p.shape))
            tables.append((p, table.to(p.device)))
    return tables


def average_gradients(tables: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Replace every gradient by its mean over the group: symmetric weights stay symmetric."""
    for p, table in tables:
        p.grad = p.grad.flatten()[table].mean(0).view(p.shape)


def initial_model(args: argparse.Namespace, num_channels: int) -> SRCNN:
    """The network to start from; --init may name a weights file to go on from."""
    known = args.init in INITS
    try:
        init = args.init if known else "identity"
        model = SRCNN(num_channels, args.filters, args.kernel_sizes, init)
    except ValueError as error:
        raise InputError(f"--kernel-sizes, --filters: {error}") from error
    if args.init == "identity" and args.optimizer == "muon":
        for layer in model.layers[:-1]:
            layer.weight.data[num_channels:] *= SMALLER
    if known or args.resume is not None:  # the checkpoint holds what has become of the file
        return model
    if not Path(args.init).is_file():
        names = ", ".join(INITS)
        raise InputError(f"--init {args.init}: neither {names} nor a weights file")
    loaded = load_srcnn(args.init)
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        cure = "fit --filters and --kernel-sizes to the file, and the patches"
        raise InputError(f"--init {args.init}: has other layers; {cure}") from error
    symmetry_tables(model, args.symmetry)  # changes nothing where the file's weights are symmetric
    pairs = zip(model.parameters(), loaded.parameters())
    if not all(torch.allclose(p, given, atol=1e-3) for p, given in pairs):
        reason = f"its filters are not {args.symmetry} turned copies of each other"
        raise InputError(f"--init {args.init}: {reason}; add --symmetry 1")
    return model


# --- files: data, checkpoint, weights, TensorBoard ------------------------------------------

VERSION = 2  # of last.pth


def load_data(
    args: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[Batches, list[Pair], dict, float]:
    """Batches, pairs to evaluate on, what both files say of themselves, and bicubic's PSNR."""
    if args.batch_size % world_size:
        raise InputError(f"--batch-size: must be a multiple of the {world_size} processes")
    halo = sum(size // 2 for size in args.kernel_sizes)
    patches = H5Patches(expand(args.train_file), args.scale, halo)
    pairs, attributes = [], {}
    if args.eval_file is not None:
        pairs, attributes = read_eval_pairs(args.eval_file, args.scale)
    if len(patches) < world_size:
        raise InputError(f"{args.train_file[0]}: holds fewer patches than processes")
    channels = patches.patch_shape[0]
    if any(pair.num_channels != channels for pair in pairs):
        raise InputError(f"{args.eval_file}: has other channels than --train-file")
    if any(min(p.hr.shape[-2:]) <= 2 * args.scale for p in pairs):
        raise InputError(f"{args.eval_file}: holds a picture too small to measure")
    shapes = [list(pair.hr.shape) for pair in pairs]
    scores = [shaved_psnr(p.ilr, p.hr, args.scale, p.step) for p in pairs]
    if math.inf in scores:  # of one colour: such a PSNR would hide what the others have
        pairs = [pair for pair, score in zip(pairs, scores) if score < math.inf]
        scores = [score for score in scores if score < math.inf]
        if not scores:
            raise InputError(f"{args.eval_file}: bicubic restores all pictures; name others")
        if rank == 0:
            flat = f"{len(shapes) - len(pairs)} pictures that bicubic restores do not count"
            print(f"{args.eval_file}: {flat}", flush=True)
    flow = {"num_workers": args.num_workers, "stream": args.stream}
    flow |= {"augment": args.augment, "crop": halo, "rank": rank, "world_size": world_size}
    batches = Batches(patches, args.batch_size, args.seed, device, **flow)
    data = {
        "train": {"shape": [len(patches), *patches.patch_shape], **patches.attributes},
        "eval": {"shape": shapes, **attributes},
    }
    return batches, pairs, data, fmean(scores) if scores else -math.inf


def holds_run(folder: Path) -> bool:
    """Whether there is anything that a run would overwrite."""
    return any((folder / name).exists() for name in ("best.pth", "last.pth", "history.csv"))


@contextmanager
def moved_aside(folder: Path) -> Iterator[None]:
    """Rename a folder that holds an older run, so that nothing of it is overwritten.

    It is renamed back where the new run cannot write.
    """
    if not holds_run(folder):
        yield
        return
    aside = next(p for i in count(1) if not os.path.lexists(p := Path(f"{folder}-{i}")))
    try:
        folder.rename(aside)
    except OSError as error:
        reason = f"holds an older run and cannot be renamed ({error.strerror})"
        raise InputError(f"{folder}: {reason}; name another --outputs-dir") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    print(f"{folder}: held an older run, which is now {aside}", flush=True)


def write_results(folder: Path, state: dict) -> None:
    """Write what last.pth's content holds of the other files."""
    write_whole(folder / "best.pth", to_bytes(state["best"]))
    if state["counters"]["history"]:
        write_csv(folder / "history.csv", COLUMNS, state["counters"]["history"])


def to_bytes(content: dict) -> bytes:
    """What torch.save would write to a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weights_of(model: SRCNN) -> dict[str, torch.Tensor]:
    """A weights file's content: a copy of the plain state dict, in the default layout."""
    state = model.state_dict().items()
    return {name: value.detach().cpu().clone().contiguous() for name, value in state}


def load_checkpoint(path: Path, defaults: dict) -> dict:
    """The content of a last.pth, its arguments checked to be like the `defaults`."""
    with reading(path, "checkpoint", "name a last.pth of train.py, or train without --resume"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "args" in checkpoint and checkpoint.get("version") != VERSION:
            cure = "train anew, or go on from its weights with --init"
            raise InputError(f"{path}: is from an earlier version of train.py; {cure}")
        saved = checkpoint["args"]
        check_types(saved, defaults | {"lr": 0.0, "train_file": [""], "outputs_dir": None})
        if saved.get("optimizer", "adam") not in LEARNING_RATES:
            raise ValueError("another optimizer")
        check_types(checkpoint["counters"], asdict(Counters()) | {"history": [{}]})
    return checkpoint


def check_types(values: dict, examples: dict) -> None:
    """Raise an error where a value, or one of a list, is not of its example's type; None is any."""

    def types(value: object) -> set[type]:
        items = value if isinstance(value, list) else []
        return {type(value), *map(type, items)}

    if not values:
        raise ValueError("nothing is there")
    for name, value in values.items():
        if examples[name] is not None and not types(value) <= types(examples[name]):
            raise TypeError(f"{name} is {value!r}")
        if isinstance(value, (int, float)) and value < 0 and name != "best":
            raise ValueError(f"{name} is {value!r}")


def load_run(
    args: argparse.Namespace, checkpoint: dict, data: dict, models: dict, optimizers: list
) -> tuple[Counters, dict]:
    """Put a checkpoint's state where it belongs; returns counters and the best weights."""
    with reading(args.resume, "checkpoint", "its parts do not fit together; train anew"):
        for name in ("train", "eval"):
            if checkpoint["data"].get(name) != data[name]:
                difference = "is not the file that the run began with: shapes or attributes differ"
                raise InputError(f"--{name}-file: {difference}; name that one")
        for name, model in models.items():
            model.load_state_dict(checkpoint["best"])
            state = checkpoint[name]  # None: an earlier train.py kept no average with --ema 0
            model.load_state_dict(checkpoint["model"] if state is None else state)
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for p, entry in optimizer.state.items():
                if any(value.dim() and value.shape != p.shape for value in entry.values()):
                    raise ValueError("state of another network")
        counters, best = Counters(**checkpoint["counters"]), checkpoint["best"]
        planned(args, counters, 1)  # fails where a length is no number
        if any(tuple(row) != COLUMNS for row in counters.history):
            raise ValueError("another history")
    return counters, best


def open_board(folder: Path) -> object:
    """TensorBoard's writer; an InputError where it is not installed."""
    with needing("tensorboard", "--tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder / "tensorboard")


def add_to_board(board: object, model: SRCNN, pairs: list[Pair], row: dict) -> None:
    """An epoch's row, and pictures as bicubic | SRCNN | original."""
    for pair in pairs:
        shown = to_8bit(pair.ilr), to_8bit(restore(model, pair.ilr)), pair.hr
        side_by_side = np.concatenate(shown, axis=-1) / 255
        layout = "HW" if pair.hr.ndim == 2 else "CHW"
        board.add_image("bicubic, SRCNN, original", side_by_side, row["epoch"], dataformats=layout)
    for name in COLUMNS[1:]:
        if row[name] is not None:
            board.add_scalar(name, row[name], row["epoch"])
    board.flush()


# --- processes, signals, arguments ----------------------------------------------------------


def agree(counters: Counters, received: list[int], like: torch.Tensor) -> None:
    """Give every rank the same clock and signal, or one would wait for ever."""
    signum = received[0] if received else 0
    shared = torch.tensor([counters.seconds, signum], device=like.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    counters.seconds = shared[0].item()
    received[:] = [int(shared[1].item())] * bool(shared[1])


def remember_signals() -> list[int]:
    """The signals received from now on: the step under way ends first; a second ends at once."""
    received = []

    def remember(signum: int, frame: object) -> None:
        received.append(signum)
        on_stop_signals(exit_by_signal)

    on_stop_signals(remember)
    return received


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; others emulate it, far slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# A resumed run may change where it runs, how long, where data lies, what is written beside.
LENGTHS = {"num_epochs", "minutes", "steps"}
FREE = LENGTHS | {"resume", "train_file", "eval_file", "device", "num_workers", "stream"}
FREE |= {"outputs_dir", "save_every", "tensorboard", "tf32"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--train-file", nargs="+", metavar="FILE", help="one or several h5 files")
    add("--eval-file", metavar="FILE", help="h5 file of prepare.py --eval; without: keep the last")
    add("--scale", type=number(int, 1, 65), default=3, help="(default: 3)")
    add("--batch-size", type=number(int, 1), default=16, help="of all ranks together")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="turn and flip")
    add("--seed", type=number(int, 0, 1 << 32), default=123, help="(default: 123)")

    group = parser.add_argument_group("recipe")
    add = group.add_argument
    text = "defaults of the flags below and of --batch-size, --augment, --init, which typed ones "
    text += "override: " + "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items())
    add("--recipe", choices=tuple(RECIPES), default="adam", help=text)
    length = group.add_mutually_exclusive_group()
    epochs = f"the schedule is planned over them (default: {NUM_EPOCHS})"
    length.add_argument("--num-epochs", type=number(int, 1), metavar="N", help=epochs)
    length.add_argument("--steps", type=number(int, 1), metavar="N", help="that many instead")
    minutes = "train that long instead"
    length.add_argument("--minutes", type=number(float, 1e-3), metavar="M", help=minutes)
    add("--optimizer", choices=tuple(LEARNING_RATES), default="adam", help="(default: adam)")
    add("--lr", type=number(float, 0), help=f"learning rate (default: {LEARNING_RATES})")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="(default: cosine)")
    add("--warmup", type=number(int, 0), default=100, help="steps (default: 100)")
    add("--ema", type=number(float, 0, 1), default=0.999, help="average of weights; 0: none")
    order = "train filters in sets of turned copies: 4 turns, or 8 with flips; 1: free (default)"
    add("--symmetry", type=int, choices=(1, 4, 8), default=1, help=order)
    bf16 = "the first 0.7 (or that much) of training in bfloat16: there twice as fast"
    add("--bf16", type=number(float, 0, 1.01), nargs="?", const=0.7, default=0.0, help=bf16)

    add = parser.add_argument_group("network").add_argument
    add("--filters", type=number(int, 1, 4097), nargs="+", default=[64, 32], metavar="N")
    add("--kernel-sizes", type=number(int, 1, 100), nargs="+", default=[9, 5, 5], metavar="K")
    init = f"{', '.join(INITS)}, or weights to start from (default: identity)"
    add("--init", default="identity", metavar="HOW|FILE", help=init)

    add = parser.add_argument_group("output").add_argument
    add("--outputs-dir", default="outputs", help="(default: outputs)")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on with last.pth")
    every = "keep the weights of every Nth epoch, too"
    add("--save-every", type=number(int, 0), default=0, metavar="N", help=every)
    add("--tensorboard", action="store_true", help="also write TensorBoard's files")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--tf32", action="store_true", help="faster, less exact products on a GPU")
    stream = "read patches from disk (default: where they do not fit into the memory)"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream)
    add("--num-workers", type=number(int, 0), default=8, help="that stream (default: 8)")
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, and the checkpoint of --resume: defaults | saved | typed."""
    parser = get_args_parser()
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults))  # None stands for what was not typed
    typed = vars(parser.parse_args(argv))
    typed = {name: value for name, value in typed.items() if value is not None}
    if "resume" not in typed:
        recipe = RECIPES[typed.get("recipe", defaults["recipe"])]
        return argparse.Namespace(**defaults | recipe | typed), None
    where = defaults | typed
    folder = Path(where["outputs_dir"], f"x{where['scale']}")
    path = Path(typed["resume"] or folder / "last.pth")
    checkpoint = load_checkpoint(path, defaults)
    saved = checkpoint["args"]
    for name, value in typed.items():
        if name not in FREE and saved.get(name, defaults[name]) != value:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise InputError(f"{flag}: {path} was trained with {saved.get(name)}; drop the flag")
    if LENGTHS & typed.keys():  # one replaces the other
        saved = saved | dict.fromkeys(LENGTHS)
    known = defaults | saved | {"outputs_dir": None} | typed | {"resume": str(path)}
    return argparse.Namespace(**known), checkpoint


def main(args: argparse.Namespace, checkpoint: dict | None = None) -> int:
    if args.train_file is None:
        raise InputError("--train-file: is needed; make one with prepare.py")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    folder = Path(args.resume or "").parent  # a resumed run goes on where its checkpoint lies
    if args.outputs_dir is not None:
        folder = Path(args.outputs_dir, f"x{args.scale}")
    files = expand(args.train_file + [args.eval_file] * (args.eval_file is not None))
    inside = os.path.join(os.path.realpath(folder), "")
    if not checkpoint and any(os.path.realpath(path).startswith(inside) for path in files):
        raise InputError(f"--outputs-dir: {folder} holds the h5 files; name another folder")
    last = folder / "last.pth"
    own = checkpoint and last.exists() and last.samefile(args.resume)
    if checkpoint and holds_run(folder) and not own:
        raise InputError(f"--outputs-dir: {folder} holds another run; name another folder")
    device = pick_device(args.device, args.tf32)
    torch.backends.cudnn.benchmark = True  # all batches of an epoch have one shape
    if "RANK" in os.environ:
        try:
            backend = "nccl" if device.type == "cuda" else "gloo"
            # The others wait while the first process evaluates, however long that takes.
            dist.init_process_group(backend, timeout=timedelta(days=1))
        except Exception as error:
            cure = "start several processes with torchrun, one without these variables"
            raise InputError(f"RANK, WORLD_SIZE, MASTER_ADDR: make no group; {cure}") from error
    status = train(args, folder, device, checkpoint)
    if "RANK" in os.environ:
        dist.barrier()  # meanwhile gloo's threads let go of tensors, for which they need the GIL
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run(lambda: main(*parse_args()))
