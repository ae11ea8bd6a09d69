"""Images, real or synthetic, to h5 files; and the download of the data sets."""

import functools
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import DATA, needs_data, noise, refused, resizing_matrix, tree
from PIL import Image

import prepare
from utils import InputError, bicubic_pair, quantize


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with a colour image of 50 x 41, a greyscale one of 36 x 36 and a tiny one."""
    folder = tmp_path / "images"
    folder.mkdir()
    colour = noise(41, 50, 3).astype(np.uint8)
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(noise(36, 36).astype(np.uint8)).save(folder / "grey.bmp")
    Image.fromarray(noise(8, 9).astype(np.uint8)).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def rounded_luma(path: Path) -> np.ndarray:
    """Return the luma of an image by the formula; of a greyscale image its values."""
    image = Image.open(path)
    values = np.asarray(image, np.float64)
    if image.mode == "L":
        return values
    return np.floor(16 + values @ [65.481, 128.553, 24.966] / 255 + 0.5)


# --- h5 files -------------------------------------------------------------------------------


def test_training_file_has_the_layout_of_the_forks(call, images, tmp_path):
    out = tmp_path / "train.h5"
    result = call("prepare", "--images-dir", images, "--output-path", out, "--scale", 3)
    assert (result.status, result.out) == (0, f"{out}: 3 patches for x3\n")
    assert f"{images / 'tiny.png'}: skipped" in result.err
    hr = rounded_luma(images / "colour.png")[:39, :48]
    expected = [hr[:33, :33], hr[:33, 14:47], rounded_luma(images / "grey.bmp")[:33, :33]]
    with h5py.File(out) as file:
        assert file["lr"].shape == file["hr"].shape == (3, 33, 33)
        assert file["lr"].dtype == file["hr"].dtype == np.float32
        assert np.array_equal(file["hr"], expected)
        ilr = bicubic_pair(hr.astype(np.float32), 3).ilr
        assert np.array_equal(file["lr"][1], ilr[:33, 14:47])
        assert not np.array_equal(file["lr"], quantize(np.asarray(file["lr"])))
        assert file["lr"].maxshape[0] is None
        attributes = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
    assert attributes == {
        "scale": 3,
        "patch_size": 33,
        "stride": 14,
        "degradation": "bicubic",
        "range": [0, 255],
        "bit_depth": 8,
        "rounding": 1,
        "version": 1,
    }


def test_evaluation_file_has_whole_images_in_groups(call, images, tmp_path):
    out = tmp_path / "eval.h5"
    argv = ["--images-dir", images, "--output-path", out, "--scale", 4, "--eval"]
    assert call("prepare", *argv).status == 0
    with h5py.File(out) as file:
        assert list(file["lr"]) == list(file["hr"]) == ["0", "1", "2"]
        hr = rounded_luma(images / "colour.png")[:40, :48]
        assert np.array_equal(file["hr/0"], hr)
        assert np.array_equal(file["lr/0"], bicubic_pair(hr.astype(np.float32), 4).ilr)
        assert file["lr/0"].dtype == np.float32
        assert file.attrs["rounding"] == 1


def test_num_channels_3_writes_rgb(call, images, tmp_path):
    argv = ["--images-dir", images, "--scale", 2, "--num-channels", 3, "--output-path"]
    call("prepare", *argv, tmp_path / "train.h5")
    call("prepare", *argv, tmp_path / "eval.h5", "--eval")
    rgb = np.asarray(Image.open(images / "colour.png")).transpose(2, 0, 1)[:, :40]
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["hr"].shape[1:] == (3, 33, 33)
        assert np.array_equal(file["hr"][1], rgb[:, :33, 14:47])
    with h5py.File(tmp_path / "eval.h5") as file:
        assert np.array_equal(file["hr/0"], rgb)


def test_shrink_adds_patches_of_downscaled_copies(call, images, tmp_path):
    (images / "grey.bmp").unlink()
    argv = ["--images-dir", images, "--scale", 2, "--patch-size", 20, "--stride", 50]
    argv += ["--output-path", tmp_path / "t.h5", "--shrink", 0.6, 0.5, 0.1]
    assert call("prepare", *argv).status == 0
    with h5py.File(tmp_path / "t.h5") as file:
        patches = np.asarray(file["hr"])
    colour = Image.open(images / "colour.png")
    copies = [colour, *(colour.resize(s, Image.Resampling.BICUBIC) for s in ((30, 25), (25, 20)))]
    for i, copy in enumerate(copies):
        copy.save(tmp_path / "copy.png")
        assert np.array_equal(patches[i], rounded_luma(tmp_path / "copy.png")[:20, :20])
    assert len(patches) == 3


def test_unreadable_images_are_reported_and_the_others_are_used(call, images, tmp_path):
    (images / "tiny.png").unlink()
    out, argv = tmp_path / "out.h5", ["--images-dir", images, "--scale", 3]
    assert call("prepare", *argv, "--output-path", tmp_path / "good.h5").status == 0
    content = (images / "colour.png").read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    (images / "empty.png").write_bytes(b"")
    result = call("prepare", *argv, "--output-path", out)
    assert (result.status, result.out) == (2, f"{out}: 3 patches for x3\n")
    errors = result.err.splitlines()
    assert len(errors) == 2
    for line, name in zip(errors, ("empty.png", "truncated.png")):
        assert line.startswith(f"prepare.py: error: {images / name}: not a valid image")
    assert out.read_bytes() == (tmp_path / "good.h5").read_bytes()


def test_bad_input_is_one_line_and_changes_nothing(call, images, tmp_path):
    out = tmp_path / "out.h5"
    out.write_bytes(b"old")
    for name in ("empty", "broken", "tiny"):
        (tmp_path / name).mkdir()
    content = (images / "colour.png").read_bytes()
    (tmp_path / "broken" / "b.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "tiny" / "t.png").write_bytes((images / "tiny.png").read_bytes())
    before = tree(tmp_path)
    base = ["--output-path", out, "--images-dir"]
    assert refused(call("prepare", *base, tmp_path / "no", "--scale", 3), "no such folder")
    assert refused(call("prepare", *base, tmp_path / "empty", "--scale", 3), "empty")
    broken = call("prepare", *base, tmp_path / "broken", "--scale", 3)
    assert refused(broken, str(tmp_path / "broken" / "b.png"))
    for scale in (1, 0, -2, 2.5, "x"):
        assert refused(call("prepare", *base, images, "--scale", scale), "--scale")
    assert refused(call("prepare", *base, images, "--scale", 2, "--stride", 0), "--stride")
    assert refused(call("prepare", *base, images), "--scale")
    assert refused(call("prepare", "--images-dir", images, "--scale", 2), "--output-path")
    assert refused(call("prepare", "--scale", 2), "--images-dir")
    tiny = call("prepare", *base, tmp_path / "tiny", "--scale", 3)
    assert tiny.status == 2
    assert tiny.err.splitlines()[-1].startswith("prepare.py: error: --patch-size, --scale: ")
    assert tree(tmp_path) == before


def test_names_of_held_out_images_are_printed_and_stored(call, tmp_path, weights):
    for i, folder in enumerate(("a/day1", "a/day2", "b/day1", "b/day2")):
        (tmp_path / folder).mkdir(parents=True)
        for j in range(3):
            values = noise(40, 40, seed=10 * i + j).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / folder / f"img_{j}.v1.png")
    out, folders = tmp_path / "t.h5", (tmp_path / "a", tmp_path / "b")
    argv = "--images-dir", *folders, "--output-path", out, "--scale", 2, "--hold-out", 0.4
    lines = call("prepare", *argv).out.splitlines()
    with h5py.File(tmp_path / "t_eval.h5") as file:
        names = [file["hr"][str(i)].attrs["name"] for i in range(len(file["hr"]))]
        images = [np.asarray(file["hr"][str(i)]) for i in range(len(names))]
        assert [dataset.attrs["name"] for dataset in file["lr"].values()] == names
        assert not any(dataset.attrs["greyscale"] != 1 for dataset in file["hr"].values())
    assert len(names) == len(set(names)) == 5
    assert f"held out: {', '.join(names)}" in lines
    for name, image in zip(names, images):  # relative to the folder above both
        assert np.array_equal(Image.open(tmp_path / f"{name}.png"), image)
    argv = "--eval", tmp_path / "t_eval.h5", "--scale", 2, "--weights-file", weights
    table = call("test", *argv).out.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == names


@pytest.mark.parametrize("num_channels", [1, 3])
def test_evaluation_file_stores_which_images_are_greyscale(call, images, tmp_path, num_channels):
    argv = "--images-dir", images, "--output-path", tmp_path / "e.h5", "--eval", "--scale", 2
    assert call("prepare", *argv, "--num-channels", num_channels).status == 0
    with h5py.File(tmp_path / "e.h5") as file:
        attrs = [file["hr"][str(i)].attrs for i in range(3)]
        assert [a["name"] for a in attrs] == ["colour", "grey", "tiny"]
        assert [bool(a["greyscale"]) for a in attrs] == [False, True, True]


def test_range_and_bit_depth_are_stored(call, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        values = (noise(40, 40, seed=i) * (4095 / 255)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "in" / f"{i}.png")
    argv = "--images-dir", tmp_path / "in", "--output-path", tmp_path / "t.h5", "--scale", 2
    for flags, expected in ((), [0, 65535]), (("--range", 0, 4095), [0, 4095]):
        result = call("prepare", *argv, *flags, "--hold-out", 0.5)
        assert result.status == 0
        lines = result.err.splitlines()
        assert len(lines) == (0 if flags else 2)
        assert all("--range 0 4095" in line for line in lines)
        for name in "t.h5", "t_eval.h5":
            with h5py.File(tmp_path / name) as file:
                assert file.attrs["range"].tolist() == expected
                assert file.attrs["bit_depth"] == 16
                assert file.attrs["rounding"] == pytest.approx(255 / expected[1])


def test_images_of_different_bit_depths_are_refused(call, images, tmp_path):
    deep = (noise(40, 40) * 257).astype(np.uint16)
    Image.fromarray(deep).save(images / "deep.png")
    argv = "--images-dir", images, "--output-path", tmp_path / "t.h5", "--scale", 2
    for flags in (), ("--eval",):
        result = call("prepare", *argv, *flags)
        assert refused(result, str(images / "deep.png"), "16", "8")
        assert not (tmp_path / "t.h5").exists()


# --- JPEG -----------------------------------------------------------------------------------


def jpeg_pair(hr: np.ndarray, scale: int, quality: int, to_levels: Callable) -> np.ndarray:
    """Return what the network gets for an HR image, in float64: 8 bits, JPEG, then bicubic.

    Args:
        hr: H x W or H x W x 3, a multiple of the scale.
        to_levels: what makes the levels of H x W (x 3) values, as H x W or 3 x H x W.
    """
    height, width = hr.shape[:2]
    down = [resizing_matrix(side, side // scale) for side in (height, width)]
    planes = np.atleast_3d(hr).transpose(2, 0, 1)
    lr = np.clip(np.floor(down[0] @ planes @ down[1].T + 0.5), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(lr.transpose(1, 2, 0).squeeze()).save(buffer, "JPEG", quality=quality)
    levels = to_levels(np.asarray(Image.open(buffer), np.float64))
    up = [resizing_matrix(side // scale, side) for side in (height, width)]
    return up[0] @ levels @ up[1].T


def luma_levels(values: np.ndarray) -> np.ndarray:
    """Return the rounded luma of H x W x 3; greyscale is its own luma."""
    if values.ndim == 2:
        return values
    return np.floor(16 + values @ [65.481, 128.553, 24.966] / 255 + 0.5)


def rgb_levels(values: np.ndarray) -> np.ndarray:
    """Return 3 x H x W of H x W x 3 or of H x W."""
    return values.transpose(2, 0, 1) if values.ndim == 3 else np.stack([values] * 3)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 75, 100])
def test_lr_images_are_those_of_pillows_jpeg(call, photo, tmp_path, num_channels, quality):
    (tmp_path / "in").mkdir()
    sources = {"colour": photo[:100], "grey": photo[:50, :, 1]}
    for name, values in sources.items():
        Image.fromarray(values).save(tmp_path / "in" / f"{name}.png")
    argv = ["--images-dir", tmp_path / "in", "--scale", 3, "--num-channels", num_channels]
    argv += ["--jpeg", quality, quality, "--output-path"]
    assert call("prepare", *argv, tmp_path / "e.h5", "--eval")[::2] == (0, "")
    assert call("prepare", *argv, tmp_path / "t.h5", "--stride", 99)[::2] == (0, "")
    to_levels = luma_levels if num_channels == 1 else rgb_levels
    with h5py.File(tmp_path / "e.h5") as file, h5py.File(tmp_path / "t.h5") as patches:
        for i, values in enumerate(sources.values()):
            hr = values[: len(values) // 3 * 3]
            expected = jpeg_pair(hr, 3, quality, to_levels)
            assert np.array_equal(file[f"hr/{i}"], to_levels(hr.astype(np.float64)))
            assert np.abs(file[f"lr/{i}"] - expected).max() < 1e-3
            assert np.array_equal(patches["lr"][i], file[f"lr/{i}"][..., :33, :33])
        for attributes in file.attrs, patches.attrs:
            assert attributes["degradation"] == "jpeg"
            assert attributes["jpeg"].tolist() == [quality, quality]


@pytest.fixture
def qualities(call, photo, tmp_path) -> Callable[..., list[int]]:
    """Run prepare.py --jpeg 20 45 on photographs; return the quality of each pair in a file."""
    (tmp_path / "in").mkdir()
    image = Image.fromarray(photo[:72, :72])
    for i in range(4):
        image.save(tmp_path / "in" / f"{i}.png")
    candidates: dict[int, dict[int, np.ndarray]] = {}

    def nearest(ilr: np.ndarray) -> int:
        """Return the quality whose result begins with these levels."""
        side = len(ilr)
        if side not in candidates:
            copy = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
            candidates[side] = {
                quality: jpeg_pair(copy, 3, quality, luma_levels) for quality in range(1, 101)
            }
        errors = {q: np.abs(c - ilr).max() for q, c in candidates[side].items()}
        assert min(errors.values()) < 1e-3
        return min(errors, key=errors.get)

    def qualities(*flags: object, name: str = "o.h5") -> list[int]:
        argv = ["--images-dir", tmp_path / "in", "--scale", 3, "--output-path", tmp_path / "o.h5"]
        assert call("prepare", *argv, "--jpeg", 20, 45, *flags).status == 0
        with h5py.File(tmp_path / name) as file:
            return [nearest(np.asarray(file[f"lr/{i}"])) for i in range(len(file["lr"]))]

    return qualities


def test_qualities_are_random_in_the_range_and_follow_from_the_seed(qualities):
    first = qualities("--eval")
    assert len(first) == 4 and len(set(first)) > 1
    assert all(20 <= quality <= 45 for quality in first)
    assert qualities("--eval") == first
    assert qualities("--eval", "--seed", 1) != first


def test_copies_of_an_image_have_their_own_qualities(qualities):
    values = qualities("--eval", "--shrink", 0.75, 0.5)
    assert len(values) == 12
    assert all(20 <= quality <= 45 for quality in values)
    copies = [set(values[i : i + 3]) for i in range(0, 12, 3)]
    assert sum(len(c) > 1 for c in copies) >= 3


def test_held_out_images_have_jpeg_lr_images(qualities, tmp_path):
    held_out = qualities("--hold-out", 0.5, name="o_eval.h5")
    assert len(held_out) == 2 and all(20 <= quality <= 45 for quality in held_out)
    for name in "o.h5", "o_eval.h5":
        with h5py.File(tmp_path / name) as file:
            assert file.attrs["degradation"] == "jpeg"
            assert file.attrs["jpeg"].tolist() == [20, 45]


def test_synthetic_images_are_saved_as_jpeg(call, tmp_path):
    def make(name: str, *flags: object) -> np.ndarray:
        argv = "--synthetic", 2, "--eval", "--scale", 3, "--output-path", tmp_path / name
        assert call("prepare", *argv, *flags).status == 0
        with h5py.File(tmp_path / name) as file:
            return np.stack([[file[f"{kind}/{i}"] for i in (0, 1)] for kind in ("lr", "hr")])

    (lr, hr), (jpeg_lr, jpeg_hr) = make("a.h5"), make("b.h5", "--jpeg", 30, 40)
    assert np.array_equal(hr, jpeg_hr)
    assert np.abs(lr - jpeg_lr).mean() > 1
    image = np.asarray(prepare.dead_leaves(1_000_000))[:255, :255]
    errors = [np.abs(jpeg_pair(image, 3, q, luma_levels) - jpeg_lr[0]).max() for q in range(30, 41)]
    assert min(errors) < 1e-3
    assert np.array_equal(make("c.h5", "--jpeg", 30, 40), [jpeg_lr, jpeg_hr])


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 4080), (np.uint8, 51)])
def test_jpeg_of_images_with_a_range_has_their_brightness(call, tmp_path, photo, dtype, white):
    (tmp_path / "in").mkdir()
    levels = photo[..., 1] // 5 * 5  # whole grey levels are whole values in both ranges
    values = (levels * (white / 255)).round().astype(dtype)
    Image.fromarray(values).save(tmp_path / "in" / "a.png")
    argv = "--images-dir", tmp_path / "in", "--range", 0, white, "--output-path", tmp_path / "e.h5"
    assert call("prepare", *argv, "--eval", "--scale", 3, "--jpeg", 90, 90).status == 0
    with h5py.File(tmp_path / "e.h5") as file:
        assert np.abs(file["hr/0"] - levels.astype(float)).max() < 1e-3
        assert np.abs(file["lr/0"] - jpeg_pair(levels, 3, 90, luma_levels)).max() < 1e-3


def test_jpeg_with_unusable_flags_is_refused(call, images, tmp_path):
    argv = "--images-dir", images, "--output-path", tmp_path / "t.h5", "--scale", 2, "--jpeg"
    for values in (60, 30), (0, 30), (30, 101), (30.5, 60), (30,):
        assert refused(call("prepare", *argv, *values), "--jpeg")
    assert refused(call("prepare", *argv, 30, 60, "--lr-dir", images), "--lr-dir", "--jpeg")
    assert not (tmp_path / "t.h5").exists()


# --- synthetic images -----------------------------------------------------------------------


def test_synthetic_images_follow_from_the_seed(call, tmp_path):
    def make(name: str, *more: object) -> bytes:
        argv = ["--synthetic", 2, "--output-path", tmp_path / name, "--scale", 3]
        assert call("prepare", *argv, *more).status == 0
        with h5py.File(tmp_path / name) as file:
            return np.asarray(file["hr/0"] if "--eval" in more else file["hr"]).tobytes()

    assert make("a", "--eval") == make("b", "--eval")
    assert make("a", "--eval") != make("c", "--eval", "--seed", 1)
    assert make("d", "--stride", 100) == make("e", "--stride", 100)


def test_dead_leaves_have_edges_and_flat_areas_of_all_sizes():
    rgb = np.asarray(prepare.dead_leaves(0)).astype(float).transpose(2, 0, 1)
    assert rgb.shape == (3, 256, 256)
    gradients = np.abs(np.diff(rgb.mean(axis=0), axis=1))
    assert 0.3 < (gradients < 1).mean() < 0.95  # flat inside of discs
    assert (gradients > 20).mean() > 0.02  # edges between them
    assert prepare.dead_leaves(0) != prepare.dead_leaves(1)
    # The power spectrum falls about as in photographs: far more in low frequencies.
    power = np.abs(np.fft.rfft2(rgb.mean(axis=0) - rgb.mean())) ** 2
    assert power[1:9, 1:9].mean() > 30 * power[33:65, 33:65].mean()


def test_an_image_that_is_skipped_does_not_decide_the_bit_depth_of_the_others(call, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "in" / "a.png")
    Image.fromarray(noise(60, 60).astype(np.uint8)).save(tmp_path / "in" / "b.png")
    argv = "--images-dir", tmp_path / "in", "--scale", 2, "--output-path", tmp_path / "x.h5"
    result = call("prepare", *argv)
    assert result.status == 0, result.err
    assert (
        result.err == f"{tmp_path / 'in' / 'a.png'}: skipped, smaller than a patch or the scale\n"
    )
    with h5py.File(tmp_path / "x.h5") as file:
        assert file.attrs["bit_depth"] == 8


# --- download -------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path, monkeypatch) -> tuple[dict, bytes]:
    """Generated images by name, which become the manifest, and an archive with other names."""
    files = {}
    for i, name in enumerate(("T91/t1.bmp", "Set5/head_GT.bmp", "Set14/man.bmp")):
        buffer = io.BytesIO()
        Image.fromarray(noise(20, 20, seed=i).astype(np.uint8)).save(buffer, "BMP")
        files[name] = buffer.getvalue()
    manifest = tmp_path / "manifest"
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest.write_text("".join(f"{d}  {name}\n" for name, d in digests.items()))
    monkeypatch.setattr(prepare, "MANIFEST", manifest)
    return (files, zipped({f"SRCNN/X/{i}.bmp": c for i, c in enumerate(files.values())}))


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path):
    """An HTTP server on localhost; yields the folder it serves and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_download_tries_the_next_source_after_a_failed_one(
    release, server, tmp_path, monkeypatch, capfd
):
    files, archive = release
    folder, url = server
    (folder / "corrupt.zip").write_bytes(archive[: len(archive) // 2])
    (folder / "good.zip").write_bytes(archive)
    sources = [f"{url}/{name}" for name in ("missing.zip", "corrupt.zip", "good.zip")]
    monkeypatch.setattr(prepare, "SOURCES", sources)
    prepare.download(tmp_path / "data")
    assert tree(tmp_path / "data") == files
    err = capfd.readouterr().err
    assert "missing.zip" in err
    assert err.count("trying the next source") == 2


def test_a_second_download_fetches_only_missing_and_damaged_files(
    release, server, tmp_path, monkeypatch
):
    files, _ = release
    folder, url = server
    names = list(files)
    target = tmp_path / "data"
    (folder / "part.zip").write_bytes(zipped({"a": files[names[0]]}))
    monkeypatch.setattr(prepare, "SOURCES", [f"{url}/part.zip"])
    with pytest.raises(InputError, match="2 files are missing") as error:
        prepare.download(target)
    assert "--archive" in str(error.value)
    assert tree(target) == {names[0]: files[names[0]]}
    (target / names[0]).write_bytes(b"damaged")
    (folder / "part.zip").write_bytes(zipped({n: files[n] for n in names}))
    prepare.download(target)
    assert tree(target) == files
    monkeypatch.setattr(prepare, "SOURCES", ["http://127.0.0.1:1/never.zip"])
    prepare.download(target)


def test_names_in_an_archive_cannot_lead_out_of_the_folder(release, tmp_path):
    files, _ = release
    evil = {f"../../{i}.bmp": content for i, content in enumerate(files.values())}
    (tmp_path / "evil.zip").write_bytes(zipped({**evil, "/etc/evil": b"evil", "../e": b"e"}))
    before = set(tree(tmp_path))
    prepare.download(tmp_path / "in" / "data", str(tmp_path / "evil.zip"))
    assert tree(tmp_path / "in" / "data") == files
    assert set(tree(tmp_path)) - before == {f"in/data/{name}" for name in files}


def test_a_local_archive_that_is_missing_or_corrupt_is_refused(call, release, tmp_path):
    _, archive = release
    bad = tmp_path / "bad.zip"
    for content in (b"", b"text", archive[:-40], archive[:60] + b"\0" * 9 + archive[69:]):
        bad.write_bytes(content)
        argv = ["--download", tmp_path / "data", "--archive", bad]
        assert refused(call("prepare", *argv), "bad.zip")
    argv[-1] = tmp_path / "no.zip"
    assert refused(call("prepare", *argv), "no.zip: no such zip file")
    assert refused(call("prepare", *argv[2:], "--synthetic", 1), "--download")
    assert not (tmp_path / "data").exists()


def test_the_manifest_lists_every_file_of_the_three_sets(tmp_path):
    names = list(prepare.missing_files(tmp_path))
    counts = [sum(name.startswith(f"{s}/") for name in names) for s in ("T91", "Set5", "Set14")]
    assert counts == [91, 5, 14]


@needs_data
def test_the_manifest_matches_the_real_files():
    assert prepare.missing_files(DATA) == {}
