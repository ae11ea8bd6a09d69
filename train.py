"""Train SRCNN on h5 files of patches; keep the weights with the best PSNR on the evaluation file.

`--recipe fast --bf16 0 --minutes 1` reaches 32.77 to 32.85 dB on Set5 x3 (the paper: 32.75 after
three days on a GTX 770) with three seeds on two cores of an AMD EPYC (Zen 5); see tests/README.md.

python train.py --train-file t91_x3.h5 --eval-file set5_x3.h5 --scale 3 --minutes 10
python train.py --resume outputs/x3/last.pth               # continue a stopped run
torchrun --standalone --nproc_per_node=2 train.py ...      # several GPUs or processes

Writes to outputs-dir/xS: best.pth (weights), last.pth (the whole run, for --resume), history.csv.
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets import Batches, DataLoadingError, H5Patches, check_compatible, read_eval_pairs
from datasets import square_symmetries
from models import INITS, SRCNN, load_srcnn, pick_device, restore
from utils import ArgumentParser, InputError, Pair, count_of, expand_patterns, number, open_input
from utils import optional_import, protocol_psnr, raise_exit, run, set_signal_handlers
from utils import write_csv, write_file

if dist.is_available():
    # Import this before init_process_group: otherwise its default arguments keep the group, and
    # gloo's threads, alive at exit.
    import torch.distributed.nn

SYNC_EVERY = 20  # steps between checks of the loss; a check waits for the GPU
FIRST_ESTIMATE_STEP = 5 * SYNC_EVERY  # when the estimated duration is printed
EVALUATIONS_PER_RUN = 20  # at least


def loss_fn(sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error, as in the paper."""
    return F.mse_loss(sr, hr)


def train_one_epoch(
    state: "TrainingState", batches: Batches, stop: "StopSignal", output: "RunFolder"
) -> None:
    """Train until the epoch or the run ends, an evaluation is due, or a stop signal arrives."""
    args, steps_left = state.args, len(batches) - state.epoch_step
    epoch_batches = batches.epoch(state.epoch, first=state.epoch_step)
    disable = True if state.rank else None  # None: without a terminal only
    bar = tqdm(epoch_batches, f"epoch {state.epoch}", steps_left, leave=False, disable=disable)
    for ilr, hr in bar:
        if state.evaluation_due or stop.signum:  # a run stopped before an evaluation begins with it
            break
        set_learning_rate(state.optimizers, args, state.global_step, state.progress)
        with torch.autocast(ilr.device.type, torch.bfloat16, enabled=state.progress < state.bf16):
            sr = state.network(ilr, valid=True)
        loss = loss_fn(sr.float(), hr)
        state.model.zero_grad()
        (loss * state.loss_scale).backward()
        state.constrain_gradients()
        for optimizer in state.optimizers:
            optimizer.step()
        update_ema(state.ema, state.model, args.ema, state.global_step)
        state.count_step(loss.detach())
        if state.global_step % SYNC_EVERY == 0:
            sync_ranks(state, stop)
            output.show_progress(state, bar)


def evaluate(model: SRCNN, pairs: list[Pair], scale: int) -> float | None:
    """Return the mean PSNR in dB by the paper's protocol, None without images.

    An exact result counts as 100 dB: an infinite mean would hide the other images.
    """
    scores = [protocol_psnr(restore(model, p.ilr), p.hr, scale, p.quantum) for p in pairs]
    return fmean(min(100.0, score) for score in scores) if scores else None


class TrainingState:
    """The state of a run: model, EMA, optimizers and counters. last.pth contains its state_dict.

    global_step: optimisation steps done.
    seconds: since the start, without the time between a stop and its resumption.
    best, best_psnr: the content of best.pth and its score.
    loss_sum, max_lr: since the last evaluation.
    evaluated_step: global_step at the last evaluation.
    next_evaluation: seconds at the next one, for runs of --minutes.
    """

    SAVED_ATTRIBUTES = "global_step", "seconds", "history", "best", "best_psnr", "max_lr"
    SAVED_ATTRIBUTES += "evaluated_step", "next_evaluation"

    def __init__(
        self, args: argparse.Namespace, batches: Batches, data: dict, rank: int, world_size: int
    ) -> None:
        torch.manual_seed(args.seed)
        num_channels, side, _ = batches.patches.patch_shape
        self.args, self.data, self.rank, self.world_size = args, data, rank, world_size
        self.steps_per_epoch = len(batches)
        self.model = initial_model(args, num_channels)
        self.model.to(batches.device, memory_format=torch.channels_last)
        self.tied = tied_elements(self.model) if args.symmetry > 1 else []
        self.frozen = identity_filters(self.model) if args.optimizer == "muon" else []
        self.network = DistributedDataParallel(self.model) if world_size > 1 else self.model
        self.ema = copy.deepcopy(self.model)
        self.ema.info = batches.patches.attributes | {"scale": args.scale}
        self.optimizers = make_optimizers(self.model, args)
        self.bf16 = args.bf16 if bf16_is_faster(batches.device) else 0.0
        # The paper's loss, to which its learning rates for SGD belong, sums over the pixels.
        num_outputs = num_channels * (side - 2 * self.model.halo) ** 2
        self.loss_scale = num_outputs if args.optimizer == "sgd" else 1
        self.global_step, self.seconds, self.started = 0, 0.0, time.perf_counter()
        self.history, self.best, self.best_psnr = [], weights_of(self.ema), None
        self.loss_sum, self.max_lr = torch.zeros((), device=batches.device), 0.0
        self.evaluated_step, self.next_evaluation = 0, 0.0

    def state_dict(self) -> dict:
        """Return the content of last.pth; on a CPU a resumed run continues bit for bit."""
        return {name: getattr(self, name) for name in self.SAVED_ATTRIBUTES} | {
            "version": CHECKPOINT_VERSION,
            "args": vars(self.args),
            "data": self.data,
            "model": self.model.state_dict(),
            "ema": weights_of(self.ema),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loss_sum": self.loss_sum.item(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict.

        Raises:
            InputError: it is of a run on other data.
        """
        for name in ("train", "eval"):
            if state["data"][name] != self.data[name]:
                raise InputError(f"--{name}-file: differs from that of the run; pass the same data")
        for name in self.SAVED_ATTRIBUTES:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.loss_sum.fill_(state["loss_sum"])
        # Whether the weights that --init named had identity filters is known only now.
        self.frozen = identity_filters(self.model) if self.args.optimizer == "muon" else []
        self.started = time.perf_counter() - self.seconds

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next step belongs to, from 1."""
        return 1 + self.global_step // self.steps_per_epoch

    @property
    def epoch_step(self) -> int:
        """The steps done in this epoch."""
        return self.global_step % self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """The length of a run that is not limited by --minutes."""
        return self.args.steps or (self.args.num_epochs or NUM_EPOCHS) * self.steps_per_epoch

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, 0..1."""
        if self.args.minutes:
            return min(1.0, self.seconds / (60 * self.args.minutes))
        return min(1.0, self.global_step / self.total_steps)

    @property
    def eta(self) -> timedelta:
        """The estimated time to the end of the run."""
        seconds = self.seconds * (1 - self.progress) / max(self.progress, 1e-9)
        return timedelta(seconds=round(seconds))

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate now: at least EVALUATIONS_PER_RUN times, and after each epoch.

        With --minutes the clock decides, see schedule_evaluation.
        """
        if self.evaluated_step == self.global_step:
            return False
        if self.progress >= 1:
            return True
        if self.args.eval_every:
            return self.global_step % self.args.eval_every == 0
        if self.args.minutes:  # only at steps where all ranks have the same clock
            is_synced = self.epoch_step == 0 or self.global_step % SYNC_EVERY == 0
            return is_synced and self.seconds >= self.next_evaluation
        interval = min(self.steps_per_epoch, math.ceil(self.total_steps / EVALUATIONS_PER_RUN))
        return self.epoch_step == 0 or self.global_step % interval == 0

    def schedule_evaluation(self, duration: float) -> None:
        """Set the time of the next evaluation, so that evaluations take at most a 20th of all.

        Args:
            duration: of the last evaluation in seconds.
        """
        interval = 60 * (self.args.minutes or 0) / EVALUATIONS_PER_RUN
        self.next_evaluation = self.seconds + max(interval, 20 * duration)

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the last one has been evaluated."""
        return self.progress >= 1 and self.evaluated_step == self.global_step

    @property
    def mean_loss(self) -> float:
        """The mean loss of the steps since the last evaluation."""
        return self.loss_sum.item() / max(1, self.global_step - self.evaluated_step)

    def constrain_gradients(self) -> None:
        """Keep tied filters tied and identity filters frozen."""
        for p, indices in self.tied:
            p.grad = p.grad.flatten()[indices].mean(0).view(p.shape)
        for p, axis in self.frozen:
            p.grad.narrow(axis, 0, self.model.num_channels).zero_()

    def count_step(self, loss: torch.Tensor) -> None:
        """Count an optimisation step; several ranks read the clock in sync_ranks instead."""
        self.loss_sum += loss
        self.max_lr = max(self.max_lr, self.optimizers[0].param_groups[0]["lr"])
        self.global_step += 1
        if self.world_size == 1:
            self.seconds = time.perf_counter() - self.started

    def record(self, psnr: float | None) -> None:
        """Append a row to the history; the EMA becomes `best` if its PSNR is the highest so far.

        Without evaluation images (psnr is None) it always does.
        """
        epoch = math.ceil(self.global_step / self.steps_per_epoch)  # of the last step
        seconds = time.perf_counter() - self.started
        row = (epoch, self.global_step, self.mean_loss, psnr, self.max_lr, seconds)
        self.history.append(dict(zip(COLUMNS, row)))
        self.evaluated_step, self.max_lr = self.global_step, 0.0
        self.loss_sum.zero_()
        if psnr is None or psnr > self.best_psnr:
            self.best, self.best_psnr = weights_of(self.ema), psnr


def train(
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: dict | None,
    rank: int,
    world_size: int,
) -> int:
    """Train a network; return the exit status: 0, or 128 + the signal that stopped it."""
    batches, pairs, data = load_data(args, device, rank, world_size)
    if rank > 0:
        pairs = []  # rank 0 evaluates; the others record rows without a PSNR
    state, stop = TrainingState(args, batches, data, rank, world_size), StopSignal(world_size)
    if checkpoint:
        with open_input(args.resume, "checkpoint", "train again"):
            state.load_state_dict(checkpoint)
    else:
        state.best_psnr = evaluate(state.ema, pairs, args.scale)
        sync_ranks(state, stop)  # the other ranks have waited for rank 0
        duration = state.seconds
        state.seconds, state.started = 0.0, time.perf_counter()  # training begins now
        state.schedule_evaluation(duration)
    output = RunFolder(args) if rank == 0 else NoOutput()
    if checkpoint:
        output.write_derived_files(state)  # in case they were lost
        output.print(f"{args.resume}: resuming after step {state.global_step:,}")
    else:
        output.save(state)
    output.print_summary(state, batches, pairs)

    while not state.finished:
        try:
            train_one_epoch(state, batches, stop, output)
        except DataLoadingError:
            if math.isfinite(state.mean_loss):
                output.save(state)  # what was trained so far is not lost
            raise
        sync_ranks(state, stop)
        if stop.signum:
            output.save(state)
            output.print(f"stopped; continue with: python train.py --resume {output.path}/last.pth")
            return 128 + stop.signum
        if state.evaluation_due:
            seconds_before = state.seconds
            state.record(evaluate(state.ema, pairs, args.scale))
            sync_ranks(state, stop)
            state.schedule_evaluation(state.seconds - seconds_before)
            output.save(state)
            output.print_evaluation(state)
        elif state.epoch_step == 0:
            output.save(state)
    output.print_result(state)
    return 0


# --- optimizers and schedule ----------------------------------------------------------------

LEARNING_RATES = {"adam": 1e-3, "muon": 5e-3, "sgd": 1e-4}
BIAS_LR_IN_MUON = 0.1  # Adam's learning rate for the biases, as a factor of Muon's
HIDDEN_INIT_GAIN = 0.25  # Muon's steps have a fixed size and take longer to rotate large filters
NUM_EPOCHS = 400  # yjn870's
FORK_DEFAULTS = {"schedule": "constant", "warmup": 0, "ema": 0.0, "augment": False}
RECIPES = {
    "adam": {},
    "fast": {"optimizer": "muon", "symmetry": 4, "lr": 0.008, "batch_size": 4, "bf16": 0.7},
    "forks": {"lr": 1e-4, "init": "default", **FORK_DEFAULTS},
    "paper": {"optimizer": "sgd", "init": "gaussian", **FORK_DEFAULTS},
}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: all directions of a layer learn equally fast.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. A
    layer is a matrix of out x (in * k * k) or of in x (out * k * k), whichever has more rows.
    """

    def __init__(self, params: object, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta, lr = group["momentum"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - beta)
                axis = 0 if weight.shape[0] >= weight.shape[1] else 1
                gradient = weight.grad.lerp(momentum, beta).transpose(0, axis)
                update = orthogonalize(gradient.flatten(1))
                factor = max(1, update.shape[0] / update.shape[1]) ** 0.5  # Jordan's
                weight.add_(update.view(gradient.shape).transpose(0, axis), alpha=-lr * factor)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return about U V^T of the singular value decomposition U S V^T, by Newton-Schulz steps.

    The quintic's coefficients are Jordan's, chosen for speed: five steps bring singular values
    above 0.003 of the norm to between 0.68 and 1.21, not to exactly 1.
    """
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_optimizers(model: SRCNN, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return the optimizers at their initial learning rates; the last layer's is smaller."""
    *hidden, last = model.layers
    last_lr = args.lr * args.last_layer_lr  # with Muon of the weights alone; Adam has the biases
    if args.optimizer == "muon":
        groups = [
            {"params": [layer.weight for layer in hidden]},
            {"params": [last.weight], "lr": last_lr},
        ]
        biases = [layer.bias for layer in model.layers]
        return [Muon(groups, args.lr), torch.optim.Adam(biases, args.lr * BIAS_LR_IN_MUON)]
    groups = [
        {"params": [p for layer in hidden for p in layer.parameters()]},
        {"params": last.parameters(), "lr": last_lr},
    ]
    if args.optimizer == "adam":
        return [torch.optim.Adam(groups, args.lr)]
    return [torch.optim.SGD(groups, args.lr, momentum=0.9)]


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer],
    args: argparse.Namespace,
    global_step: int,
    progress: float,
) -> None:
    """Apply linear warm-up, then a constant rate or half a cosine over the run."""
    factor = min(1.0, (global_step + 1) / (args.warmup + 1))
    if args.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


@torch.no_grad()
def update_ema(ema: SRCNN, model: SRCNN, decay: float, global_step: int) -> None:
    """Move the EMA towards the network's weights, without waiting for a GPU.

    Its window is a ninth of the steps so far, at most 1 / (1 - decay).
    """
    weight = max(1 - decay, 9 / (9 + global_step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def identity_filters(model: SRCNN) -> list[tuple[torch.nn.Parameter, int]]:
    """Return the identity filters as (parameter, axis): the first num_channels along that axis.

    They stay frozen, because Muon's fixed-size steps would destroy them; the other filters learn
    what is to be added to the input. The list is empty if the first layer does not begin with
    identity filters, or if a layer has no further ones.
    """
    channels = model.num_channels
    first = model.layers[0].weight[:channels]
    is_identity = torch.equal(first, torch.nn.init.dirac_(torch.empty_like(first)))
    if not is_identity or min(layer.out_channels for layer in model.layers[:-1]) <= channels:
        return []
    *hidden, last = model.layers
    return [(p, 0) for layer in hidden for p in layer.parameters()] + [(last.weight, 1)]


# --- tied filters ---------------------------------------------------------------------------

# Filters tied under 90-degree rotations, as in Cohen and Welling, "Group equivariant convolutional
# networks", ICML 2016. The network commutes with rotations g if W[p_out(g)(o), p_in(g)(i)] =
# rotate(W[o, i], g) for all g, where p(g) permutes a layer's channels.
NUM_ROTATIONS = 4
NUM_INVARIANT = 8  # hidden channels that rotations leave in place; the others form sets of four


def tied_elements(model: SRCNN) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return which elements of the parameters are equal if filters are tied under rotations.

    Returns:
        For each parameter 4 x numel indices: element i of row g is the one tied to i by g.
    """
    rotations = torch.arange(NUM_ROTATIONS)
    products = (rotations[:, None] + rotations) % NUM_ROTATIONS  # [g, h]: rotation h, then g
    # To which channel each rotation moves a channel: of the input, the hidden layers, the output.
    widths = [layer.in_channels for layer in model.layers] + [model.num_channels]
    permutations = [torch.arange(width).repeat(NUM_ROTATIONS, 1) for width in widths]
    for width, permutation in zip(widths[1:-1], permutations[1:-1]):
        num_sets = max(0, width - NUM_INVARIANT) // NUM_ROTATIONS
        first = width - num_sets * NUM_ROTATIONS
        sets = permutation[0, first:].view(num_sets, NUM_ROTATIONS)[:, products]
        permutation[:, first:] = sets.transpose(0, 1).flatten(1)
    tied = []
    for layer, inputs, outputs in zip(model.layers, permutations, permutations[1:]):
        index = torch.arange(layer.weight.numel()).view(layer.weight.shape)
        tables = index.repeat(NUM_ROTATIONS, 1, 1, 1, 1)
        pixels = square_symmetries(index.shape[-1])[::2]  # without the flipped ones
        for table, rotated, moved_inputs, moved_outputs in zip(tables, pixels, inputs, outputs):
            rotated_index = index.flatten(2)[..., rotated].view(index.shape)
            table[moved_outputs[:, None], moved_inputs] = rotated_index
        tied.append((layer.weight, tables.flatten(1).to(layer.weight.device)))
        tied.append((layer.bias, outputs.argsort(1).to(layer.bias.device)))
    return tied


@torch.no_grad()
def tie_filters(model: SRCNN) -> float:
    """Set tied elements to the first of them; return the largest change.

    Their mean would have a smaller variance than the initialisation.
    """
    change = 0.0
    for p, indices in tied_elements(model):
        first = p.flatten()[indices.amin(0)].view(p.shape)
        change = max(change, (first - p).abs().max().item())
        p.copy_(first)
    return change


# --- data and initial weights ---------------------------------------------------------------


def load_data(
    args: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[Batches, list[Pair], dict]:
    """Return batches, evaluation pairs, and what last.pth stores of both.

    That is "train" and "eval", which a resumed run compares, and what the summary prints.
    """
    halo = sum(size // 2 for size in args.kernel_sizes)
    patches = H5Patches(expand_patterns(args.train_file), args.scale, halo)
    if args.batch_size % world_size or len(patches) < world_size:
        raise InputError(
            f"--batch-size: must be a multiple of the {world_size} processes, which get at least "
            "a patch each"
        )
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
    data = {"train": [len(patches), *patches.patch_shape, patches.attributes], "eval": []}
    pairs = []
    for path in expand_patterns(args.eval_file or []):
        file_pairs, attributes = read_eval_pairs(path, args.scale)
        check_compatible(path, attributes, patches.attributes)
        data["eval"] += [*(list(pair.hr.shape) for pair in file_pairs), attributes]
        pairs += file_pairs
    # An infinite PSNR, as of an image of one colour, would hide the scores of the others.
    large = [p for p in pairs if min(p.hr.shape[-2:]) > 2 * args.scale]
    scores = [protocol_psnr(p.ilr, p.hr, args.scale, p.quantum) for p in large]
    measured = [p for p, psnr in zip(large, scores) if psnr < math.inf]
    if pairs and not measured:
        raise InputError(
            "--eval-file: images are too small, or bicubic's PSNR is infinite; use others"
        )
    data["num_ignored"] = len(pairs) - len(measured)
    if measured:
        data["bicubic_psnr"] = fmean(psnr for psnr in scores if psnr < math.inf)
    return batches, measured, data


def initial_model(args: argparse.Namespace, num_channels: int) -> SRCNN:
    """Return the network to start from; --init may name a weights file."""
    fine_tunes = args.init not in INITS and not args.resume  # a checkpoint has its own weights
    if fine_tunes:
        model = load_srcnn(args.init)
        shape = [model.num_channels, model.filters, model.kernel_sizes]
        if shape != [num_channels, args.filters, args.kernel_sizes]:
            raise InputError(
                f"--init {args.init}: is {model.architecture}; pass its --filters, --kernel-sizes, "
                "and patches of its number of channels"
            )
    else:
        try:
            init = args.init if args.init in INITS else "identity"
            model = SRCNN(num_channels, args.filters, args.kernel_sizes, init)
        except ValueError as error:
            raise InputError(f"--kernel-sizes, --filters: {error}") from error
    if args.init == "identity" and args.optimizer == "muon":
        for layer in model.layers[:-1]:
            layer.weight.data[num_channels:] *= HIDDEN_INIT_GAIN
    change = tie_filters(model) if args.symmetry > 1 else 0.0
    if fine_tunes and change > 1e-3:
        raise InputError(f"--init {args.init}: its filters are not tied; add --symmetry 1")
    return model


# --- checkpoint files -----------------------------------------------------------------------

CHECKPOINT_VERSION = 4
COLUMNS = ("epoch", "step", "loss", "psnr", "learning_rate", "seconds")  # of history.csv


class RunFolder:
    """The folder outputs-dir/xS with the files of a run, and what the run prints; for rank 0."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = Path(args.outputs_dir, f"x{args.scale}")
        self.writer, self.baseline = None, ""
        if args.tensorboard:
            with optional_import("tensorboard", "--tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
        if args.resume:
            self.path = Path(args.resume).parent
        else:
            self.move_older_run()
        if args.tensorboard:
            self.writer = SummaryWriter(self.path / "tensorboard")

    def move_older_run(self) -> None:
        """Rename a folder that contains a run, x3 to x3-1, x3-2, ..., so that nothing is lost."""
        names = ("best.pth", "last.pth", "history.csv")
        if not any((self.path / name).exists() for name in names):
            return
        i = 1
        while os.path.lexists(f"{self.path}-{i}"):
            i += 1
        self.path.rename(f"{self.path}-{i}")
        self.print(f"{self.path}: contained an older run, which is now {self.path}-{i}")

    def save(self, state: TrainingState) -> None:
        """Write last.pth, and then the files that are derived from it."""
        write_file(self.path / "last.pth", to_bytes(state.state_dict()))
        self.write_derived_files(state)

    def write_derived_files(self, state: TrainingState) -> None:
        """Write best.pth, history.csv and epoch_N.pth, which last.pth contains."""
        write_file(self.path / "best.pth", to_bytes(state.best))
        if state.history:
            write_csv(self.path / "history.csv", COLUMNS, state.history)
        done, every = state.epoch - 1, state.args.save_every
        if every and done and done % every == 0 and state.epoch_step == 0:
            write_file(self.path / f"epoch_{done}.pth", to_bytes(weights_of(state.ema)))

    def print(self, line: str) -> None:
        """Print a line at once, also into a file or a pipe, and above the progress bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def show_progress(self, state: TrainingState, bar: tqdm) -> None:
        """Show loss and ETA of the whole run in the progress bar; print a first estimate."""
        bar.set_postfix_str(f"loss {state.mean_loss:.6f}, run ends in {state.eta}")
        if state.global_step == FIRST_ESTIMATE_STEP and not state.args.minutes:
            self.print(f"estimated time to the end of the run: {state.eta}")

    def print_summary(self, state: TrainingState, batches: Batches, pairs: list[Pair]) -> None:
        """Print what will be trained, on what, and how long."""
        args, model, patches = state.args, state.model, batches.patches
        num_parameters = sum(p.numel() for p in model.parameters())
        length = f"{state.total_steps:,} steps, {len(batches):,} in an epoch"
        if args.minutes:
            length = f"{args.minutes:g} minutes"
        precision = f"bfloat16 for {state.bf16:.0%} of the run" if state.bf16 else "float32"
        if args.bf16 and not state.bf16:
            precision = "float32 (bfloat16 is not faster on this device)"
        self.print(
            f"network     {model.architecture}, filters {'-'.join(map(str, model.filters))}, "
            f"{num_parameters:,} parameters, x{args.scale}"
        )
        self.print(
            f"training    {args.optimizer}, learning rate {args.lr:g}, {args.schedule} schedule, "
            f"{length} of {count_of(batches.batch_size, 'patch')}"
        )
        self.print(f"device      {batches.device}, {torch.get_num_threads()} threads, {precision}")
        self.print(
            f"patches     {len(patches):,} of {' x '.join(map(str, patches.patch_shape))}, "
            f"{patches.nbytes / 1e6:,.0f} MB {'from disk' if batches.stream else 'in memory'}"
        )
        evaluation = "none; best.pth will have the last weights"
        if pairs:
            self.baseline = f"bicubic {state.data['bicubic_psnr']:.2f} dB"
            evaluation = f"{count_of(len(pairs), 'image')}, {self.baseline}"
            if args.init not in INITS and not args.resume:
                evaluation += f", {args.init} {state.best_psnr:.2f} dB"
        self.print(f"evaluation  {evaluation}")
        if state.data["num_ignored"]:
            ignored = count_of(state.data["num_ignored"], "image")
            self.print(f"ignoring    {ignored} too small or with infinite bicubic PSNR")
        if state.finished:
            self.print("this run is finished; a longer --num-epochs, --steps, --minutes extends it")

    def print_evaluation(self, state: TrainingState) -> None:
        """Print the last row of the history, and send it to TensorBoard."""
        row, epochs, psnr = state.history[-1], "", ""
        if not state.args.minutes:
            epochs = f"/{math.ceil(state.total_steps / state.steps_per_epoch)}"
        if row["psnr"] is not None:
            psnr = f"PSNR {row['psnr']:.2f} dB (best {state.best_psnr:.2f})  "
        self.print(
            f"epoch {row['epoch']}{epochs}  step {row['step']:,}  loss {row['loss']:.6f}  {psnr}"
            f"lr {row['learning_rate']:.1e}  {row['seconds']:.0f} s  ETA {state.eta}"
        )
        if self.writer:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()

    def print_result(self, state: TrainingState) -> None:
        """Print where the weights are, how good they are, and how to use them."""
        score = "the last weights"
        if state.best_psnr is not None:
            score = f"{state.best_psnr:.2f} dB ({self.baseline})"
        self.print(f"{self.path / 'best.pth'}: {score}")
        self.print(f"try it: python test.py IMAGE --weights-file {self.path / 'best.pth'}")


class NoOutput:
    """Takes the place of RunFolder on the other ranks: its methods do nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *args: None


def to_bytes(content: dict) -> bytes:
    """Return what torch.save would write to a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weights_of(model: SRCNN) -> dict[str, torch.Tensor]:
    """Return a copy of the plain state dict, on the CPU and in the default memory layout.

    `model.info` goes into its `_metadata`, which other programs ignore.
    """
    state = model.state_dict()
    for name, value in state.items():
        state[name] = value.detach().cpu().clone().contiguous()
    state._metadata["srcnn"] = model.info
    return state


def load_checkpoint(path: Path) -> dict:
    """Return the content of a last.pth.

    Raises:
        InputError: a file of another program or version.
    """
    with open_input(path, "checkpoint", "pass a last.pth of train.py, or train without --resume"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] != CHECKPOINT_VERSION:
            raise InputError("is of another version of train.py; start from its weights by --init")
        return checkpoint


# --- processes and signals ------------------------------------------------------------------


class StopSignal:
    """Remembers Ctrl-C, SIGTERM or SIGHUP until the step is done; a second one ends at once.

    received: the signal that this process received, or 0.
    signum: the signal at which all ranks stop, or 0; sync_ranks sets it if there are several.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size, self.received, self.signum = world_size, 0, 0
        set_signal_handlers(self.remember)

    def remember(self, signum: int, frame: object) -> None:
        self.received = signum
        if self.world_size == 1:
            self.signum = signum
        set_signal_handlers(raise_exit)


def sync_ranks(state: TrainingState, stop: StopSignal) -> None:
    """Give all ranks the same clock, stop signal and mean loss; check that the loss is finite.

    All ranks must leave the loop at the same step. During training this is the only collective
    besides DDP's. It is called every SYNC_EVERY steps, after an epoch, and after an evaluation.

    Raises:
        InputError: on all ranks, if the loss is not finite; the files remain those of before.
    """
    state.seconds = time.perf_counter() - state.started
    if state.world_size > 1:
        latest = torch.tensor((state.seconds, stop.received), device=state.loss_sum.device)
        dist.all_reduce(latest, dist.ReduceOp.MAX)
        state.seconds, stop.signum = latest[0].item(), int(latest[1])
        # The mean of the ranks' sums stays right when each rank adds its further losses to it.
        dist.all_reduce(state.loss_sum)
        state.loss_sum /= state.world_size
    if not math.isfinite(state.mean_loss):
        raise InputError(
            f"--lr: the loss is not finite in epoch {state.epoch} at a learning rate of "
            f"{state.max_lr:.2g}; try a lower --lr or a longer --warmup"
        )


def init_processes(device: torch.device) -> tuple[int, int]:
    """Join torchrun's other processes, if there are any; return rank and world size."""
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, rank, world_size = next(dist.rendezvous("env://"))
        # After a restart torchrun's store still has the addresses of the killed processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        # The other ranks wait while rank 0 evaluates, however long that takes.
        group = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=timedelta(days=1), **group)
    except Exception as error:
        raise InputError(
            "RANK, WORLD_SIZE, MASTER_ADDR: form no process group; start several with torchrun"
        ) from error
    return rank, world_size


def bf16_is_faster(device: torch.device) -> bool:
    """Return whether the device is a CPU with bfloat16 instructions.

    Others emulate it, and on a GPU these small layers wait for autocast's conversions: an H200
    made 3,581 patches/s with it and 6,674 without.
    """
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch 2.6 to 2.13
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(check() for check in checks if check)


# --- arguments ------------------------------------------------------------------------------

# A resumed run may change its length, where it runs, where its data is and what it writes.
LENGTH_FLAGS = {"num_epochs", "minutes", "steps"}
RESUMABLE_FLAGS = LENGTH_FLAGS | {"resume", "auto_resume", "train_file", "eval_file", "device"}
RESUMABLE_FLAGS |= {"num_workers", "stream", "outputs_dir", "save_every", "tensorboard"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train-file", nargs="+", metavar="FILE", help="h5 files of prepare.py")
    add("--eval-file", nargs="+", metavar="FILE", help="h5 files of prepare.py --eval")
    add("--scale", type=number(int, 1, 65), default=3, help="(default: 3)")
    add("--batch-size", type=number(int, 1), default=16, help="of all ranks together (default: 16)")
    add("--augment", action=on_off, default=True, help="flip and rotate (default: on)")
    add("--seed", type=number(int, 0, 1 << 32), default=123, help="(default: 123)")

    group = parser.add_argument_group("recipe")
    add = group.add_argument
    recipes = "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items())
    add("--recipe", choices=tuple(RECIPES), default="adam", help=f"other defaults: {recipes}")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--num-epochs", type=number(int, 1), help=f"(default: {NUM_EPOCHS})")
    length.add_argument("--steps", type=number(int, 1), help="length in steps instead")
    length.add_argument("--minutes", type=number(float, 1e-3), help="length in minutes instead")
    add("--optimizer", choices=tuple(LEARNING_RATES), default="adam", help="(default: adam)")
    add("--lr", type=number(float, 0), help=f"learning rate (default: {LEARNING_RATES})")
    add("--last-layer-lr", type=number(float, 0), default=0.1, help="factor of --lr (default: 0.1)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="(default: cosine)")
    add("--warmup", type=number(int, 0), default=100, help="steps (default: 100)")
    add(
        "--ema", type=number(float, 0, 1), default=0.999, help="EMA decay of the weights; 0: no EMA"
    )
    add("--symmetry", type=int, choices=(1, 4), default=1, help="4: tie filters under rotations")
    add(
        "--bf16",
        type=number(float, 0, 1.01),
        nargs="?",
        const=0.7,
        default=0.0,
        help="fraction of training that runs in bfloat16 (default 0.7 when given without a value)",
    )

    add = parser.add_argument_group("network").add_argument
    add("--filters", type=number(int, 1, 4097), nargs="+", default=[64, 32], metavar="N")
    add("--kernel-sizes", type=number(int, 1, 100), nargs="+", default=[9, 5, 5], metavar="K")
    add("--init", default="identity", help=f"{', '.join(INITS)}, or a weights file to fine-tune")

    add = parser.add_argument_group("output").add_argument
    add("--outputs-dir", default="outputs", help="(default: outputs)")
    add("--resume", nargs="?", const="", metavar="FILE", help="(default: outputs-dir/xS/last.pth)")
    add("--auto-resume", action="store_true", help="resume outputs-dir/xS/last.pth if it exists")
    add("--eval-every", type=number(int, 1), metavar="N", help="steps between evaluations")
    add("--save-every", type=number(int, 0), default=0, metavar="N", help="also keep epoch_N.pth")
    add("--tensorboard", action="store_true", help="also write TensorBoard files")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if available)")
    add("--stream", action=on_off, help="read patches from disk (default: if they exceed 2 GB)")
    add("--num-workers", type=number(int, 0), default=8, help="processes that do so (default: 8)")
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the arguments, and the checkpoint if the run is resumed.

    Typed flags override the checkpoint's, and those override the defaults.
    """
    parser = get_args_parser()
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults))  # so that flags that were not typed are None
    typed = {n: value for n, value in vars(parser.parse_args(argv)).items() if value is not None}
    args = defaults | RECIPES[typed.get("recipe", "adam")] | typed
    path = Path(args["resume"] or Path(args["outputs_dir"], f"x{args['scale']}", "last.pth"))
    is_resumed = args["resume"] is not None or (args["auto_resume"] and path.exists())
    if not is_resumed:
        if args["train_file"] is None:
            parser.error("the following arguments are required: --train-file")
        if args["lr"] is None:
            args["lr"] = LEARNING_RATES[args["optimizer"]]
        return argparse.Namespace(**args), None
    if args["resume"] and "outputs_dir" in typed:
        raise InputError("--outputs-dir: a resumed run writes beside its checkpoint; drop the flag")
    checkpoint = load_checkpoint(path)
    saved = checkpoint["args"]
    for name, value in typed.items():
        if name not in RESUMABLE_FLAGS and saved.get(name, defaults[name]) != value:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise InputError(f"{flag}: {path} was trained with {saved.get(name)}; drop the flag")
    if LENGTH_FLAGS & typed.keys():  # one replaces the other
        saved = saved | dict.fromkeys(LENGTH_FLAGS)
    return argparse.Namespace(**defaults | saved | typed | {"resume": str(path)}), checkpoint


def main(args: argparse.Namespace, checkpoint: dict | None = None) -> int:
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True  # all batches of an epoch have one shape
    rank, world_size = init_processes(device)
    status = train(args, device, checkpoint, rank, world_size)
    if world_size > 1:
        dist.barrier()  # gloo's threads release tensors during it, for which they need the GIL
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run(lambda: main(*parse_args()))
