"""Train SRCNN on h5 files of patches; the best weights on the evaluation file are kept.

python train.py --train-file t91_x3.h5 --eval-file set5_x3.h5 --scale 3 --minutes 10
python train.py --resume outputs/x3/last.pth               # go on with a stopped run
torchrun --standalone --nproc_per_node=2 train.py ...      # on several GPUs or processes

Writes to outputs-dir/xS: best.pth (weights), last.pth (everything, for --resume),
history.csv (a row per epoch).
"""

import argparse
import io
import math
import os
import signal
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Imported after the process group is made, as an optimizer would do it, its functions'
# defaults keep the group, and its threads live on into the interpreter's end.
import torch.distributed.nn
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from datasets import Batches, H5Patches, read_eval_pairs
from models import INITS, SRCNN, evaluate, load_srcnn, pick_device
from utils import (
    InputError,
    int_at_least,
    mean,
    number,
    parser_for,
    run,
    shaved_psnr,
    to_8bit,
    write_csv,
    write_whole,
)

LEARNING_RATES = {"adam": 1e-3, "muon": 1e-2, "sgd": 1e-4}
ADAM_IN_MUON = 0.1  # Adam's rate for biases and the last layer, as a share of Muon's
LAST_LAYER = 0.1  # the paper's (and the forks') smaller learning rate in the last layer
NUM_EPOCHS = 400
CHECK_EVERY = 20  # steps between looks at the loss, and between the ranks' agreements
COLUMNS = ("epoch", "loss", "psnr", "learning_rate", "seconds")
# A resumed run may change where it runs, how long, and what it writes beside weights.
FREE = {"resume", "num_epochs", "minutes", "device", "num_workers", "stream"}
FREE |= {"outputs_dir", "save_every", "tensorboard"}


# --- optimizers -----------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: all directions of a layer learn equally fast.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024, on the filters as an out x (in * k * k) matrix.
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
                update = orthogonal(weight.grad.lerp(momentum, beta).flatten(1))
                stretch = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.reshape(weight.shape), alpha=-rate * stretch)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T, by Newton-Schulz steps.

    The singular values come out between 0.7 and 1.2.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


def make_optimizers(
    model: SRCNN, name: str, rate: float
) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe; each group keeps its full learning rate as `peak`."""
    *hidden, last = model.layers
    if name == "muon":
        rest = [layer.bias for layer in hidden] + list(last.parameters())
        muon = Muon([layer.weight for layer in hidden], rate)
        optimizers = [muon, torch.optim.Adam(rest, rate * ADAM_IN_MUON)]
    else:
        first = [p for layer in hidden for p in layer.parameters()]
        groups = [
            {"params": first},
            {"params": last.parameters(), "lr": rate * LAST_LAYER},
        ]
        if name == "adam":
            optimizers = [torch.optim.Adam(groups, rate)]
        else:
            optimizers = [torch.optim.SGD(groups, rate, momentum=0.9)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def initial_model(args: argparse.Namespace, num_channels: int) -> SRCNN:
    """The network to start from; --init may name a weights file to go on from."""
    known = args.init in INITS
    init = args.init if known else "identity"
    try:
        model = SRCNN(num_channels, args.filters, args.kernel_sizes, init)
    except ValueError as error:
        raise InputError(f"--kernel-sizes, --filters: {error}") from error
    if known or args.resume:  # the checkpoint holds what has become of the file
        return model
    if not Path(args.init).is_file():
        names = ", ".join(INITS)
        raise InputError(f"--init {args.init}: neither {names} nor a weights file")
    try:
        model.load_state_dict(load_srcnn(args.init).state_dict())
    except RuntimeError as error:
        cure = "fit --filters and --kernel-sizes to the file, and the patches"
        raise InputError(f"--init {args.init}: has other layers; {cure}") from error
    return model


# --- a run ----------------------------------------------------------------------------


class Training:
    """All that a run holds and last.pth keeps.

    Order and flips of the patches follow from the seed and the epoch's number: there is
    no random state to keep.
    """

    def __init__(
        self, args: argparse.Namespace, num_channels: int, device: torch.device
    ) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.folder = Path(args.outputs_dir, f"x{args.scale}")
        model = initial_model(args, num_channels)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.average = None
        if args.ema:
            blend = get_ema_multi_avg_fn(args.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=blend)
        rate = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
        self.optimizers = make_optimizers(self.model, args.optimizer, rate)
        self.bf16 = args.bf16
        if args.bf16 and bf16_is_slow(device):
            say("--bf16: slower than float32 on this CPU, which is used instead")
            self.bf16 = 0
        self.epoch, self.step = 1, 0  # the epoch under way and its steps done
        self.steps = 0  # all steps done
        self.loss_sum = torch.zeros((), device=device)  # of this epoch
        self.best = -math.inf
        self.seconds = 0.0  # of training, evaluation included
        self.history: list[dict] = []

    @property
    def result(self) -> SRCNN:
        """The network to evaluate and keep: the running average where there is one."""
        return self.average.module if self.average else self.model

    def progress(self, steps_per_epoch: int) -> float:
        """How much of the planned training is done, 0..1."""
        if self.args.minutes:
            return min(1.0, self.seconds / (60 * self.args.minutes))
        epochs = self.args.num_epochs or NUM_EPOCHS
        return min(1.0, self.steps / (epochs * steps_per_epoch))

    def set_learning_rate(self, progress: float) -> None:
        """Linear warm-up, then constant or half a cosine down to zero."""
        factor = min(1.0, (self.steps + 1) / (self.args.warmup + 1))
        if self.args.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.epoch, self.step, self.steps, self.best, self.seconds),
            "loss_sum": self.loss_sum,
            "history": self.history,
            "args": vars(self.args),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.epoch, self.step, self.steps, self.best, self.seconds = state["counters"]
        self.loss_sum = state["loss_sum"].to(self.loss_sum.device)
        self.history = state["history"]

    def check_finite(self) -> None:
        """Stop a run whose loss is not finite; best.pth keeps the weights of before."""
        if not self.loss_sum.isfinite():
            rate = self.optimizers[0].param_groups[0]["lr"]
            cure = "try a lower --lr, a longer --warmup or --init identity"
            where = f"in epoch {self.epoch} at a learning rate of {rate:.2g}"
            raise InputError(f"--lr: the loss is not finite {where}; {cure}")

    def save(self) -> None:
        """Write last.pth, from which --resume goes on."""
        self.check_finite()
        if is_main():
            write_whole(self.folder / "last.pth", to_bytes(self.state_dict()))


def to_bytes(content: dict) -> bytes:
    """What torch.save would write to a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weights_of(model: SRCNN) -> bytes:
    """A weights file's content: a plain state dict in the default memory format."""
    state = model.state_dict().items()
    return to_bytes({name: value.cpu().contiguous() for name, value in state})


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the step under way ends first."""

    def __init__(self) -> None:
        self.signal = 0
        for caught in (signal.SIGINT, signal.SIGTERM):
            signal.signal(caught, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number


# --- training -------------------------------------------------------------------------


def train_one_epoch(
    training: Training, network: nn.Module, batches: Batches, stop: StopRequest
) -> bool:
    """Train to the end of the epoch, of the time budget, or to a stop request.

    Returns:
        True where the epoch or the budget is done, False after a stop request.
    """
    args, started = training.args, time.perf_counter() - training.seconds
    distributed, on_cuda = dist.is_initialized(), training.loss_sum.is_cuda
    bar = tqdm(
        batches.epoch(training.epoch, training.step),
        f"epoch {training.epoch}",
        len(batches),
        initial=training.step,
        leave=False,
        disable=None if is_main() else True,
    )
    for lr, hr in bar:
        progress = training.progress(len(batches))
        training.set_learning_rate(progress)
        coarse = progress < training.bf16
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=coarse):
            restored = network(lr, valid=True)
        loss = F.mse_loss(restored.float(), hr)
        for optimizer in training.optimizers:
            optimizer.zero_grad()
        # The paper's loss, to which its rates for SGD belong, sums over the pixels.
        (loss * hr[0].numel() if args.optimizer == "sgd" else loss).backward()
        for optimizer in training.optimizers:
            optimizer.step()
        if training.average:
            training.average.update_parameters(training.model)
        training.loss_sum += loss.detach()
        training.step, training.steps = training.step + 1, training.steps + 1
        look = training.steps % CHECK_EVERY == 0
        if look and not on_cuda:  # on CUDA a look would wait for the device
            training.check_finite()
            bar.set_postfix(loss=f"{training.loss_sum.item() / training.step:.6f}")
        if look or not distributed:
            training.seconds = time.perf_counter() - started
            if distributed:
                agree(training, stop)
            if stop.signal:
                return False
            if training.progress(len(batches)) >= 1:
                break
    training.seconds = time.perf_counter() - started
    if distributed:
        agree(training, stop)
    return True


def agree(training: Training, stop: StopRequest) -> None:
    """Give every rank the same clock and stop request, or one would wait for ever."""
    shared = torch.tensor([training.seconds, float(stop.signal)]).to(training.loss_sum)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    training.seconds, stop.signal = shared[0].item(), int(shared[1].item())


def finish_epoch(training: Training, pairs: list, board: "Board | None") -> None:
    """Evaluate, keep the best weights, write the epoch's files, turn to the next."""
    if dist.is_initialized():
        dist.all_reduce(training.loss_sum)
        training.loss_sum /= dist.get_world_size()
    training.check_finite()
    if is_main():
        row = score_epoch(training, pairs)
        text = "epoch {epoch}  loss {loss:.6f}  PSNR {psnr:.3f} dB"
        text += "  learning rate {learning_rate:.2g}  {seconds:.1f} s"
        say(text.format(**row))
        if board:
            board.add(training, pairs[0], row)
    training.epoch, training.step = training.epoch + 1, 0
    training.loss_sum.zero_()
    training.save()


def score_epoch(training: Training, pairs: list) -> dict:
    """Evaluate and write weights and history.csv; returns the epoch's row."""
    started, args, folder = time.perf_counter(), training.args, training.folder
    score = evaluate_set(training.result, pairs, args.scale)
    rate = training.optimizers[0].param_groups[0]["lr"]
    loss = training.loss_sum.item() / max(training.step, 1)
    training.seconds += time.perf_counter() - started
    row = dict(zip(COLUMNS, (training.epoch, loss, score, rate, training.seconds)))
    training.history.append(row)
    if score > training.best:
        training.best = score
        write_whole(folder / "best.pth", weights_of(training.result))
    if args.save_every and training.epoch % args.save_every == 0:
        name = f"epoch_{training.epoch}.pth"
        write_whole(folder / name, weights_of(training.result))
    write_csv(folder / "history.csv", COLUMNS, training.history)
    return row


def evaluate_set(model: SRCNN, pairs: list, scale: int) -> float:
    """Mean PSNR in dB of a set of (ilr, hr) pictures, by the paper's protocol."""
    return mean([evaluate(model, ilr, hr, scale)[1] for ilr, hr in pairs])


class Board:
    """TensorBoard, where wanted and installed: scalars and a picture per epoch."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            cure = "pip install tensorboard"
            raise InputError(f"--tensorboard: is not installed; {cure}") from error
        self.writer = SummaryWriter(folder / "tensorboard")

    def add(self, training: Training, pair: tuple, row: dict) -> None:
        """The epoch's row, and the first picture as bicubic | SRCNN | original."""
        ilr, hr = pair
        restored, _ = evaluate(training.result, ilr, hr, training.args.scale)
        side_by_side = np.concatenate([to_8bit(ilr), restored, hr], axis=-1) / 255
        layout = "HW" if hr.ndim == 2 else "CHW"
        self.writer.add_image(
            "bicubic, SRCNN, original", side_by_side, row["epoch"], dataformats=layout
        )
        for name in COLUMNS[1:]:
            self.writer.add_scalar(name, row[name], row["epoch"])
        self.writer.flush()


# --- processes and devices ------------------------------------------------------------


def is_main() -> bool:
    """Whether this process evaluates, writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_main():
        print(text, flush=True)


def bf16_is_slow(device: torch.device) -> bool:
    """Whether the CPU only emulates bfloat16, which can be a hundred times slower."""
    if device.type != "cpu":
        return False
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        names = {"square": torch.ones(256, 256, dtype=dtype)}
        times.append(min(timeit.repeat("square @ square", number=1, globals=names)))
    return times[1] > times[0]


def join_process_group(device: torch.device) -> tuple[int, int]:
    """(rank, world size), by torchrun's environment variables."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


# --- command line ---------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--train-file", nargs="+", metavar="FILE", help="one or several h5 files")
    add("--eval-file", metavar="FILE", help="h5 file of prepare.py --eval")
    add("--outputs-dir", default="outputs", help="(default: outputs)")
    add("--scale", type=int_at_least(2), default=3, help="(default: 3)")
    add("--lr", type=number(0), help=f"learning rate (default: {LEARNING_RATES})")
    add("--batch-size", type=int_at_least(1), default=16, help="of all ranks together")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--num-epochs", type=int_at_least(1), help="(default: 400)")
    length.add_argument("--minutes", type=number(1e-3), help="train that long instead")
    add("--num-workers", type=int_at_least(0), default=8, help="where data is streamed")
    add("--seed", type=int_at_least(0), default=123, help="(default: 123)")
    add("--optimizer", choices=tuple(LEARNING_RATES), default="adam")
    add("--schedule", choices=("cosine", "constant"), default="cosine")
    add("--warmup", type=int_at_least(0), default=100, help="steps (default: 100)")
    add("--ema", type=number(0, 1), default=0.995, help="average of weights; 0: none")
    add("--augment", action=argparse.BooleanOptionalAction, default=True)
    share = "share of training, from its start, in bfloat16: there twice as fast (0.7)"
    add("--bf16", type=number(0, 1.01), nargs="?", const=0.7, default=0, help=share)
    start = f"{', '.join(INITS)}, or weights to start from (default: identity)"
    add("--init", default="identity", metavar="HOW|FILE", help=start)
    add("--filters", type=int_at_least(1), nargs="+", default=[64, 32], metavar="N")
    add("--kernel-sizes", type=int_at_least(1), nargs="+", default=[9, 5, 5])
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--stream", action=argparse.BooleanOptionalAction, help="read patches from disk"
    )
    add(
        "--save-every", type=int_at_least(0), default=0, help="epochs; 0: only the best"
    )
    add("--tensorboard", action="store_true", help="also write TensorBoard's files")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on with last.pth")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; with --resume those of the checkpoint are the defaults."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.resume is None:
        for flag in ("train_file", "eval_file"):
            if getattr(args, flag) is None:
                raise InputError(f"--{flag.replace('_', '-')}: is needed")
        return args
    path = Path(args.resume or Path(args.outputs_dir, f"x{args.scale}", "last.pth"))
    saved = load_checkpoint(path)["args"]
    defaults = dict(saved, resume=str(path))
    if args.minutes or args.num_epochs:  # one replaces the other
        defaults |= {"minutes": None, "num_epochs": None}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        if name not in FREE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: {path} was trained with {value}; drop the flag")
    return args


def load_checkpoint(path: Path) -> dict:
    """The content of a last.pth."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train without --resume first")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("args", *saved)}
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: no checkpoint of train.py, or damaged") from error


def load_data(
    args: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[Batches, list]:
    """The batches to train on and the pairs to evaluate on, checked against each other."""
    if args.batch_size % world_size:
        cure = f"must be a multiple of the {world_size} processes"
        raise InputError(f"--batch-size: {cure}")
    halo = sum(size // 2 for size in args.kernel_sizes)
    patches = H5Patches(args.train_file, args.scale, halo)
    pairs = read_eval_pairs(args.eval_file, args.scale)
    if len(patches) < world_size:
        raise InputError(f"{args.train_file[0]}: holds fewer patches than processes")
    channels = patches.patch_shape[0]
    if any((1 if hr.ndim == 2 else len(hr)) != channels for _, hr in pairs):
        raise InputError(f"{args.eval_file}: has other channels than --train-file")
    if any(min(hr.shape[-2:]) <= 2 * args.scale for _, hr in pairs):
        raise InputError(f"{args.eval_file}: holds a picture too small to measure")
    batches = Batches(
        patches,
        args.batch_size,
        args.seed,
        device,
        augment=args.augment,
        crop=halo,
        num_workers=args.num_workers,
        stream=args.stream,
        rank=rank,
        world_size=world_size,
    )
    return batches, pairs


def begin(args: argparse.Namespace, training: Training, pairs: list) -> None:
    """Go on from --resume's checkpoint, or write the files that a run starts with."""
    if args.resume:
        training.load_state_dict(load_checkpoint(Path(args.resume)))
        say(f"{args.resume}: going on in epoch {training.epoch}, step {training.step}")
    elif is_main():
        training.best = evaluate_set(training.result, pairs, args.scale)
        write_whole(training.folder / "best.pth", weights_of(training.result))
        training.save()


def fit(training: Training, batches: Batches, pairs: list, board: Board | None) -> int:
    """Train to the plan's end or to a stop request; returns the exit status.

    DistributedDataParallel ends with this function, before the process group: freed
    after it, it would wait for gloo's threads, which may be waiting for Python.
    """
    stop, network = StopRequest(), training.model
    if dist.is_initialized():
        network = DistributedDataParallel(network)
    while training.step or training.progress(len(batches)) < 1:
        if not train_one_epoch(training, network, batches, stop):
            training.save()
            last = training.folder / "last.pth"
            say(f"stopped; go on with: python train.py --resume {last}")
            return 128 + stop.signal
        finish_epoch(training, pairs, board)
        if dist.is_initialized():
            agree(training, stop)
    return 0


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    rank, world_size = join_process_group(device)
    batches, pairs = load_data(args, device, rank, world_size)
    training = Training(args, batches.patches.patch_shape[0], device)
    board = Board(training.folder) if args.tensorboard and is_main() else None
    begin(args, training, pairs)
    bicubic = mean([shaved_psnr(*pair, args.scale) for pair in pairs])
    where = "streamed" if batches.stream else f"on {device}"
    say(f"{len(batches.patches)} patches {where}; bicubic has {bicubic:.2f} dB")
    status = fit(training, batches, pairs, board)
    if not status:
        best = training.folder / "best.pth"
        say(f"{best}: {training.best:.3f} dB, bicubic {bicubic:.2f} dB")
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run(main, parse_args)
