"""test.py --export: the network as an ONNX file, run by onnxruntime."""

import sys

import onnxruntime
import pytest
import torch
from conftest import ROOT, refused, tree

from models import SRCNN


def run_onnx(path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["sr"], {"ilr": x.numpy()})[0])


@pytest.mark.parametrize("size", [(1, 1), (5, 37), (64, 33)])
@pytest.mark.parametrize(("channels", "kernels"), [(1, (9, 5, 5)), (3, (5, 3, 1, 5))])
def test_onnxruntime_gives_what_the_network_gives(call, tmp_path, channels, kernels, size):
    torch.manual_seed(3)
    model = SRCNN(channels, (8, 6, 4)[: len(kernels) - 1], kernels, init="default")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    argv = "--scale", 2, "--weights-file", tmp_path / "w.pth"
    result = call("test", "--export", tmp_path / "x.onnx", *argv)
    assert (result.status, result.err) == (0, "")
    x = torch.rand(2, channels, *size)
    restored = run_onnx(tmp_path / "x.onnx", x)
    with torch.no_grad():
        torch.testing.assert_close(restored, model(x), atol=1e-5, rtol=0)


def test_the_file_says_what_it_is(call, tmp_path):
    assert call("test", "--export", tmp_path / "x.onnx", "--scale", 4).status == 0
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    says = session.get_modelmeta().custom_metadata_map
    assert (says["names"], says["scale"], says["channels"]) == ("ilr, sr", "4", "1")
    assert says["kernel_sizes"] == "9-5-5"
    assert "luma" in says["input"] and "bicubic" in says["input"]
    assert [end.shape for end in session.get_inputs()] == [["N", 1, "H", "W"]]


def test_without_the_package_a_line_says_so(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = call("test", "--export", tmp_path / "x.onnx", "--scale", 3)
    assert refused(result, "--export", "pip install onnx")
    assert not tree(tmp_path)


@pytest.mark.parametrize("flag", ["--eval", "--half", "--self-ensemble"])
def test_flags_that_an_export_cannot_follow_are_refused(call, tmp_path, flag):
    assert refused(call("test", "--export", tmp_path / "x.onnx", flag), flag, "--export")
    assert not tree(tmp_path)


def test_the_weights_are_not_overwritten(call):
    path = ROOT / "weights" / "srcnn_x3.pth"
    before = path.read_bytes()
    assert refused(call("test", "--export", path, "--scale", 3), "would overwrite")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("network", "kernels"), [("9-1-5", "9-1-5"), ("rgb", "9-5-5")])
def test_the_networks_of_this_repository_are_chosen_by_name(call, tmp_path, network, kernels):
    argv = "--network", network, "--scale", 3
    assert call("test", "--export", tmp_path / "x.onnx", *argv).status == 0
    says = onnxruntime.InferenceSession(tmp_path / "x.onnx").get_modelmeta().custom_metadata_map
    assert (says["kernel_sizes"], says["channels"]) == (kernels, "3" if network == "rgb" else "1")
    other = call("test", "--export", tmp_path / "y.onnx", *argv, "--weights-file", "w.pth")
    assert refused(other, "--network", "--weights-file")
    assert refused(call("test", *argv[:2], "--scale", 7), "--scale 7", "there are weights for")
