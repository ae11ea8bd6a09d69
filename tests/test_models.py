"""The network, its initialisation, loading of weights, and tiles."""

import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise
from torch import nn

from models import SRCNN, SelfEnsemble, load_srcnn, restore, shifted_sums
from utils import InputError


class TheirSRCNN(nn.Module):
    """The forks' network: zero padding in every layer, the same names."""

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


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_papers():
    assert parameters(SRCNN()) == 57_281
    for kernel_sizes, weights in (((9, 1, 5), 8_032), ((9, 3, 5), 24_416), ((9, 5, 5), 57_184)):
        assert parameters(SRCNN(kernel_sizes=kernel_sizes)) == weights + 64 + 32 + 1


def test_layers_are_named_conv1_to_convn():
    model = SRCNN(filters=(64, 32, 16), kernel_sizes=(9, 1, 1, 5))
    names = [f"conv{i}.{part}" for i in range(1, 5) for part in ("weight", "bias")]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 33)])
def test_output_has_the_size_of_the_input(size):
    assert SRCNN()(torch.rand(2, 1, *size)).shape == (2, 1, *size)
    assert SRCNN(3)(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_padding_is_done_once_with_the_edge_and_valid_skips_it():
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
    theirs = TheirSRCNN().state_dict()
    assert all(torch.equal(default[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_sizes": (9, 5)},
        {"kernel_sizes": (9, 4, 5)},
        {"filters": (0, 32)},
        {"init": "zeros"},
    ],
)
def test_a_network_that_cannot_be_built_is_refused(kwargs):
    with pytest.raises(ValueError):
        SRCNN(**kwargs)


def test_weights_load_there_and_theirs_here(tmp_path):
    ours, theirs = SRCNN(), TheirSRCNN()
    theirs.load_state_dict(ours.state_dict())
    theirs = TheirSRCNN()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    x = torch.rand(1, 1, 40, 40)
    ours = load_srcnn(tmp_path / "theirs.pth")
    assert (ours(x, valid=True) - theirs(x)[..., 8:-8, 8:-8]).abs().max() < 1e-5


@pytest.mark.parametrize("wrap", ["model", "state_dict"])
def test_a_checkpoint_that_wraps_weights_loads(tmp_path, wrap):
    model = SRCNN(3, (16, 8, 4), (9, 1, 1, 5))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({wrap: state, "epoch": 3}, tmp_path / "checkpoint.pth")
    loaded = load_srcnn(tmp_path / "checkpoint.pth")
    x = torch.rand(1, 3, 20, 20)
    assert torch.equal(loaded(x), model(x))
    assert (loaded.num_channels, loaded.halo) == (3, 6)


def broken_state(name: str, value: torch.Tensor | None) -> dict:
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
        broken_state("conv2.bias", None),
        broken_state("conv2.weight", torch.zeros(32, 63, 5, 5)),
        broken_state("conv1.weight", torch.zeros(64)),
        broken_state("extra.weight", torch.zeros(3)),
    ],
)
def test_what_is_no_srcnn_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: .* no weights file"):
        load_srcnn(tmp_path / "other.pth")


def test_weights_with_nan_are_refused(tmp_path):
    torch.save(broken_state("conv2.bias", torch.full((32,), torch.nan)), tmp_path / "nan.pth")
    with pytest.raises(InputError, match="NaN"):
        load_srcnn(tmp_path / "nan.pth")


def test_missing_empty_and_truncated_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such weights file"):
        load_srcnn(tmp_path / "missing.pth")
    torch.save(SRCNN().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 1, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "part.pth").write_bytes(content[:size])
        with pytest.raises(InputError, match="part.pth"):
            load_srcnn(tmp_path / "part.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_code_does_not_run(tmp_path, zipped):
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
    with suppress(RuntimeError):  # the payload is a real one
        torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("tile", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (5, 3), (47, 61)])
def test_tiles_give_the_same_picture_as_one_pass(weights, tile, shape):
    model, ilr = load_srcnn(weights), noise(*shape)
    whole = model(torch.from_numpy(ilr)[None, None] / 255)[0, 0] * 255
    restored = restore(model, ilr, tile)
    assert np.abs(restored - whole.detach().numpy()).max() < 1e-3
    assert np.abs(restored - ilr).max() > 1  # the network does something


def test_tiles_cover_every_pixel_once(weights):
    model, sides = load_srcnn(weights), []
    model.register_forward_hook(lambda _, inputs, y: sides.append(y.shape[2:]))
    restore(model, noise(37, 101), 16)
    assert max(max(shape) for shape in sides) <= 16
    assert sum(height * width for height, width in sides) == 37 * 101


def test_restore_keeps_the_number_of_threads(weights):
    threads = torch.get_num_threads()
    restore(load_srcnn(weights), noise(40, 40), 8)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("outputs", [1, 3])
def test_shifted_sums_are_a_convolution(outputs):
    layer, x = nn.Conv2d(6, outputs, 5), torch.randn(2, 6, 19, 14)
    expected = layer.double()(x.double())
    with torch.no_grad():
        assert (shifted_sums(layer.float(), x) - expected).abs().max() < 1e-5


def test_self_ensemble_is_the_mean_over_flips_and_rotations(weights):
    model, ilr = load_srcnn(weights), noise(24, 31)
    ways = []
    for k in range(4):
        for flip in (np.asarray, np.fliplr):
            turned = restore(model, np.ascontiguousarray(np.rot90(flip(ilr), k)))
            ways.append(flip(np.rot90(turned, -k)))
    assert np.abs(restore(SelfEnsemble(model), ilr) - np.mean(ways, axis=0)).max() < 1e-3
    assert np.abs(ways[0] - ways[1]).max() > 0.1
