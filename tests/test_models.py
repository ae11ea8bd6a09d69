"""The network, its initialisation, weights files, and tiles."""

import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise
from PIL import Image
from torch import nn

import models
from models import SRCNN, SelfEnsemble, back_projection_steps, load_srcnn, restore, shifted_sums
from utils import InputError


class ForkSRCNN(nn.Module):
    """The network of yjn870/SRCNN-pytorch: zero padding in every layer, the same names."""

    def __init__(self, num_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, 64, kernel_size=9, padding=4)
        self.conv2 = nn.Conv2d(64, 32, kernel_size=5, padding=2)
        self.conv3 = nn.Conv2d(32, num_channels, kernel_size=5, padding=2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.conv3(x)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- the network ----------------------------------------------------------------------------


def test_parameter_counts_are_the_papers():
    assert num_parameters(SRCNN()) == 57_281
    for kernel_sizes, weights in (((9, 1, 5), 8_032), ((9, 3, 5), 24_416), ((9, 5, 5), 57_184)):
        assert num_parameters(SRCNN(kernel_sizes=kernel_sizes)) == weights + 64 + 32 + 1


def test_layers_are_named_conv1_to_convn():
    model = SRCNN(filters=(64, 32, 16), kernel_sizes=(9, 1, 1, 5))
    names = [f"conv{i}.{part}" for i in range(1, 5) for part in ("weight", "bias")]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 33)])
def test_output_has_the_size_of_the_input(size):
    assert SRCNN()(torch.rand(2, 1, *size)).shape == (2, 1, *size)
    assert SRCNN(3)(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_edges_are_repeated_once_at_the_input_and_valid_does_not_pad():
    torch.manual_seed(0)
    model = SRCNN(init="default")
    x = torch.rand(1, 1, 21, 34)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), mode="edge")
    y = torch.from_numpy(padded).double()
    for i, layer in enumerate(model.layers):
        y = F.conv2d(F.relu(y) if i else y, layer.weight.double(), layer.bias.double())
    assert (model(x) - y).abs().max() < 1e-5
    assert model(x, valid=True).shape == (1, 1, 5, 18)
    assert (model(x, valid=True) - model(x)[..., 8:-8, 8:-8]).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_untrained_network_returns_its_input(channels):
    x = torch.rand(1, channels, 40, 40)
    assert (SRCNN(channels)(x) - x).abs().max() < 1e-3


def test_other_initialisations_are_the_papers_and_pytorchs():
    torch.manual_seed(0)
    gaussian = SRCNN(init="gaussian")
    assert all(layer.bias.count_nonzero() == 0 for layer in gaussian.layers)
    assert gaussian.conv2.weight.std().item() == pytest.approx(0.001, rel=0.02)
    torch.manual_seed(0)
    default = SRCNN(init="default").state_dict()
    torch.manual_seed(0)
    fork = ForkSRCNN().state_dict()
    assert all(torch.equal(default[name], fork[name]) for name in fork)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_sizes": (9, 5)},
        {"kernel_sizes": (9, 4, 5)},
        {"filters": (0, 32)},
        {"init": "zeros"},
    ],
)
def test_arguments_that_describe_no_network_are_refused(kwargs):
    with pytest.raises(ValueError):
        SRCNN(**kwargs)


# --- weights files --------------------------------------------------------------------------


def test_weights_are_interchangeable_with_the_fork(tmp_path):
    ours, fork = SRCNN(), ForkSRCNN()
    fork.load_state_dict(ours.state_dict())
    fork = ForkSRCNN()
    torch.save(fork.state_dict(), tmp_path / "fork.pth")
    x = torch.rand(1, 1, 40, 40)
    ours = load_srcnn(tmp_path / "fork.pth")
    assert (ours(x, valid=True) - fork(x)[..., 8:-8, 8:-8]).abs().max() < 1e-5


@pytest.mark.parametrize("key", ["model", "state_dict", "ema"])
def test_weights_inside_a_checkpoint_load_and_the_ema_is_preferred(tmp_path, key):
    model = SRCNN(3, (16, 8, 4), (9, 1, 1, 5))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    checkpoint = {"epoch": 3, key: state}
    if key == "ema":
        checkpoint["model"] = SRCNN(3).state_dict()
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    loaded = load_srcnn(tmp_path / "checkpoint.pth")
    x = torch.rand(1, 3, 20, 20)
    assert torch.equal(loaded(x), model(x))
    assert (loaded.num_channels, loaded.halo) == (3, 6)


TRAINING_DATA = {
    "bicubic": ((), {"degradation": "bicubic", "range": [0, 255], "bit_depth": 8}),
    "jpeg": (
        ("--jpeg", 30, 60),
        {"degradation": "jpeg", "jpeg": [30, 60], "range": [0, 255], "bit_depth": 8},
    ),
    "pairs": (
        ("--lr-dir", "LR", "--range", 0, 4095),
        {"degradation": "pairs", "range": [0, 4095], "bit_depth": 16},
    ),
}


@pytest.mark.parametrize("kind", TRAINING_DATA)
def test_weights_of_a_run_tell_what_they_were_trained_on(call, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    flags, expected = TRAINING_DATA[kind]
    white, dtype = (4095, np.uint16) if kind == "pairs" else (255, np.uint8)
    for folder, size in ("HR", 48), ("LR", 24):
        os.mkdir(folder)
        values = noise(size, size) * (white / 255)
        Image.fromarray(values.astype(dtype)).save(f"{folder}/a.png")
    argv = "--images-dir", "HR", "--output-path", "t.h5", "--scale", 2, "--stride", 15
    assert call("prepare", *argv, *flags).status == 0
    argv = "--train-file", "t.h5", "--scale", 2, "--outputs-dir", "out", "--save-every", 1
    assert call("train", *argv, "--num-epochs", 1).status == 0
    assert call("train", "--resume", "out/x2/last.pth", "--num-epochs", 2).status == 0
    expected = expected | {"scale": 2}
    for name in "best", "last", "epoch_1", "epoch_2":
        path = f"out/x2/{name}.pth"
        assert load_srcnn(path).info.items() >= expected.items(), name
        assert back_projection_steps(load_srcnn(path)) == (kind == "bicubic"), name
        state = torch.load(path, weights_only=True)
        state = state["ema"] if name == "last" else state
        assert state._metadata["srcnn"].items() >= expected.items()
        fork = ForkSRCNN()  # other programs ignore what the file tells
        fork.load_state_dict(state)
        assert all(torch.equal(weight, state[key]) for key, weight in fork.state_dict().items())


def test_weights_that_tell_nothing_count_as_bicubic(tmp_path):
    torch.save(ForkSRCNN().state_dict(), tmp_path / "fork.pth")
    torch.save(dict(ForkSRCNN().state_dict()), tmp_path / "dict.pth")
    for name in "fork.pth", "dict.pth":
        model = load_srcnn(tmp_path / name)
        assert model.info == {}
        assert back_projection_steps(model) == 1
        assert back_projection_steps(SelfEnsemble(model)) == 1


def state_with(name: str, value: torch.Tensor | None) -> dict:
    """Return a state dict in which one tensor is replaced, or missing."""
    state = SRCNN().state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    return state


@pytest.mark.parametrize(
    "content",
    [
        3,
        {},
        {"conv1.weight": torch.zeros(64, 1, 9, 9)},
        state_with("conv2.bias", None),
        state_with("conv2.weight", torch.zeros(32, 63, 5, 5)),
        state_with("conv1.weight", torch.zeros(64)),
        state_with("extra.weight", torch.zeros(3)),
    ],
)
def test_files_without_the_weights_of_srcnn_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: not a valid SRCNN weights file"):
        load_srcnn(tmp_path / "other.pth")


def test_weights_with_nan_are_refused(tmp_path):
    torch.save(state_with("conv2.bias", torch.full((32,), torch.nan)), tmp_path / "nan.pth")
    with pytest.raises(InputError, match="nan.pth: .*NaN"):
        load_srcnn(tmp_path / "nan.pth")


def test_missing_empty_and_truncated_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such SRCNN weights file"):
        load_srcnn(tmp_path / "missing.pth")
    torch.save(SRCNN().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 1, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "part.pth").write_bytes(content[:size])
        with pytest.raises(InputError, match="part.pth"):
            load_srcnn(tmp_path / "part.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path, zipped):
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "malicious.pth"
    if zipped:
        torch.save({"conv1.weight": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps({"conv1.weight": Payload()}))
    with pytest.raises(InputError, match="malicious.pth"):
        load_srcnn(path)
    assert not (tmp_path / "executed").exists()
    with suppress(RuntimeError):  # the payload works where it is not prevented
        torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


# --- tiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (5, 3), (47, 61)])
def test_tiles_give_the_same_image_as_one_pass(weights, tile, shape):
    model, ilr = load_srcnn(weights), noise(*shape)
    whole = model(torch.from_numpy(ilr)[None, None] / 255)[0, 0] * 255
    restored = restore(model, ilr, tile)
    assert np.abs(restored - whole.detach().numpy()).max() < 1e-3
    assert np.abs(restored - ilr).max() > 1  # the network changes its input


def recorded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that receives the output size of every tile."""
    sizes, predict = [], models.predict

    def recording_predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = predict(model, x)
        sizes.append(tuple(y.shape[2:]))
        return y

    monkeypatch.setattr(models, "predict", recording_predict)
    return sizes


def test_tiles_cover_every_pixel_once(weights, monkeypatch):
    model, sizes = load_srcnn(weights), recorded_sizes(monkeypatch)
    restore(model, noise(37, 101), 16)
    assert max(max(size) for size in sizes) <= 16
    assert sum(height * width for height, width in sizes) == 37 * 101


def test_discarded_rows_are_not_computed_and_change_no_other_row(weights, monkeypatch):
    model, ilr = load_srcnn(weights), noise(37, 20)
    whole, sizes = restore(model, ilr, 16), recorded_sizes(monkeypatch)
    part = restore(model, ilr, 16, discard=(9, 4))
    assert np.abs(part - whole)[9:-4].max() < 1e-3
    assert sum(height * width for height, width in sizes) == (37 - 9 - 4) * 20


def test_threads_share_the_tiles_and_their_number_remains(weights):
    model, ilr = load_srcnn(weights), noise(40, 40)
    torch.set_num_threads(1)
    expected = restore(model, ilr, 8)
    torch.set_num_threads(2)
    assert np.abs(restore(model, ilr, 8) - expected).max() < 1e-3
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("outputs", [1, 3])
def test_shifted_sums_are_a_convolution(outputs):
    layer, x = nn.Conv2d(6, outputs, 5), torch.randn(2, 6, 19, 14)
    expected = layer.double()(x.double())
    with torch.no_grad():
        assert (shifted_sums(layer.float(), x) - expected).abs().max() < 1e-5


def test_self_ensemble_is_the_mean_over_flips_and_rotations(weights):
    model, ilr = load_srcnn(weights), noise(24, 31)
    outputs = []
    for k in range(4):
        for flip in (np.asarray, np.fliplr):
            restored = restore(model, np.ascontiguousarray(np.rot90(flip(ilr), k)))
            outputs.append(flip(np.rot90(restored, -k)))
    assert np.abs(restore(SelfEnsemble(model), ilr) - np.mean(outputs, axis=0)).max() < 1e-3
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1
