"""--dataset Folder: the user's own images through every script."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import COLOURS, killed, run_script, write_images

import gen_gmm
from utils.checkpoints import load_mixtures, load_model
from utils.images import list_images, read_images
from utils.out_data import load_out

DATA = "--dataset Folder --data_dir images --image_size 8"


def refusal(command, capsys):
    """The last line of what a command that is refused says."""
    with pytest.raises(SystemExit) as stopped:
        run_script(command)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    write_images(folder / "images" / "train", 100, COLOURS, 0)
    write_images(folder / "images" / "test", 10, COLOURS, 1)
    write_images(folder / "other", 12, {"grey": (128, 128, 128)}, 2, mode="L")
    (folder / "images" / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script(f"gen_gmm.py {DATA} --PCA 1 --n 5")
        run_script(f"run_training.py {DATA} --train_type plain --augm_flag 1 --epochs 2 --arch LeNet")
        run_script(f"run_training.py {DATA} --train_type CEDA_GMM --use_gmm 1 --PCA 1 --fit_out 1 --n 5 --epochs 2 "
                   "--arch LeNet")
    return folder


@pytest.fixture
def in_folder(folder_run, monkeypatch):
    monkeypatch.chdir(folder_run)
    return folder_run


def test_models_take_shape_and_classes_from_the_folder(in_folder):
    for label in ("Base", "CCU"):
        model = load_model(f"checkpoints/Folder/{label}.pt")
        assert model.spec["base_model"] == {"arch": "LeNet", "channels": 3, "size": 8, "classes": 3}
        assert model.meta["class_names"] == ["blue", "green", "red"]
        assert model.meta["test_error"] < 15        # three colours; CCU is uniform, and so wrong, on outliers
    shades = torch.tensor(list(COLOURS.values())).view(3, 3, 1, 1) / 255
    base = load_model("checkpoints/Folder/Base.pt")
    assert base(shades.expand(3, 3, 8, 8)).argmax(1).tolist() == [0, 1, 2]     # labels go by the folders' names


def test_tables(in_folder, capsys):
    run_script(f"gen_eval.py {DATA} --ood grey=other --output results/t2")
    run_script("gen_attack_stats.py --datasets Folder --data_dir images --image_size 8 --fit_out 1 --steps 5 "
               "--restarts 1 --batches 1 --batch_size 10 --wide_format 1 --output results/t1")
    table2 = pd.read_csv("results/t2.csv", index_col=0, header=[0, 1])
    assert {"Patches", "Noise", "Uniform", "grey"} <= set(table2.index)
    assert table2.loc["Uniform", ("CCU", "MMC")] < 34        # 1/3 far away
    table1 = pd.read_csv("results/t1.csv", index_col=[0, 1])
    assert table1.loc[("Folder", "TE"), "Base"] == 0
    assert table1.loc[("Folder", "MMC"), "CCU"] <= 1.1 / 3 * 100
    assert "1 of 301 images cannot be read" not in capsys.readouterr().err       # which is a training image


def test_a_broken_image_is_named_and_left_out(in_folder, capsys):
    run_script(f"gen_gmm.py {DATA} --PCA 0 --n 3")
    captured = capsys.readouterr()
    assert "1 of 301 images cannot be read and are left out: images/train/red/broken.png" in captured.err
    assert "per image of 300" in captured.out


def test_a_link_that_leads_nowhere_is_named_and_left_out(tmp_path, capsys):
    write_images(tmp_path, 2, {"red": COLOURS["red"]}, 0)
    (tmp_path / "red" / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "red" / "loop.png").symlink_to(tmp_path / "red" / "loop.png")
    images, kept = read_images(list_images(tmp_path), 3, 8)
    assert kept.tolist() == [True, True, False, False] and len(images) == 2
    assert "2 of 4 images cannot be read and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("command, culprit", [
    ("gen_eval.py --dataset Folder --data_dir images --image_size 12", "--image_size 8"),
    ("gen_eval.py --dataset Folder --data_dir other", "other/train is not there"),
    ("run_training.py --dataset Folder --data_dir images --image_size 12 --train_type CEDA_GMM --use_gmm 1 --n 5",
     "--image_size"),
    ("run_training.py --dataset Folder --data_dir images --image_size 10 --train_type plain", "no multiple of 4"),
    ("load_pretrained.py --dataset Folder --pretrained x.pt", "Folder"),
    *((f"{script} {DATA} --out_dataset Folder --out_dir images{part}", "has images of the in-distribution")
      for script in ("gen_gmm.py", "run_training.py --train_type CEDA") for part in ("", "/train", "/test/red")),
])
def test_what_does_not_fit_is_named(in_folder, capsys, command, culprit):
    assert culprit in refusal(command, capsys)


def test_a_model_of_other_classes_is_refused(in_folder, capsys, tmp_path):
    names = dict(zip(("cars", "ships", "trains"), COLOURS.values(), strict=True))
    for split in ("train", "test"):
        write_images(tmp_path / split, 2, names, 0)
    said = refusal(f"gen_eval.py --dataset Folder --data_dir {tmp_path} --image_size 8", capsys)
    assert "trained on the classes blue, green, red, not on cars, ships, trains" in said


def test_a_class_without_a_readable_image_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, 2, COLOURS, 0)
    for path in (tmp_path / "images/train/green").iterdir():
        path.write_bytes(b"no image")
    said = refusal(f"run_training.py {DATA} --train_type plain", capsys)
    assert "no image of images/train/green can be read" in said


def test_test_images_without_class_folders_are_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images" / "train", 2, COLOURS, 0)
    write_images(tmp_path / "images", 2, {"test": (0, 0, 0)}, 1)
    assert "images/test has no class folders" in refusal(f"run_training.py {DATA} --train_type plain", capsys)


def test_mixtures_of_another_image_size_are_fitted_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images" / "train", 8, COLOURS, 0)
    write_images(tmp_path / "images" / "test", 2, COLOURS, 1)
    monkeypatch.setattr(gen_gmm, "load_out", lambda *args, **options: load_out(*args, **options | {"n": 60}))
    for size, seen in ((8, 192), (8, 192), (12, 432)):
        run_script(f"gen_gmm.py --dataset Folder --data_dir images --image_size {size} --PCA 0 --n 2 --resume 1")
        assert load_mixtures("checkpoints/Folder/gmm/euclidean_n2_Photos.pt", "")[0].metric.dim == seen


def test_mixtures_of_another_folder_are_not_taken_for_ones_own(tmp_path, monkeypatch, capsys):
    """Both have as many images of the same shape and the same classes."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("images", "others")):
        write_images(tmp_path / name / "train", 8, COLOURS, seed)
        write_images(tmp_path / name / "test", 2, COLOURS, seed)
    monkeypatch.setattr(gen_gmm, "load_out", lambda *args, **options: load_out(*args, **options | {"n": 60}))
    fit = "gen_gmm.py --dataset Folder --data_dir {} --image_size 8 --PCA 0 --n 2 --resume 1"
    train = f"run_training.py {DATA} --train_type CEDA_GMM --fit_out 1 --PCA 0 --n 2 --epochs 1 --arch LeNet"
    means = []
    for name, there in (("images", False), ("images", True), ("others", False)):
        run_script(fit.format(name))
        assert ("is there" in capsys.readouterr().out) == there
        means.append(load_mixtures("checkpoints/Folder/gmm/euclidean_n2_Photos.pt", "")[0].mu)
    assert torch.equal(means[0], means[1]) and not torch.equal(means[1], means[2])
    run_script(fit.format(tmp_path / "others"))             # another spelling
    assert "is there" in capsys.readouterr().out
    assert "fitted with data_dir others, not images" in refusal(train, capsys)


def test_few_images_for_the_metric_are_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images" / "train", 8, COLOURS, 0)
    write_images(tmp_path / "images" / "test", 2, COLOURS, 1)
    run_script(f"gen_gmm.py {DATA} --PCA 1 --n 2")
    assert "24 images span no more than 23 directions" in capsys.readouterr().err


def test_other_images_do_not_continue_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, 4, COLOURS, 0)
    command = f"run_training.py {DATA} --train_type plain --epochs 1 --arch LeNet"
    killed(monkeypatch, run_script, command)
    photo = next((tmp_path / "images/train/red").iterdir())
    photo.rename("photo")
    assert "made with images of " in refusal(command + " --resume 1", capsys)
    (tmp_path / "photo").rename(photo)
    pixels = photo.read_bytes()
    shutil.copy(next((tmp_path / "images/test/blue").iterdir()), photo)     # as many as before
    assert "made with images of " in refusal(command + " --resume 1", capsys)
    photo.write_bytes(pixels)
    for split in ("train", "test"):         # its label would be another
        (tmp_path / "images" / split / "red").rename(tmp_path / "images" / split / "a red")
    assert "made with class_names ['blue', 'green', 'red']" in refusal(command + " --resume 1", capsys)


def test_other_out_images_do_not_continue_a_run(tmp_path, monkeypatch, capsys):
    """However many photos there are, as many crops are cut of them."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, 4, COLOURS, 0)
    write_images(tmp_path / "photos", 4, COLOURS, 1)
    out = f"{DATA} --out_dataset Folder --out_dir photos"
    fit = f"gen_gmm.py {out} --n 2 --resume 1"
    train = f"run_training.py {out} --train_type CEDA --epochs 1 --arch LeNet"
    run_script(fit)
    killed(monkeypatch, run_script, train)
    run_script(fit)
    assert "is there" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "photos")
    write_images(tmp_path / "photos", 4, COLOURS, 2)
    run_script(fit)
    assert "is there" not in capsys.readouterr().out
    assert "made with images of " in refusal(train + " --resume 1", capsys)
