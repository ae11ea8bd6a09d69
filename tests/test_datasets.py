"""h5 files to batches: checks, order, both paths, several files, workers, ranks."""

import multiprocessing
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import noise
from torch.utils.data import DataLoader

from datasets import Batches, H5Patches, check_train_file, read_eval_pairs, symmetries
from utils import InputError

CPU = torch.device("cpu")


def write(path: Path, lr: object, hr: object, **attributes: object) -> Path:
    """A training file of arrays, or an evaluation file of lists of arrays."""
    with h5py.File(path, "w") as file:
        for name, content in ("lr", lr), ("hr", hr):
            if isinstance(content, list):
                group = file.create_group(name)
                for i, picture in enumerate(content):
                    group[str(i)] = picture
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


def identities(epoch: object) -> list[list[int]]:
    """The patches of each batch, read off their values."""
    return [(lr[:, 0, 0, 0] * 255).round().int().tolist() for lr, _ in epoch]


def test_indices_run_through_several_files_in_any_order(numbered):
    patches = H5Patches(numbered, 3, 0)
    wanted = [40, 3, 29, 30, 3, 0, 12]
    lr, hr = patches.__getitems__(wanted)
    assert lr.shape == (7, 1, 5, 5)
    assert lr[:, 0, 2, 2].tolist() == wanted
    assert (hr - lr == 100).all()


def test_an_epoch_takes_each_patch_at_most_once_in_a_new_order(numbered):
    source = batches(numbered)
    first, second = (identities(source.epoch(n)) for n in (1, 2))
    assert [len(batch) for batch in first] == [8] * 5 == [8] * len(source)
    assert len({i for batch in first for i in batch}) == 40
    assert first != second
    assert first == identities(source.epoch(1))
    assert first != identities(batches(numbered, seed=2).epoch(1))


def test_an_epoch_can_be_entered_in_the_middle(numbered):
    source = batches(numbered)
    whole, rest = list(source.epoch(1)), list(source.epoch(1, first=3))
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_of_the_device(tmp_path, workers):
    lr, hr = noise(50, 9, 9), noise(50, 9, 9, seed=1)
    path = write(tmp_path / "t.h5", lr, hr)
    resident = batches([path], crop=2, stream=False)
    streamed = batches([path], crop=2, stream=True, num_workers=workers)
    for epoch in (1, 2):
        pairs = zip(resident.epoch(epoch), streamed.epoch(epoch), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert ours[1].shape[-1] == 5


def test_patches_are_streamed_only_where_they_do_not_fit(numbered, monkeypatch):
    assert not batches(numbered).stream
    monkeypatch.setattr("datasets.available_memory", lambda: 41 * 25 * 2 * 4)
    assert batches(numbered).stream


def test_augmentation_turns_lr_and_hr_alike_in_all_eight_ways(tmp_path):
    base = noise(6, 6)
    path = write(tmp_path / "t.h5", np.stack([base] * 64), np.stack([base] * 64))
    ways = [np.rot90(f, k) for k in range(4) for f in (base, np.fliplr(base))]
    seen = set()
    for lr, hr in batches([path], 64).epoch(1):
        assert torch.equal(lr, hr)
        for patch in lr[:, 0].numpy() * 255:
            (match,) = [i for i, way in enumerate(ways) if np.allclose(patch, way, atol=1e-3)]
            seen.add(match)
    assert seen == set(range(8))
    for lr, _ in batches([path], 64, augment=False).epoch(1):
        assert np.allclose(lr[:, 0] * 255, base, atol=1e-3)
    assert len({tuple(row.tolist()) for row in symmetries(3)}) == 8


def test_ranks_share_every_batch_without_overlap(numbered):
    ranks = [identities(batches(numbered, rank=r, world_size=2).epoch(3)) for r in (0, 1)]
    alone = identities(batches(numbered).epoch(3))
    for a, b, whole in zip(*ranks, alone, strict=True):
        assert len(a) == len(b) == 4
        assert sorted(a + b) == sorted(whole)


def test_a_file_opened_here_can_be_read_by_a_spawned_worker(numbered):
    patches = H5Patches(numbered, 3, 0)
    patches.__getitems__([0])
    loader = DataLoader(
        patches,
        batch_sampler=[[1, 35], [2, 3]],
        num_workers=1,
        collate_fn=tuple,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    assert [lr[:, 0, 0, 0].tolist() for lr, _ in loader] == [[1, 35], [2, 3]]


def test_three_channels_keep_their_places(tmp_path):
    values = noise(10, 3, 7, 7)
    path = write(tmp_path / "rgb.h5", values, values)
    lr, _ = next(batches([path], 10, augment=False).epoch(1))
    order = np.argsort(lr[:, 0, 0, 0].numpy())
    expected = values[np.argsort(values[:, 0, 0, 0])] / 255
    assert np.allclose(lr[order.tolist()], expected)
    assert H5Patches([path], 3, 0).patch_shape == (3, 7, 7)


good = noise(4, 33, 33)
spoiled = good.copy()
spoiled[3, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("lr", "hr", "attributes", "words"),
    [
        (None, good, {}, "holds no 'lr'"),
        (good, None, {}, "holds no 'hr'"),
        (good, good[:3], {}, "not both the same"),
        (good[:0], good[:0], {}, "holds no patch"),
        (good[..., :16, :16], good[..., :16, :16], {}, "--patch-size 17"),
        (good[..., :30], good[..., :30], {}, "not both the same"),
        (good, good, {"scale": 2}, "made for --scale 2, not 3"),
        ([good[0]], [good[0]], {}, "no training file"),
        (spoiled, good, {}, "'lr' holds NaN"),
        (good, spoiled, {}, "'hr' holds NaN"),
    ],
)
def test_a_bad_training_file_is_refused(tmp_path, lr, hr, attributes, words):
    path = write(tmp_path / "bad.h5", lr, hr, **attributes)
    with pytest.raises(InputError, match=words) as error:
        Batches(H5Patches([path], 3, 8), 2, 1, CPU, stream=False)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("lr", "hr", "attributes", "words"),
    [
        (None, [good[0]], {}, "holds no 'lr'"),
        ([], [], {}, "0 pictures"),
        ([good[0]], [good[0], good[1]], {}, "1 pictures and 'hr' 2"),
        ([good[0]], [good[0][:30]], {}, "differs in shape"),
        ([good[0]], [good[0]], {"scale": 4}, "made for --scale 4"),
        (good, good, {}, "no evaluation file"),
        ([spoiled[3]], [good[3]], {}, "NaN"),
    ],
)
def test_a_bad_evaluation_file_is_refused(tmp_path, lr, hr, attributes, words):
    path = write(tmp_path / "bad.h5", lr, hr, **attributes)
    with pytest.raises(InputError, match=words) as error:
        read_eval_pairs(path, 3)
    assert str(path) in str(error.value)


def test_missing_truncated_and_other_files_are_refused(tmp_path):
    path = write(tmp_path / "whole.h5", good, good)
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no such h5 file"):
        check_train_file(tmp_path / "missing.h5", 3, 8)
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="truncated"):
            check_train_file(path, 3, 8)


def test_files_of_different_patches_do_not_go_together(tmp_path):
    paths = [
        write(tmp_path / "a.h5", good, good),
        write(tmp_path / "b.h5", good[..., :32, :32], good[..., :32, :32]),
    ]
    with pytest.raises(InputError, match="b.h5"):
        H5Patches(paths, 3, 8)


def test_evaluation_pictures_come_in_numerical_order(tmp_path):
    pictures = [np.full((4, 5), i, np.float32) for i in range(12)]
    path = write(tmp_path / "e.h5", pictures, pictures)
    assert [pair.hr[0, 0] for pair in read_eval_pairs(path)[0]] == list(range(12))
