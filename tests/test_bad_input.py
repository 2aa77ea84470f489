"""What the user can mend, and what would do harm: refused with one line, before the work, with nothing written."""

import errno
import gzip
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, write_images
from PIL import Image

import utils.evaluation
from models import CCU, GMM, LeNet, Normalised, PCAMetric, Softmax
from utils import backups, checkpoints, cli, files, load_model, tables
from utils.data import load_in_dist, read_idx
from utils.errors import UserError
from utils.images import list_images, read_images
from utils.out_data import load_out

REPOSITORY = Path(__file__).parent.parent
BASE, CCU_PT, GMM_PT = (f"checkpoints/Digits/{name}" for name in ("Base.pt", "CCU.pt", "gmm/pca_n10_Photos.pt"))


# --- how bad files are made --------------------------------------------------------------------------------------

def put(path, content: bytes = b""):
    """A new file: the run's own files are links."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def folder(path):
    return lambda: Path(path).mkdir(parents=True)


def text(path, content="hello"):
    return lambda: put(path, content.encode())


def copy(source, target):
    def make():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).unlink(missing_ok=True)
        os.link(source, target)
    return make


def normalised(path):
    def make():
        base = checkpoints.load_model(path)
        checkpoints.save_model(Softmax(Normalised(base.base_model, [0.5], [0.5])), path, base.meta)
    return make


def damaged(path, how):
    def make():
        content = Path(path).read_bytes()
        middle = len(content) // 2      # within a tensor's numbers, where only a checksum tells
        put(path, {"cut": content[:middle], "flip": content[:900] + b"\xff" * 300 + content[1200:],
                   "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
                   "text": b"hello", "empty": b""}[how])
    return make


def saved(path, value):
    """`value`, or what it makes of the file that is there."""
    def make():
        new = value(torch.load(path, weights_only=True)) if callable(value) else value
        buffer = io.BytesIO()
        torch.save(new, buffer)
        put(path, buffer.getvalue())
    return make


def changed(path, *keys, **values):
    """A checkpoint in which [key][...] is updated by `values`; None deletes."""
    def change(checkpoint):
        part = checkpoint
        for key in keys:
            part = part[key]
        for name, value in values.items():
            name = name.replace("__", ".")
            if value is None:
                del part[name]
            else:
                part[name] = value(part[name]) if callable(value) else value
        return checkpoint
    return saved(path, change)


def idx(shape, body=None, kind=8):
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + \
        (bytes(np.prod(shape)) if body is None else body)


def mnist(part="train", folder="data/MNIST/raw", images=None, labels=None, gz=""):
    def make():
        for name, content in (("images-idx3", idx((20, 28, 28)) if images is None else images),
                              ("labels-idx1", idx((20,)) if labels is None else labels)):
            put(f"{folder}/{part}-{name}-ubyte{gz}", content)
    return make


def npy(header, body=b""):
    header = header.encode() + b" " * (117 - len(header)) + b"\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
    return lambda: put("data/300K_random_images.npy", start + header + body)


def npz(path):
    def make():
        buffer = io.BytesIO()
        np.savez(buffer, a=np.zeros(3))
        put(path, buffer.getvalue())
    return make


class Evil:
    """Creates the file `ran` when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def both(*makers):
    return lambda: [make() for make in makers]


TRAIN = "run_training.py --dataset Digits --train_type"
CCU_TRAIN = TRAIN + " CEDA_GMM --fit_out 1 --n 10"
EVAL = "gen_eval.py --dataset Digits"
ATTACK = "gen_attack_stats.py --datasets Digits --fit_out 1"
FIT = "gen_gmm.py --dataset Digits"
SEEDS = ATTACK + " --load_seeds seeds.pt"
NPY = TRAIN + " CEDA --out_dataset RandomImages300k"
LOAD = "load_pretrained.py --dataset MNIST --pretrained"


def seeds(value):
    return saved("seeds.pt", {"format": backups.ATTACK, "seeds": value})


# command, words of the one line, what makes the bad file
TABLE = [
    # options
    ("run_training.py --dataset MNITS --train_type plain", ["MNITS", "did you mean MNIST"]),
    (f"{TRAIN} plane", ["plane", "plain"]),
    (f"{TRAIN} plain --epochs 0", ["--epochs", "at least 1"]),
    (f"{TRAIN} plain --epochs 1e3", ["--epochs", "1e3", "integer"]),
    (f"{TRAIN} plain --epochs -3", ["--epochs", "at least 1"]),
    (f"{TRAIN} plain --epoch 3", ["--epoch", "did you mean --epochs"]),
    (f"{TRAIN} plain -epochs 3", ["-epochs", "did you mean --epochs"]),
    (f"{TRAIN} plain --batchsize=3", ["--batchsize", "did you mean --batch_size"]),
    (f"{TRAIN} plain --augm_flag maybe", ["maybe", "neither 0 nor 1"]),
    (f"{TRAIN} plain --augm_flag", ["--augm_flag", "expected one argument"]),
    (f"{TRAIN} plain --gmm_path {GMM_PT}", ["--gmm_path", "CEDA_GMM"]),
    (f"{TRAIN} MCD --warmstart 1", ["--warmstart", "MCD"]),
    (f"{TRAIN} plain --gpu 77", ["--gpu 77", "-1 for the CPU"]),
    (f"{TRAIN} plain --gpu -2", ["--gpu -2", "-1 for the CPU"]),
    (f"{TRAIN} plain --gpu cuda:0", ["--gpu", "cuda:0"]),
    (f"{TRAIN} plain --fit_out 1", ["--fit_out"]),
    (f"{TRAIN} plain --use_gmm 1", ["--use_gmm"]),
    (f"{TRAIN} CEDA_GMM --use_gmm 0", ["--use_gmm"]),
    (f"{TRAIN} DE --members 0", ["--members", "at least 1"]),
    (f"{TRAIN} DE --warmstart 1", ["--warmstart", "DE"]),
    (f"{TRAIN} ODIN --warmstart 1", ["--warmstart", "ODIN"]),
    (f"{TRAIN} plain --lr nan", ["--lr", "nan"]),
    (f"{TRAIN} plain --lr 0", ["--lr", "above 0"]),
    (f"{TRAIN} plain --lr_gmm -1", ["--lr_gmm", "at least 0"]),
    (f"{TRAIN} plain --decay inf", ["--decay", "inf"]),
    (f"{TRAIN} plain --loglam 100", ["--loglam", "at most 50"]),
    (f"{TRAIN} plain --loglam -6e1", ["--loglam", "at least -50"]),
    (f"{TRAIN} plain --batch_size 0", ["--batch_size", "at least 1"]),
    (f"{TRAIN} plain --seed -1", ["--seed", "at least 0"]),
    (f"{TRAIN} plain --seed 99999999999999999999", ["--seed", "out of range"]),
    (f"{TRAIN} plain --steps 0", ["--steps", "at least 1"]),
    (f"{TRAIN} plain --grad_vars mu sigma", ["sigma", "--grad_vars"]),
    (f"{TRAIN} plain --label ../x", ["--label", "../x"]),
    (f"{TRAIN} plain --label -x", ["--label"]),
    (f"{TRAIN} plain --label {'x' * 250}", ["can't write", "xxx"]),
    (f"{TRAIN} plain --label {'x' * 239}", ["can't write", "too long"]),      # with .state and .tmp alone
    (f"{EVAL} --output {'x' * 236}", ["can't write", "too long"]),            # with _fpr95.csv and .tmp alone
    (f"{TRAIN} plain --out_dataset Fotos", ["Fotos", "did you mean Photos"]),
    (f"{TRAIN} plain --metric maha", ["maha", "mahalanobis"]),
    (f"{TRAIN} plain Digits", ["Digits belongs to no option"]),
    (f"{TRAIN} CEDA --data_dir {'d' * 300}", ["ddd", "too long"]),
    (f"{TRAIN} CEDA --out_dataset Folder --out_dir=", ["--out_dir", "empty path"]),
    (f"{TRAIN} CEDA_GMM --gmm_path=", ["--gmm_path", "empty path"]),
    (f"{ATTACK} --load_seeds=", ["--load_seeds", "empty path"]),
    (f"{EVAL} --output=", ["--output", "names no file"]),
    (f"{EVAL} --output new/", ["--output", "'new/' names no file"]),
    (f"{LOAD} {'f' * 300}", ["fff", "too long"]),
    (TRAIN.removesuffix(" --train_type"), ["--train_type", "required"]),
    (f"{TRAIN} CEDA --out_dataset Folder", ["--out_dir"]),
    (f"{TRAIN} CEDA --out_dataset Folder --out_dir nowhere", ["nowhere"]),
    (f"{TRAIN} CEDA --out_dataset Folder --out_dir {BASE}", [BASE]),
    (f"{TRAIN} CEDA --out_dir checkpoints", ["--out_dir", "--out_dataset Folder"]),
    (f"{TRAIN} CEDA --out_dataset Digits", ["the in-distribution itself"]),
    (f"{TRAIN} CEDA --out_dataset TinyImages", ["TinyImages", "RandomImages300k"]),
    (f"{TRAIN} CEDA --out_dataset SVHN", ["SVHN", "--download 1"]),
    (f"{TRAIN} CEDA_GMM --n 33", ["gen_gmm.py", "--n 33"]),
    (f"{TRAIN} CEDA_GMM --PCA 0 --n 10", ["gen_gmm.py", "--PCA 0"]),
    (f"{TRAIN} CEDA_GMM --PCA 0 --metric mahalanobis --n 10", ["--metric mahalanobis", "--PCA 1"]),
    ("run_training.py --dataset MNIST --train_type plain", ["MNIST", "--download 1"]),
    ("run_training.py --dataset MNIST --train_type ODIN", ["MNIST", "Base", "--train_type plain"]),
    ("run_training.py --dataset MNIST --train_type Maha", ["MNIST", "Base", "--train_type plain"]),
    (f"{FIT} --n 5000", ["--n 5000", "1437"]),
    (f"{FIT} --n 5 ten", ["--n", "ten"]),
    (f"{FIT} --n", ["--n", "at least one"]),
    (f"{FIT} --data_used 99999", ["--data_used", "1437"]),
    (f"{FIT} --data_used 1", ["--data_used", "at least 2"]),
    (f"{FIT} --n 30 --data_used 20", ["--n 30", "20 images"]),
    (f"{FIT} --reg_covar -1", ["--reg_covar"]),
    (f"{FIT} --reg_covar 1e300", ["--reg_covar"]),
    (f"{FIT} --out_dataset Fotos", ["Fotos", "Photos"]),
    (f"{FIT} --dataset Photos", ["Photos", "known: MNIST"]),
    ("gen_gmm.py", ["--dataset", "required"]),
    ("gen_gmm.py --datasets Digits --dataset Digits", ["--datasets", "did you mean --dataset"]),
    ("gen_eval.py --dataset MNIST", ["run_training.py --dataset MNIST --train_type plain"]),
    (f"{EVAL} --models OE", ["OE", "--train_type OE"]),
    (f"{EVAL} --models CUC", ["CUC", "did you mean CCU"]),
    (f"{EVAL} --models Bse", ["Bse", "did you mean Base"]),
    (f"{EVAL} --models Base,CCU", ["Base,CCU", "Base"]),
    (f"{EVAL} --models ../Digits/Base", ["../Digits/Base"]),
    (f"{EVAL} --models Base --certify 1", ["none of the models has a certificate", "--train_type CEDA_GMM"]),
    (f"{EVAL} --batch_size 1.5", ["--batch_size", "1.5"]),
    (f"{EVAL} --ood nonsense", ["nonsense", "NAME=FOLDER"]),
    (f"{EVAL} --ood x=", ["x=", "NAME=FOLDER"]),
    (f"{EVAL} --ood Noise=checkpoints", ["Noise is a row already"]),
    (f"{EVAL} --ood a=checkpoints a=checkpoints", ["a is a row already"]),
    (f"{EVAL} --ood a=checkpoints --ood a=results", ["a is a row already"]),
    (f"{EVAL} --ood a=nowhere", ["nowhere", "no images"]),
    (f"{EVAL} --ood a=checkpoints", ["checkpoints", "no images"]),
    (f"{EVAL} --output checkpoints", ["checkpoints", "folder"]),
    (f"{EVAL} --output .", ["folder"]),
    (f"{EVAL} --output {BASE}/t", [BASE, "not a folder"]),
    (f"{EVAL} --output {'t' * 300}", ["can't write", "ttt"]),
    (f"{EVAL} --data-dir x", ["--data-dir", "did you mean --data_dir"]),
    ("gen_attack_stats.py --datasets Digits", ["CCUs", "--train_type CEDA_GMM"]),
    ("gen_attack_stats.py --dataset Digits --fit_out 1", ["--datasets", "required"]),
    ("gen_attack_stats.py --datasets Digits,MNIST", ["Digits,MNIST"]),
    ("gen_attack_stats.py --datasets Digits MNIST --fit_out 1", ["MNIST", "CCU"]),
    (f"{ATTACK} --alpha 0", ["--alpha", "above 0"]),
    (f"{ATTACK} --radius -1", ["--radius", "at least 0"]),
    (f"{ATTACK} --radius nan", ["--radius", "nan"]),
    (f"{ATTACK} --restarts 0", ["--restarts"]),
    (f"{ATTACK} --steps many", ["--steps", "many"]),
    (f"{ATTACK} --certificate tigth", ["tigth", "did you mean tight"]),
    (f"{ATTACK} --seeds Nois", ["Nois", "did you mean Noise"]),
    (f"{ATTACK} --seeds FMNIST", ["FMNIST", "--download 1"]),
    (f"{ATTACK} --seeds Noise --out_seeds 1", ["--seeds", "--out_seeds"]),
    (f"{ATTACK} --out_seeds 1 --out_dataset RandomImages300k --batches 1 --batch_size 50",
     ["RandomImages300k has 2 images to start from", "50 are asked for"],
     npy("{'descr': '|u1', 'fortran_order': False, 'shape': (20, 32, 32, 3), }", bytes(20 * 3072))),
    (f"{ATTACK} --seeds MNIST --batches 1 --batch_size 50", ["MNIST", "20 images", "50"], mnist("t10k")),
    (f"{ATTACK} --batches 1000000 --batch_size 1000000", ["memory", "--batch_size"]),
    (f"{ATTACK} --load_seeds none.pt", ["none.pt"]),
    (f"{ATTACK} --load_seeds {BASE}", [BASE, "CCU attack"]),
    (f"{ATTACK} --models CCUs", ["CCUs", "--train_type CEDA_GMM"]),
    (f"{ATTACK} --output checkpoints", ["checkpoints", "folder"]),
    (f"{LOAD} none.pt", ["none.pt"]),
    (f"{LOAD} checkpoints", ["checkpoints"]),
    (f"{LOAD} {BASE}", ["Base.pt", "state dict"]),
    (f"{LOAD} {BASE} --label a/b", ["--label", "a/b"]),
    ("load_pretrained.py --dataset MNIST", ["--pretrained", "required"]),

    # where nothing can be written
    (f"{TRAIN} plain", ["can't write", "logs"], text("logs")),
    (f"{TRAIN} CEDA", ["can't write", "CEDA.pt", "folder"], folder("checkpoints/Digits/CEDA.pt")),
    ("run_training.py --dataset MNIST --train_type plain", ["can't write", "checkpoints/MNIST"],
     text("checkpoints/MNIST")),
    ("gen_gmm.py --dataset MNIST", ["can't write", "checkpoints/MNIST"], text("checkpoints/MNIST")),
    (f"{EVAL} --output blocked/t", ["can't write", "blocked"], text("blocked")),
    (f"{EVAL} --output t", ["can't write", "backup"], text("backup")),
    *((f"{EVAL} --output t", ["can't write", made], folder(made))
      for made in ("t.csv", "t.txt", "t_fpr95.csv", "t_fpr95.txt", "t_runs.json", "backup/t.pt")),
    *((f"{ATTACK} --output t", ["can't write", made], folder(made)) for made in ("t.csv", "t.txt")),
    (f"{ATTACK} --output t", ["can't write", "backup"], text("backup")),
    (f"{EVAL} --output t_Digits", ["backup/t_Digits.pt", "attack on Digits", "another --output"],
     saved("backup/t_Digits.pt", {"format": backups.ATTACK, "dataset": "Digits"})),
    (f"{ATTACK} --output t", ["backup/t_Digits.pt", "scores for Digits", "another --output"],
     saved("backup/t_Digits.pt", {"format": backups.SCORES, "dataset": "Digits"})),
    (f"{LOAD} {BASE}", ["can't write", "checkpoints/MNIST"], text("checkpoints/MNIST")),

    # models
    *((f"{EVAL} --models Base", ["Base.pt"], damaged(BASE, how)) for how in ("cut", "flip", "bit", "text", "empty")),
    (f"{EVAL} --models Base", ["Base.pt", "refused", "could run code"],
     saved(BASE, {"format": checkpoints.MODEL, "spec": Evil()})),
    (f"{EVAL} --models Base", ["Base.pt", "refused", "could run code"], lambda: put(BASE, pickle.dumps(Evil()))),
    (f"{EVAL} --models Base", ["Base.pt", "CCU model, version 1"], copy(GMM_PT, BASE)),
    (f"{EVAL} --models Base", ["Base.pt", "missing key"], changed(BASE, "state", base_model__fc2__bias=None)),
    (f"{EVAL} --models Base", ["Base.pt", "unexpected key"], changed(BASE, "state", extra=torch.zeros(1))),
    (f"{EVAL} --models Base", ["fc2.bias", "shape"], changed(BASE, "state", base_model__fc2__bias=torch.zeros(7))),
    (f"{EVAL} --models Base", ["fc2.bias", "float64"],
     changed(BASE, "state", base_model__fc2__bias=torch.zeros(10, dtype=torch.float64))),
    (f"{EVAL} --models Base", ["fc2.bias", "not finite"],
     changed(BASE, "state", base_model__fc2__bias=torch.full((10,), torch.nan))),
    (f"{EVAL} --models Base", ["fc2.bias", "not finite"],
     changed(BASE, "state", base_model__fc2__bias=torch.full((10,), -torch.inf))),
    (f"{EVAL} --models Base", ["Base.pt", "not dense"],
     changed(BASE, "state", base_model__fc2__bias=torch.zeros(()).expand(2 ** 40))),
    (f"{EVAL} --models Base", ["Base.pt", "not dense"],
     changed(BASE, "state", base_model__fc2__bias=torch.zeros(10).to_sparse())),
    (f"{EVAL} --models Base", ["Base.pt", "LeNte"], changed(BASE, "spec", "base_model", arch="LeNte")),
    (f"{EVAL} --models Base", ["Base.pt", "size"], changed(BASE, "spec", "base_model", size=10 ** 12)),
    (f"{EVAL} --models Base", ["Base.pt", "members"], changed(BASE, "spec", kind="DE", members=10 ** 12)),
    (f"{EVAL} --models Base", ["Base.pt", "kind"], changed(BASE, "spec", kind=None)),
    *((f"{EVAL} --models Base", ["Base.pt", key], changed(BASE, "meta", **{key: value})) for key, value in (
        ("epochs", "20"), ("class_names", 5), ("class_names", [1, 2]), ("out_dataset", [1]), ("mixtures", 5))),
    (f"{EVAL} --models CCU", ["CCU.pt", "7 and 10 classes"], changed(CCU_PT, "spec", classes=7)),
    (f"{EVAL} --models CCU", ["singular_values", "positive"],
     changed(CCU_PT, "state", gmm_in__metric__singular_values=torch.zeros_like)),
    ("gen_eval.py --dataset CIFAR10", ["trained on Digits"], copy(BASE, "checkpoints/CIFAR10/Base.pt")),
    ("gen_eval.py --dataset MNIST", ["MNIST/Base.pt", "trained on Digits"], copy(BASE, "checkpoints/MNIST/Base.pt")),
    ("gen_eval.py --dataset MNIST", ["Base.pt"], folder("checkpoints/MNIST/Base.pt")),
    (f"{TRAIN} EDL --warmstart 1", ["Base.pt"], damaged(BASE, "cut")),
    (f"{TRAIN} CEDA --warmstart 1", ["normalises its input", "--warmstart"], normalised(BASE)),
    (f"{TRAIN} ODIN", ["ODIN", "plain classifier", "CCU"], copy(CCU_PT, BASE)),
    ("gen_attack_stats.py --datasets Digits", ["CCUs.pt is no CCU model"], copy(BASE, "checkpoints/Digits/CCUs.pt")),

    # mixtures
    *((CCU_TRAIN, ["pca_n10_Photos.pt"], damaged(GMM_PT, how)) for how in ("cut", "flip", "bit", "text", "empty")),
    (CCU_TRAIN.replace("10", "12") + f" --gmm_path {GMM_PT}", ["n 10, not 12"]),
    (f"{CCU_TRAIN} --PCA 0 --gmm_path {GMM_PT}", ["metric pca, not euclidean"]),
    (f"{CCU_TRAIN} --out_dataset CIFAR10 --gmm_path {GMM_PT}", ["out_dataset Photos, not CIFAR10"]),
    (f"run_training.py --dataset MNIST --train_type CEDA_GMM --n 10 --gmm_path {GMM_PT}",
     ["dataset Digits, not MNIST"]),
    (f"{CCU_TRAIN} --gmm_path {BASE}", ["Base.pt", "CCU mixtures"]),
    (f"{CCU_TRAIN} --gmm_path checkpoints", ["checkpoints", "gen_gmm.py"]),
    (CCU_TRAIN, [GMM_PT, "dataset None"], changed(GMM_PT, "meta", dataset=None)),
    (CCU_TRAIN, [GMM_PT, "does not hold 10 centroids"], changed(GMM_PT, "in", **dict.fromkeys(("mu", "logvar", "alpha"),
                                                                                 lambda value: value[:3].clone()))),
    (CCU_TRAIN, [GMM_PT, "not finite"], changed(GMM_PT, "out", logvar=lambda v: v / 0)),
    (CCU_TRAIN, [GMM_PT, "positive"], changed(GMM_PT, "metric", singular_values=lambda s: -s)),
    (CCU_TRAIN, [GMM_PT], changed(GMM_PT, metric=None)),
    (CCU_TRAIN, [GMM_PT, "refused", "gen_gmm.py"], changed(GMM_PT, "meta", dataset=Evil())),

    # IDX files
    ("gen_gmm.py --dataset MNIST", ["train-images", "empty"], mnist(images=b"")),
    ("gen_gmm.py --dataset MNIST", ["train-images", "wrong start"], mnist(images=b"hello, world, this is no IDX file")),
    ("gen_gmm.py --dataset MNIST", ["train-images", "wrong start"], mnist(images=idx((20, 28, 28), kind=13))),
    ("gen_gmm.py --dataset MNIST", ["train-images", "bytes"], mnist(images=idx((20, 28, 28))[:-1])),
    ("gen_gmm.py --dataset MNIST", ["train-images", "bytes"], mnist(images=idx((20, 28, 28)) + b"0")),
    ("gen_gmm.py --dataset MNIST", ["train-images", "bytes"], mnist(images=idx((2 ** 31, 28, 28), b""))),
    ("gen_gmm.py --dataset MNIST", ["train-images", "28 x 28"], mnist(images=idx((20, 32, 32)))),
    ("gen_gmm.py --dataset MNIST", ["train-images", "28 x 28"], mnist(images=idx((0, 28, 28)))),
    ("gen_gmm.py --dataset MNIST", ["train-labels", "does not fit"], mnist(labels=idx((19,)))),
    ("gen_gmm.py --dataset MNIST", ["train-labels", "does not fit"], mnist(labels=idx((20,), b"\x0a" * 20))),
    ("gen_gmm.py --dataset MNIST", ["train-labels", "wrong start"], mnist(labels=idx((20, 28, 28)))),
    ("gen_gmm.py --dataset MNIST", ["train-images", ".gz"], mnist(images=idx((20, 28, 28)), gz=".gz")),
    ("gen_gmm.py --dataset MNIST", ["train-images", "no whole IDX"],     # 80 MB, whose end claims the right size
     mnist(images=gzip.compress(idx((20, 28, 28), bytes(80_000_000)))[:-4] + struct.pack("<I", 16 + 20 * 784),
           gz=".gz")),
    ("gen_gmm.py --dataset MNIST --n 5", ["all images are equal"], mnist()),
    ("gen_gmm.py --dataset MNIST", ["MNIST is not in the folder data"], mnist(folder="data")),     # in the wrong place
    ("run_training.py --dataset MNIST --train_type plain", ["not in the folder data"], mnist()),       # no test part

    # other data
    (NPY, ["300K", "damaged"], lambda: put("data/300K_random_images.npy")),
    (NPY, ["300K", "damaged"], npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 32, 32, 3), }")),
    (NPY, ["300K", "damaged"], npy("{'descr': '|O', 'fortran_order': False, 'shape': (20, 32, 32, 3), }",
                                   pickle.dumps(Evil()))),
    (NPY, ["300K", "float32"], npy("{'descr': '<f4', 'fortran_order': False, 'shape': (20, 32, 32, 3), }",
                                   bytes(20 * 3072 * 4))),
    (NPY, ["300K", "[20, 3, 32, 32]"], npy("{'descr': '|u1', 'fortran_order': False, 'shape': (20, 3, 32, 32), }",
                                           bytes(20 * 3072))),
    (NPY, ["300K", "damaged"], npz("data/300K_random_images.npy")),
    (NPY, ["300K", "[0, 32, 32, 3]"], npy("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 32, 32, 3), }")),
    *((f"{TRAIN} CEDA", ["tiny_images.bin", "cut short"], text("data/80M_Tiny_Images/tiny_images.bin", "x" * n))
      for n in (0, 5000, 3072 * 9)),
    (f"{TRAIN} CEDA", ["80mn_cifar_idxs.txt", "whole numbers"],
     both(text("data/80M_Tiny_Images/tiny_images.bin", "x" * 3072 * 20),
          text("data/80M_Tiny_Images/80mn_cifar_idxs.txt", "9" * 40))),
    ("gen_gmm.py --dataset SVHN", ["train_32x32.mat", "checksum"], text("data/train_32x32.mat")),
    ("gen_gmm.py --dataset SVHN", ["train_32x32.mat", "checksum"], folder("data/train_32x32.mat")),
    ("gen_gmm.py --dataset CIFAR10", ["cifar-10-batches-py", "checksum"],
     lambda: [put(f"data/cifar-10-batches-py/{name}", pickle.dumps(Evil()))
              for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6)))]),
    ("gen_gmm.py --dataset MNIST --data_dir file", ["MNIST is not in the folder file"], text("file")),
    (f"{EVAL} --ood a=photos", ["photos", "can be read"], text("photos/1.png")),
    (f"{EVAL} --ood a=photos", ["photos", "can be read"],
     text("photos/1.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    (f"{TRAIN} CEDA --out_dataset Folder --out_dir photos", ["photos", "one photo"], text("photos/1.png")),

    # backups
    *((SEEDS, ["seeds.pt"], both(seeds(torch.rand(4, 1, 28, 28)), damaged("seeds.pt", how)))
      for how in ("cut", "text", "empty")),
    (SEEDS, ["seeds.pt", "no images"], seeds("hello")),
    (SEEDS, ["seeds.pt", "no images"], seeds(torch.rand(0, 1, 28, 28))),
    (SEEDS, ["seeds.pt", "no images"], seeds(torch.zeros(4, 1, 28, 28, dtype=torch.uint8))),
    (SEEDS, ["seeds.pt", "no images"], saved("seeds.pt", {"format": backups.ATTACK})),
    (SEEDS, ["seeds.pt", "[3, 32, 32]"], seeds(torch.rand(4, 3, 32, 32))),
    (SEEDS, ["seeds.pt", "outside [0, 1]"], seeds(2 * torch.ones(4, 1, 28, 28))),
    (SEEDS, ["seeds.pt", "outside [0, 1]"], seeds(torch.full((4, 1, 28, 28), torch.nan))),
    (SEEDS, ["seeds.pt", "not dense"], seeds(torch.zeros(()).expand(2 ** 40, 1, 28, 28))),
    (SEEDS, ["seeds.pt", "refused"], seeds(Evil())),
    (f"{ATTACK} --datasets Digits Digits MNIST --load_seeds seeds.pt", ["--load_seeds", "one data set"]),

    # the authors' state dicts
    (f"{LOAD} x.pt", ["x.pt", "refused"], saved("x.pt", Evil())),
    (f"{LOAD} x.pt", ["x.pt", "names to tensors"], saved("x.pt", [1, 2])),
    (f"{LOAD} x.pt", ["x.pt", "names to tensors"], saved("x.pt", {1: torch.zeros(1)})),
    (f"{LOAD} x.pt", ["x.pt", "missing key"], saved("x.pt", {})),
    (f"{LOAD} x.pt", ["x.pt", "not dense"], saved("x.pt", {"mm.mu": torch.empty(3, device="meta")})),
]

# refused only after some work, which has to show what is wrong
LATE = [
    (f"{FIT} --n 5 --data_used 5 --reg_covar 0", ["not finite", "--reg_covar"]),
    (f"{EVAL} --models Base", ["Base", "NaN", "Digits"],
     changed(BASE, "state", base_model__conv1__weight=lambda w: w.sign() * 3e38)),
    (f"{ATTACK} --models Base --batches 1 --batch_size 2", ["Base", "NaN", "Digits"],
     changed(BASE, "state", base_model__conv1__weight=lambda w: w.sign() * 3e38)),
]


@pytest.fixture
def work(digits_run, tmp_path, monkeypatch):
    """Links to the small Digits run's files."""
    shutil.copytree(digits_run / "checkpoints", tmp_path / "checkpoints", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything():
    """What is in the current folder; a file that is written anew has another number or time."""
    return {str(path): path.is_file() and (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)
            for path in Path.cwd().rglob("*")}


def refused(command, words, capsys, notes=False):
    """The command prints one line with `words` to stderr (`notes`: as its last), exits with 2 and writes nothing."""
    before = everything()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    if notes:
        error = error.splitlines(keepends=True)[-1]
    assert error.count("\n") == 1 and error.startswith(command.split()[0] + ": "), error
    assert all(word in error for word in words), error
    assert everything() == before


def name(case):
    return case[0].replace("gen_attack_stats", "attack")[:70]


@pytest.mark.parametrize("case", TABLE, ids=name)
def test_refused_before_the_work(case, work, capsys, monkeypatch):
    def work_begins(*args, **kwargs):
        raise AssertionError("the work began")
    monkeypatch.setattr("params.OUT_FIT_IMAGES", 300)
    for place in ("run_training.train", "utils.calibration.try_steps", "gen_gmm.fit_gmm", "utils.attack_batches.attack",
                  "utils.evaluation.evaluate"):
        monkeypatch.setattr(place, work_begins)
    command, words, make = (*case, lambda: None)[:3]
    make()
    refused(command, words, capsys)


@pytest.mark.parametrize("case", LATE, ids=name)
def test_refused_in_the_work(case, work, capsys, monkeypatch):
    monkeypatch.setattr("params.OUT_FIT_IMAGES", 300)
    command, words, make = (*case, lambda: None)[:3]
    make()
    refused(command, words, capsys, notes=True)


def test_debug_shows_the_traceback(work, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(f"{EVAL} --ood a=nowhere --debug 1")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" in error and "no images" in error.splitlines()[-1]


def test_a_refusal_from_a_shell(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "gen_eval.py", "--dataset", "MNIST"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gen_eval.py: no MNIST model is trained") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, path", [
    (f"{TRAIN} CEDA --data_dir closed", "closed/80M_Tiny_Images/tiny_images.bin"),
    (f"{EVAL} --ood a=photos", "photos/closed"),
    (f"{TRAIN} CEDA --out_dataset Folder --out_dir photos", "photos/closed"),
])
def test_what_may_not_be_read_is_named(command, path, work, capsys, monkeypatch):
    """root may read everything, so that the system's answer is feigned."""
    def closed(function):
        def ask(asked, *args, **options):
            if str(asked) == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return function(asked, *args, **options)
        return ask
    (work / "photos/closed").mkdir(parents=True)
    Image.new("L", (28, 28)).save("photos/1.png")
    monkeypatch.setattr(Path, "is_file", closed(Path.is_file))
    monkeypatch.setattr(os, "scandir", closed(os.scandir))
    refused(command, [path, "Permission denied"], capsys)


def test_a_path_that_is_no_utf8_is_no_reason_to_lose_a_table(tmp_path):
    path = files.write_text(tmp_path / "t.txt", "--data_dir d\udce9 –")
    assert path.read_text(encoding="utf-8") == "--data_dir d\\udce9 –"


def test_a_line_break_in_a_name_stays_one_line(work, capsys, monkeypatch):
    import gen_eval
    monkeypatch.setattr("sys.argv", ["gen_eval.py", "--dataset", "Digits", "--ood", "a=no\nwhere"])
    with pytest.raises(SystemExit):
        cli.run(gen_eval.main, gen_eval.parser())
    assert capsys.readouterr().err.count("\n") == 1


# --- claims of more than there is --------------------------------------------------------------------------------

CLAIMS = """
import gzip, resource, struct, sys, zipfile
import numpy as np, torch
from pathlib import Path
from PIL import Image
from utils import checkpoints, files
from utils.batches import ImageSet
from utils.data import read_idx
from utils.errors import UserError
from utils.images import read_images
from utils.out_data import load_out

GB = 2 ** 30
def idx(path, n):
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", n, 28, 28)
    if path.suffix != ".gz":
        path.write_bytes(head)
        return
    with gzip.open(path, "wb", 1) as file:         # whole: what it claims is what it holds
        file.write(head)
        for _ in range(n // 2 ** 14):
            file.write(bytes(784 * 2 ** 14))
def refuse(function, *args):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        function(*args)
    except UserError as error:
        print("refused", error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 ** 17, (args, grown)       # 128 MB in kB

like = ImageSet("x", torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None, 0)
for name, n in (("a", 2 ** 31), ("b.gz", 3 * 2 ** 17)):
    idx(Path(name), n)
    refuse(read_idx, Path(name), 3)
header = "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 32, 32, 3), }".ljust(117) + "\\n"
Path("300K_random_images.npy").write_bytes(b"\\x93NUMPY\\1\\0" + struct.pack("<H", 118) + header.encode())
refuse(load_out, "RandomImages300k", like, ".")
with zipfile.ZipFile("whole.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    torch.save({"a": torch.zeros(10)}, "small.pt")
    for entry in zipfile.ZipFile("small.pt").infolist():
        content = bytes(GB // 4) if entry.filename.endswith("data/0") else zipfile.ZipFile("small.pt").read(entry)
        archive.writestr(entry.filename, content)
refuse(files.load, "whole.pt")
torch.save({"format": checkpoints.MODEL, "spec": {"kind": "Softmax", "base_model":
            {"arch": "LeNet", "channels": 1, "size": 28, "classes": GB}}, "state": {}, "meta": {}}, "spec.pt")
refuse(checkpoints.load_model, "spec.pt")
Image.new("1", (13000, 13000)).save("bomb.png")
refuse(read_images, [Path("bomb.png")], 1, 28)
"""


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    done = subprocess.run([sys.executable, "-c", CLAIMS], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 6, done.stdout
    for word in ("more than any", "300K", "claim more", "spec.pt", "bomb.png"):
        assert word in done.stdout


def test_image_folders_with_traps(tmp_path, monkeypatch, capsys):
    """A link back up is followed once; a program with an image's name is not run; the rest is read."""
    from PIL import EpsImagePlugin
    runs = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: runs.append(args))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.jpg")
    (tmp_path / "up").symlink_to(tmp_path)
    found = list_images(tmp_path)
    assert [path.name for path in found] == ["good.png", "program.jpg"]
    images, kept = read_images(found, 3, 8)
    assert kept.tolist() == [True, False] and len(images) == 1 and not runs
    assert "program.jpg" in capsys.readouterr().err


# --- fuzz --------------------------------------------------------------------------------------------------------

def tiny_mixtures():
    g = torch.Generator().manual_seed(0)
    metric = PCAMetric(torch.linalg.qr(torch.randn(16, 16, generator=g))[0], torch.rand(16, generator=g) + 0.5)
    return [GMM(torch.rand(3, 16, generator=g), torch.zeros(3), torch.full((3,), 1 / 3).log(), metric) for _ in "io"]


def check_model(path):
    model = checkpoints.load_model(path)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    x = torch.rand(2, *[model.spec["base_model"][key] for key in ("channels", "size", "size")])
    with torch.no_grad():
        assert model(x).shape == (2, model.spec["base_model"]["classes"]) and model.score(x).shape == (2,)


def check_mixtures(path):
    *gmms, meta = checkpoints.load_mixtures(path, "")
    assert isinstance(meta, dict) and gmms[0].metric is gmms[1].metric
    for gmm in gmms:
        assert gmm.mu.dim() == 2 and all(value.isfinite().all() for value in gmm.state_dict().values())
        assert gmm.component_log_prob(torch.rand(2, gmm.metric.dim)).shape == (2, gmm.components)


def check_idx(path):
    assert read_idx(path, 3).dtype == np.uint8 and read_idx(path, 3).ndim == 3


def check_npy(path):
    out = load_out("RandomImages300k", check_npy.like, path.parent)
    assert out.images.dtype == torch.uint8 and out.images.shape[1:] == (1, 28, 28) and len(out)


def check_seeds(path):
    from gen_attack_stats import load_seeds
    x = load_seeds(path, "Digits", (1, 4, 4))
    assert x.shape[1:] == (1, 4, 4) and x.min() >= 0 and x.max() <= 1


def make_fuzzed(kind, path):
    ccu = CCU(LeNet(1, 4, 2), *tiny_mixtures(), 0.0, 2)
    if kind == "model":
        checkpoints.save_model(ccu, path, {"dataset": "x"})
    elif kind == "legacy":
        model = Softmax(LeNet(1, 4, 2))
        torch.save({"format": checkpoints.MODEL, "spec": model.spec, "state": model.state_dict(), "meta": {}}, path,
                   _use_new_zipfile_serialization=False)
    elif kind == "mixtures":
        checkpoints.save_mixtures(*tiny_mixtures(), path, {"n": 3})
    elif kind == "seeds":
        files.save({"format": backups.ATTACK, "seeds": torch.rand(5, 1, 4, 4)}, path)
    elif kind == "npy":
        np.save(path, np.zeros((10, 32, 32, 3), np.uint8))
    else:
        path.write_bytes((gzip.compress if kind == "gz" else bytes)(idx((20, 28, 28))))


@pytest.mark.parametrize("kind, name, check, times", [
    ("model", "x.pt", check_model, 400), ("legacy", "x.pt", check_model, 100),
    ("mixtures", "x.pt", check_mixtures, 400), ("seeds", "x.pt", check_seeds, 300),
    ("idx", "x", check_idx, 200), ("gz", "x.gz", check_idx, 200), ("npy", "300K_random_images.npy", check_npy, 400)])
def test_fuzz(kind, name, check, times, tmp_path, monkeypatch):
    """Truncations and flipped bytes: UserError, or a whole object."""
    monkeypatch.chdir(tmp_path)
    check_npy.like = load_in_dist("Digits", "test", "data") if kind == "npy" else None
    path = tmp_path / name
    make_fuzzed(kind, path)
    check(path)
    content, rng, survived = path.read_bytes(), random.Random(0), 0
    for i in range(times):
        fuzzed = bytearray(content)
        if i % 4 == 0:
            del fuzzed[rng.randrange(len(fuzzed)):]
        else:
            ends = 2000 if i % 2 else len(fuzzed)       # half of them where the structure is: in front and at the end
            for _ in range(rng.choice((1, 3, 30))):
                fuzzed[rng.randrange(-min(ends, len(fuzzed)), min(ends, len(fuzzed)))] ^= 1 << rng.randrange(8)
        path.write_bytes(fuzzed)
        try:
            check(path)
            survived += 1
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
    assert survived < times
    assert {p.name for p in tmp_path.iterdir()} == {name}


class System(Evil):
    def __reduce__(self):
        return (os.system, ("touch ran",))


class Eval(Evil):
    def __reduce__(self):
        return (eval, ("open('ran', 'w')",))


@pytest.mark.parametrize("evil", [Evil, System, Eval])
def test_no_file_runs_code(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    value = {"format": backups.ATTACK, "seeds": [evil()]}
    for kind in ("zip", "legacy", "pickle", "object array"):
        if kind == "pickle":
            path.write_bytes(pickle.dumps(value))
        elif kind == "object array":
            np.savez(open(path, "wb"), np.array([evil()], object))      # noqa: SIM115
        else:
            torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(UserError, match="x.pt is (refused|damaged)"):
            files.load(path)
    path = tmp_path / "300K_random_images.npy"
    np.save(path, np.array([evil()] * 20, object))
    with pytest.raises(UserError, match="300K"):
        load_out("RandomImages300k", load_in_dist("Digits", "test", "data"), tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil()))          # what all of them would have done
    assert (tmp_path / "ran").exists()


# --- warnings ----------------------------------------------------------------------------------------------------

SILENT = changed(BASE, "state", base_model__fc2__weight=torch.zeros(10, 1024))       # a constant classifier


def warned(capsys, *words):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    return any(all(word in line for word in words) for line in lines)


def test_a_test_error_near_chance_is_named(work, capsys, monkeypatch):
    run_script(f"{EVAL} --models Base --output t")
    assert not warned(capsys, "test error")
    SILENT()
    run_script(f"{EVAL} --models Base --output t")
    assert warned(capsys, "Digits: Base", "test error of 9", "guessing has 90.0 %")
    assert any("guessing has 90.0 %" in note for note in tables.notes("t"))
    run_script(f"{ATTACK} --models Base --batches 1 --batch_size 2 --steps 1 --restarts 1 --output a")
    assert warned(capsys, "Digits: Base", "test error of 9")
    assert any("guessing has 90.0 %" in note for note in tables.notes("a"))
    monkeypatch.setattr("run_training.train", lambda *args: [])
    run_script(f"{TRAIN} EDL")
    assert warned(capsys, "Digits: EDL", "test error") and Path("checkpoints/Digits/EDL.pt").exists()
    base = load_model("checkpoints/Digits/Base.pt")
    assert not utils.evaluation.warn_of_doubts("x", "y", base, 40.0, torch.zeros(9), 2) and not warned(capsys, "x")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_that_the_shell_has_closed(closed, tmp_path):
    script = Path(__file__).parent.parent / "load_pretrained.py"
    run = subprocess.run(f'"{sys.executable}" "{script}" --dataset MNIST --pretrained none.pt {closed}', shell=True,
                         cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 2 and run.stdout == "" and not list(tmp_path.iterdir())
    assert run.stderr == ("" if closed == "2>&-" else "load_pretrained.py: there is no file none.pt; give the authors' "
                          "state dict\n")


def test_a_ccu_that_takes_many_test_images_for_noise_is_named(work, capsys):
    """p(o) is so large that all images are taken for noise."""
    run_script(f"{EVAL} --models Base CCU --output t")
    assert not warned(capsys, "confident of")
    changed(CCU_PT, "state", loglam=torch.tensor(1e5))()
    run_script(f"{EVAL} --models Base CCU --output t")
    assert warned(capsys, "Digits: CCU is at most 1.1/M confident of 100 % of the test images", "--n")
    assert any("confident of 100 %" in note for note in tables.notes("t"))


def test_a_batch_too_small_for_a_batch_norm_is_named(tmp_path, capsys, monkeypatch):
    """ResNet18 makes images of 8 x 8 maps of one value: a batch of one has no variance."""
    monkeypatch.chdir(tmp_path)
    for i, path in enumerate(f"mine/{split}/{c}" for split in ("train", "test") for c in "ab"):
        Path(path).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(f"{path}/1.png")
    with pytest.raises(SystemExit) as stop:
        run_script("run_training.py --dataset Folder --data_dir mine --image_size 8 --train_type plain --batch_size 1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("run_training.py: ") and "larger --batch_size" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_ood_sets_that_are_not_ood_are_named(work, capsys):
    train, test = (np.random.default_rng(i).integers(0, 256, 20 * 784, np.uint8) for i in (7, 8))
    train[:3 * 784] = test[5 * 784:8 * 784]
    for part, images in (("train", train), ("t10k", test)):
        mnist(part, "data/FashionMNIST/raw", images=idx((20, 28, 28), images.tobytes()))()
    Path("mine").mkdir()
    for i, image in enumerate(load_in_dist("Digits", "test", "data").images[:4]):
        Image.fromarray(image[0].numpy()).save(f"mine/{i}.png")
    run_script(f"{EVAL} --models Base --output t")
    assert not warned(capsys, "FMNIST") and not warned(capsys, "among")
    changed(BASE, "meta", out_dataset="FMNIST")()
    run_script(f"{EVAL} --models Base --output t --ood mine=mine")
    error = capsys.readouterr().err
    assert "warning: Base learnt from FMNIST" in error
    assert "warning: 3 of 20 images of FMNIST are among those of the out-images of FMNIST\n" in error
    assert "warning: 4 of 4 images of mine are among those of Digits\n" in error
    assert error.count("among") == 2


def test_an_ood_set_of_the_folder_that_was_learnt_from_is_named(work, capsys):
    write_images(work / "photos/mine", 2, {"a": (0, 0, 0)}, 0)
    write_images(work / "other", 2, {"a": (0, 0, 0)}, 1)
    changed(BASE, "meta", out_dataset="Folder", out_dir=str(work / "photos"))()
    for folder, learnt in {"photos": True, "photos/mine": True, ".": True, "other": False}.items():
        run_script(f"{EVAL} --models Base CCU --output t --ood mine={folder}")
        assert warned(capsys, f"Base learnt from photos in {work}/photos: mine is not OOD to them") == learnt


def test_radii_of_0_and_attacks_that_gain_nothing_are_named(work, capsys, monkeypatch):
    attack = f"{ATTACK} --models Base --batches 1 --batch_size 4 --steps 3 --restarts 1 --output t"
    run_script(attack)
    assert not warned(capsys, "")
    SILENT()
    run_script(attack)
    assert warned(capsys, "attack on Base", "4 of 4 seeds") and Path("t.csv").exists()
    monkeypatch.setattr("gen_attack_stats.certified_radius", lambda ccu, x, *a, **k: torch.zeros(len(x)).double())
    run_script(attack)
    assert warned(capsys, "4 of 4 radii of Digits are 0")


def test_a_metric_at_its_floor_is_named(capsys):
    from gen_gmm import make_metric
    make_metric("pca", torch.rand(100, 20, generator=torch.Generator().manual_seed(0)))
    assert not warned(capsys, "")
    make_metric("pca", load_in_dist("Digits", "test", "data").floats().flatten(1)[:50])
    assert warned(capsys, "of 784 singular values are at the floor")


def test_a_disk_that_is_full_is_named_as_the_reason(tmp_path):
    """torch.save hides it behind a message of its own."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(UserError, match="can't write .*: .*File too large"):
            files.save({"x": torch.zeros(100_000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_of_several_errors_the_last_is_named(tmp_path):
    """mkdir(parents=True) asks for what may not be made where it has not found it."""
    def writer(_):
        try:
            raise FileNotFoundError(errno.ENOENT, "not there")
        except FileNotFoundError:
            raise PermissionError(errno.EACCES, "not allowed")      # noqa: B904
    with pytest.raises(UserError, match="not allowed"):
        files.write(tmp_path / "x.pt", writer)
