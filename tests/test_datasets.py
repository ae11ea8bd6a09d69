"""Batches from h5 files: checks, order, memory or streaming, several files, workers, ranks."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import noise, refused
from torch.utils.data import DataLoader

from datasets import Batches, H5Patches, read_eval_pairs, square_symmetries
from utils import InputError

CPU = torch.device("cpu")


def write(path: Path, lr: object, hr: object, **attributes: object) -> Path:
    """Write a training file of arrays, or an evaluation file of lists of arrays."""
    with h5py.File(path, "w") as file:
        for name, content in ("lr", lr), ("hr", hr):
            if isinstance(content, list):
                group = file.create_group(name)
                for i, image in enumerate(content):
                    group[str(i)] = image
            elif content is not None:
                file[name] = content
        file.attrs.update(attributes)
    return path


@pytest.fixture
def numbered(tmp_path) -> list[Path]:
    """Two files of 30 and 11 patches; every pixel of patch i has the value i."""
    values = np.arange(41, dtype=np.float32)[:, None, None] * np.ones((1, 5, 5), np.float32)
    return [
        write(tmp_path / "a.h5", values[:30], values[:30] + 100, scale=3),
        write(tmp_path / "b.h5", values[30:], values[30:] + 100),
    ]


def batches(paths: list[Path], size: int = 8, seed: int = 1, **kwargs: object) -> Batches:
    return Batches(H5Patches(paths, 3, 0), size, seed, CPU, **kwargs)


def patch_numbers(epoch: Iterable) -> list[list[int]]:
    """Return the numbers of the patches of each batch of `numbered`, read from their values."""
    return [(ilr[:, 0, 0, 0] * 255).round().int().tolist() for ilr, _ in epoch]


# --- batches --------------------------------------------------------------------------------


def test_indices_run_through_several_files_in_any_order(numbered):
    patches = H5Patches(numbered, 3, 0)
    indices = [40, 3, 29, 30, 3, 0, 12]
    ilr, hr = patches.__getitems__(indices)
    assert patches.starts == [0, 30, 41]
    assert ilr.shape == (7, 1, 5, 5)
    assert ilr[:, 0, 2, 2].tolist() == indices
    assert (hr - ilr == 100).all()


def test_an_epoch_has_each_patch_at_most_once_in_a_new_order(numbered):
    source = batches(numbered)
    first, second = (patch_numbers(source.epoch(n)) for n in (1, 2))
    assert [len(batch) for batch in first] == [8] * 5 == [8] * len(source)
    assert len({i for batch in first for i in batch}) == 40
    assert first != second
    assert first == patch_numbers(source.epoch(1))
    assert first != patch_numbers(batches(numbered, seed=2).epoch(1))


def test_an_epoch_can_start_in_the_middle(numbered):
    source = batches(numbered)
    whole, rest = list(source.epoch(1)), list(source.epoch(1, first=3))
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_those_in_memory(tmp_path, workers):
    ilr, hr = noise(50, 9, 9), noise(50, 9, 9, seed=1)
    path = write(tmp_path / "t.h5", ilr, hr)
    resident = batches([path], crop=2, stream=False)
    streamed = batches([path], crop=2, stream=True, num_workers=workers)
    for epoch in (1, 2):
        pairs = zip(resident.epoch(epoch), streamed.epoch(epoch), strict=True)
        for expected, batch in pairs:
            assert torch.equal(expected[0], batch[0])
            assert torch.equal(expected[1], batch[1])
            assert expected[1].shape[-1] == 5


def test_patches_are_streamed_only_if_they_exceed_the_limit(numbered, monkeypatch):
    num_bytes = 2 * 4 * 41 * 25
    monkeypatch.setattr("datasets.MAX_RESIDENT_BYTES", num_bytes)
    assert not batches(numbered).stream
    monkeypatch.setattr("datasets.MAX_RESIDENT_BYTES", num_bytes - 1)
    assert batches(numbered).stream
    assert not batches(numbered, stream=False).stream


def test_augmentation_transforms_lr_and_hr_equally_in_all_eight_ways(tmp_path):
    base = noise(6, 6)
    path = write(tmp_path / "t.h5", np.stack([base] * 64), np.stack([base] * 64))
    views = [np.rot90(f, k) for k in range(4) for f in (base, np.fliplr(base))]
    seen = set()
    for ilr, hr in batches([path], 64).epoch(1):
        assert torch.equal(ilr, hr)
        for patch in ilr[:, 0].numpy() * 255:
            (match,) = [i for i, view in enumerate(views) if np.allclose(patch, view, atol=1e-3)]
            seen.add(match)
    assert seen == set(range(8))
    for ilr, _ in batches([path], 64, augment=False).epoch(1):
        assert np.allclose(ilr[:, 0] * 255, base, atol=1e-3)
    assert len({tuple(row.tolist()) for row in square_symmetries(3)}) == 8


def test_ranks_share_every_batch_without_overlap(numbered):
    ranks = [patch_numbers(batches(numbered, rank=r, world_size=2).epoch(3)) for r in (0, 1)]
    alone = patch_numbers(batches(numbered).epoch(3))
    for a, b, whole in zip(*ranks, alone, strict=True):
        assert len(a) == len(b) == 4
        assert sorted(a + b) == sorted(whole)


def test_a_file_that_is_open_here_can_be_read_by_a_spawned_worker(numbered):
    patches = H5Patches(numbered, 3, 0)
    patches.__getitems__([0])
    loader = DataLoader(
        patches,
        batch_sampler=[[1, 35], [2, 3]],
        num_workers=1,
        collate_fn=tuple,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    assert [ilr[:, 0, 0, 0].tolist() for ilr, _ in loader] == [[1, 35], [2, 3]]


def test_three_channels_keep_their_order(tmp_path):
    values = noise(10, 3, 7, 7)
    path = write(tmp_path / "rgb.h5", values, values)
    ilr, _ = next(batches([path], 10, augment=False).epoch(1))
    order = np.argsort(ilr[:, 0, 0, 0].numpy())
    expected = values[np.argsort(values[:, 0, 0, 0])] / 255
    assert np.allclose(ilr[order.tolist()], expected)
    assert H5Patches([path], 3, 0).patch_shape == (3, 7, 7)


# --- unusable files -------------------------------------------------------------------------

GOOD = noise(4, 33, 33)
NAN = GOOD.copy()
NAN[3, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("lr", "hr", "attributes", "words"),
    [
        (None, GOOD, {}, "not a valid h5 file .*'lr'"),
        (GOOD, None, {}, "not a valid h5 file .*'hr'"),
        (GOOD, GOOD[:3], {}, "not both N x P x P"),
        (GOOD[:0], GOOD[:0], {}, r"'lr' is \(0, 33, 33\)"),
        (GOOD[..., :16, :16], GOOD[..., :16, :16], {}, "--patch-size 17"),
        (GOOD[..., :30], GOOD[..., :30], {}, "not both N x P x P"),
        (GOOD, GOOD, {"scale": 2}, "made for --scale 2, not 3"),
        ([GOOD[0]], [GOOD[0]], {}, "not a training file.* without --eval"),
        (NAN, GOOD, {}, "'lr' contains NaN"),
        (GOOD, NAN, {}, "'hr' contains NaN"),
    ],
)
def test_an_unusable_training_file_is_refused(tmp_path, lr, hr, attributes, words):
    path = write(tmp_path / "bad.h5", lr, hr, **attributes)
    with pytest.raises(InputError, match=words) as error:
        Batches(H5Patches([path], 3, 8), 2, 1, CPU, stream=False)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_patch_is_reported_while_streaming_and_ends_the_workers(tmp_path, workers):
    path = write(tmp_path / "bad.h5", NAN, GOOD)
    with pytest.raises(InputError, match=r"bad.h5: 'lr' contains NaN") as error:
        list(batches([path], 2, stream=True, num_workers=workers).epoch(1))
    remaining = multiprocessing.active_children()
    for worker in remaining:  # otherwise this process would wait for them at its end
        worker.kill()
    assert not remaining
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lr", "hr", "attributes", "words"),
    [
        (None, [GOOD[0]], {}, "not a valid h5 file .*'lr'"),
        ([], [], {}, "0 images"),
        ([GOOD[0]], [GOOD[0], GOOD[1]], {}, "'lr' has 1 images, 'hr' 2"),
        ([GOOD[0]], [GOOD[0][:30]], {}, "image '0' differs in shape"),
        ([GOOD[0]], [GOOD[0]], {"scale": 4}, "made for --scale 4"),
        (GOOD, GOOD, {}, "not an? evaluation file.* with --eval"),
        ([NAN[3]], [GOOD[3]], {}, "'lr/0' contains NaN"),
    ],
)
def test_an_unusable_evaluation_file_is_refused(tmp_path, lr, hr, attributes, words):
    path = write(tmp_path / "bad.h5", lr, hr, **attributes)
    with pytest.raises(InputError, match=words) as error:
        read_eval_pairs(path, 3)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_and_truncated_files_and_those_of_other_formats_are_refused(tmp_path):
    path = write(tmp_path / "whole.h5", GOOD, GOOD)
    whole = path.read_bytes()
    with pytest.raises(InputError, match="missing.h5: no such h5 file"):
        H5Patches([tmp_path / "missing.h5"], 3, 8)
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="whole.h5: not a valid h5 file"):
            H5Patches([path], 3, 8)


def test_files_of_different_patch_sizes_cannot_be_combined(tmp_path):
    paths = [
        write(tmp_path / "a.h5", GOOD, GOOD),
        write(tmp_path / "b.h5", GOOD[..., :32, :32], GOOD[..., :32, :32]),
    ]
    with pytest.raises(InputError, match="b.h5"):
        H5Patches(paths, 3, 8)


# --- evaluation files -----------------------------------------------------------------------


def test_evaluation_images_are_in_numerical_order(tmp_path):
    images = [np.full((4, 5), i, np.float32) for i in range(12)]
    path = write(tmp_path / "e.h5", images, images, scale=3, rounding=0.5)
    pairs, attributes = read_eval_pairs(path)
    assert [pair.hr[0, 0] for pair in pairs] == list(range(12))
    assert {pair.quantum for pair in pairs} == {0.5}
    assert attributes["scale"] == 3


def test_evaluation_images_have_the_names_and_kinds_that_the_file_stores(tmp_path):
    rgb = noise(3, 4, 5)
    images = [np.repeat(rgb[:1], 3, axis=0), rgb, rgb[0]]
    path = write(tmp_path / "e.h5", images, images)
    with h5py.File(path, "r+") as file:
        file["hr/0"].attrs.update({"name": "day2/img_07", "greyscale": True})
    pairs = read_eval_pairs(path)[0]
    assert [pair.name for pair in pairs] == ["day2/img_07", "e.h5/1", "e.h5/2"]
    assert [pair.greyscale for pair in pairs] == [True, False, False]


# --- value ranges and degradations ----------------------------------------------------------

DARK = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32).repeat(17, 0)[:33].repeat(17, 1)[:, :33]


def read_both(tmp_path: Path, images: np.ndarray) -> list[Callable[[], object]]:
    """Write images as a training and as an evaluation file; return what reads the files."""
    train_path = write(tmp_path / "t.h5", images, images, scale=3)
    eval_path = write(tmp_path / "e.h5", list(images), list(images), scale=3)
    return [lambda: H5Patches([train_path], 3, 8), lambda: read_eval_pairs(eval_path, 3)]


@pytest.mark.parametrize("first", ["bright", "black"])
def test_values_in_0_to_1_are_refused(tmp_path, first):
    images = GOOD / 255
    if first == "black":
        images[0] = 0
    for read in read_both(tmp_path, images):
        with pytest.raises(InputError, match=r"h5: contains values in 0\.\.1 instead of 0\.\.255"):
            read()


def test_dark_images_among_others_are_accepted(tmp_path):
    for read in read_both(tmp_path, np.concatenate([DARK[None], GOOD])):
        read()


KINDS = {
    "degradation": ({"degradation": "bicubic"}, {"degradation": "pairs"}),
    "jpeg": ({"degradation": "jpeg", "jpeg": [30, 60]}, {"degradation": "jpeg", "jpeg": [30, 95]}),
    "range": ({"range": [0.0, 4095.0]}, {"range": [0.0, 65535.0]}),
    "bit_depth": ({"bit_depth": 8}, {"bit_depth": 16}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("before", [[], [{}], [{"scale": 3}]], ids=["alone", "fork", "scale"])
def test_training_files_of_different_kinds_cannot_be_combined(tmp_path, name, before):
    """Files of yjn870, which say nothing about themselves, combine with all others."""
    paths = [
        write(tmp_path / f"{i}.h5", GOOD, GOOD, **attributes)
        for i, attributes in enumerate([*before, *KINDS[name]])
    ]
    *equal, other = paths
    assert len(H5Patches([*equal, equal[-1]], 3, 8)) == 4 * len(paths)
    with pytest.raises(InputError, match=rf"{other.name}: has {name} "):
        H5Patches(paths, 3, 8)


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_file_of_another_kind_than_the_training_file_is_refused(call, tmp_path, name):
    first, second = KINDS[name]
    train_path = write(tmp_path / "t.h5", GOOD, GOOD, scale=3, **first)
    equal = write(tmp_path / "equal.h5", list(GOOD), list(GOOD[::-1]), scale=3, **first)
    unknown = write(tmp_path / "fork.h5", list(GOOD), list(GOOD[::-1]))
    other = write(tmp_path / "other.h5", list(GOOD), list(GOOD[::-1]), scale=3, **second)
    argv = "--train-file", train_path, "--outputs-dir", tmp_path / "out", "--steps", 1
    argv += "--filters", 2, 2, "--eval-file", equal, unknown
    assert refused(call("train", *argv, other), f"{other}: has {name} ")
    assert not (tmp_path / "out").exists()
    assert call("train", *argv).status == 0


def test_a_file_that_another_process_writes_is_reported_as_such(call, tmp_path):
    train_path = write(tmp_path / "t.h5", GOOD, GOOD, scale=3)
    eval_path = write(tmp_path / "e.h5", list(GOOD), list(GOOD), scale=3)
    code = "import h5py, sys; files = [h5py.File(p, 'r+') for p in sys.argv[1:]]; "
    code += "print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, train_path, eval_path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        train_argv = "--outputs-dir", tmp_path / "out", "--train-file", train_path
        results = call("train", *train_argv), call("test", "--eval", eval_path, "--scale", 3)
        writer.stdin.close()
    for result, path in zip(results, (train_path, eval_path)):
        assert refused(result, f"{path}: ", "open for writing in another process")
    assert len(H5Patches([train_path], 3, 8)) == len(read_eval_pairs(eval_path, 3)[0]) == 4
