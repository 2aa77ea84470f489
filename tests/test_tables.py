"""The numbers in the tables, from the scores and samples that the scripts keep, by scikit-learn or by hand."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import gen_attack_stats
from models import CCU, CLASSIFIERS, EDL, MCD, Softmax, certified_radius, confidence_bound
from utils import attack_batches, evaluation, files, load_model, save_model, tables
from utils.backups import ATTACK
from utils.data import load_in_dist, load_ood
from utils.out_data import load_out


@pytest.fixture
def attacked(work, attacks):
    """Run gen_attack_stats.py with these options; what its calls of `attack` got."""
    def run(options):
        attacks.clear()
        run_script(f"gen_attack_stats.py --datasets Digits --wide_format 1 --output t {options}")
        return list(attacks)
    return run


def test_table_2_has_scikit_learns_fpr_and_average_precision(work):
    run_script("gen_eval.py --dataset Digits --models Base --aupr 1 --drop_mmc 1 --output t")
    test, model = load_in_dist("Digits", "test", "data"), load_model("checkpoints/Digits/Base.pt")
    with torch.no_grad():
        scores = [model.score(data.floats()) for data in (test, load_ood("Patches", test, "data", seed=0))]
    ood, outlier = np.repeat([0, 1], list(map(len, scores))), -torch.cat(scores).numpy()
    fpr, tpr, _ = roc_curve(ood, outlier, drop_intermediate=False)
    expected = {"t.csv": average_precision_score(ood, outlier), "t_fpr95.csv": fpr[tpr >= 0.95].min()}
    assert 0.05 < expected["t_fpr95.csv"] < 0.95        # a cell that says something
    for file, value in expected.items():
        assert pd.read_csv(file, index_col=0).loc["Patches", "Base"] == pytest.approx(100 * value, abs=1e-2)


def test_another_seed_draws_other_ood_images(work):
    run_script("gen_eval.py --dataset Digits --models Base --seed 5 --output t")
    test, model = load_in_dist("Digits", "test", "data"), load_model("checkpoints/Digits/Base.pt")
    with torch.no_grad():
        expected, other = (model.score(load_ood("Uniform", test, "data", seed=seed).floats()) for seed in (5, 0))
    scores = files.load("backup/t.pt")["scores"]["Base/Uniform"]
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, other)


def test_certified_images_are_those_whose_density_ratio_is_small(work):
    """R > 0 where (1 + M b) / (1 + b) <= 1.1 for b = p(x|i) / p(x|o) at the image itself."""
    run_script("gen_eval.py --dataset Digits --models Base CCU --certify 1 --output t")
    table = pd.read_csv("t_certified.csv", header=[0, 1], index_col=0)
    ccu, test = load_model("checkpoints/Digits/CCU.pt"), load_in_dist("Digits", "test", "data")
    sets = {"orig": test} | {name: load_ood(name, test, "data", seed=0) for name in ("Patches", "Noise", "Uniform")}
    assert list(table.index) == list(sets) and set(table.columns.get_level_values(0)) == {"CCU"}
    for name, data in sets.items():
        with torch.no_grad():
            log_in, log_out = copy.deepcopy(ccu).double().log_densities(data.floats().double())
        b = (log_in - log_out).exp()
        share = 100 * ((1 + 10 * b) / (1 + b) <= 1.1).double().mean().item()
        assert table["CCU", "certified"][name] == pytest.approx(share, abs=1e-3), name
        with torch.no_grad():
            measured = 100 * (ccu(data.floats()).exp().amax(1) <= 0.11).double().mean().item()
        assert table["CCU", "uncertain"][name] == pytest.approx(measured, abs=1e-3), name
        for method in ("paper", "tight"):
            R = certified_radius(ccu, data.floats(), 1.1, method=method).numpy()
            median = np.median(R[R > 0]) if share else np.nan
            assert table["CCU", f"R {method}"][name] == pytest.approx(median, abs=1e-3, nan_ok=True), name
    shares = table["CCU", "certified"]
    assert (table["CCU", "uncertain"] >= shares).all()
    assert shares["orig"] < 1 < shares["Noise"] < 100 == shares["Uniform"]
    assert table["CCU", "R tight"]["Uniform"] > 1.01 * table["CCU", "R paper"]["Uniform"] > 1


@pytest.mark.parametrize("options, label, certificate", [("", "CCUs", "paper"), ("--fit_out 1", "CCU", "paper"),
                                                         ("--fit_out 1 --certificate tight", "CCU", "tight")])
def test_radii_are_those_of_the_certificate(options, label, certificate, attacked):
    ccu = load_model("checkpoints/Digits/CCU.pt")
    models = {"CCU": ccu, "CCUs": CCU(ccu.base_model, ccu.gmm_in, None, 0.0, 10)}
    save_model(models["CCUs"], "checkpoints/Digits/CCUs.pt", {})
    call, = attacked(f"--models Base --batches 1 --batch_size 5 {options}")
    radii = {(name, method): certified_radius(model, call.seeds, 1.1, method=method)
             for name, model in models.items() for method in ("paper", "tight")}
    torch.testing.assert_close(call.radii, radii[label, certificate])
    assert (radii["CCU", "tight"] > 1.01 * radii["CCU", "paper"]).all() and (call.radii > 0).all()


def test_options_of_the_attack_reach_it(attacked):
    default, = attacked("--fit_out 1 --models Base --batches 1 --batch_size 2")
    assert (default.steps, default.restarts, default.alpha) == (500, 50, 3)
    test = load_in_dist("Digits", "test", "data").floats()
    torch.testing.assert_close(default.images.sum(0), test.sum(0))      # all of them, in another order
    calls = attacked("--fit_out 1 --batches 3 --batch_size 2 --steps 7 --restarts 4 --alpha 1.5 --radius 0.7 --seed 5")
    assert {(call.steps, call.restarts, call.alpha) for call in calls} == {(7, 4, 1.5)}
    assert all((call.radii == 0.7).all() and len(call.seeds) == 2 for call in calls)
    assert (files.load("backup/t_Digits.pt")["radii"] == 0.7).all()
    base, ccu = calls[:3], calls[3:]
    assert len({call.seed for call in (default, *base)}) == 4       # another in each batch and with another --seed
    assert [call.seed for call in base] == [call.seed for call in ccu]
    assert not torch.equal(base[0].seeds, base[1].seeds) and torch.equal(base[1].seeds, ccu[1].seeds)


@pytest.mark.parametrize("options, wanted", [
    ("--seed 5", lambda test: torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(5))),
    ("--seeds Patches", lambda test: load_ood("Patches", test, "data", n=4).floats()),
    ("--out_seeds 1", lambda test: load_out("Photos", test, "data", split="test", n=4).floats())])
def test_seeds_are_what_the_options_say(options, wanted, attacked):
    call, = attacked(f"--fit_out 1 --models Base --batches 1 --batch_size 4 {options}")
    assert torch.equal(call.seeds, wanted(load_in_dist("Digits", "test", "data")))


def test_a_score_that_is_no_confidence_ranks_but_has_no_mmc(attacked):
    model = MCD(CLASSIFIERS["LeNetDropout"](1, 28, 10), passes=3).eval()
    model.draw_masks(torch.Generator().manual_seed(0))
    save_model(model, "checkpoints/Digits/MCD.pt", {})
    with torch.no_grad():
        expected = model.score(load_in_dist("Digits", "test", "data").floats())
    run_script("gen_eval.py --dataset Digits --models MCD --output t2")
    attacked("--fit_out 1 --models MCD --batches 1 --batch_size 2")
    for scores in (files.load("backup/t2.pt")["scores"]["MCD/orig"],
                   files.load("backup/t_Digits.pt")["scores_in"]["MCD"]):
        torch.testing.assert_close(scores, expected)
    assert pd.read_csv("t2.csv", header=[0, 1], index_col=0)["MCD", "MMC"].isna().all()
    assert pd.read_csv("t.csv", index_col=[0, 1])["MCD"].isna().tolist() == [False, True, False, False]


STATISTICS = ["TE", "MMC", "SR", "AUC"]
ROWS = {(dataset, label): dict.fromkeys(STATISTICS, 1.0)
        for dataset in ("MNIST", "Digits") for label in ("Base", "CCU")}


def test_batches_of_a_model_that_computes_something_else_are_not_taken_over(tmp_path, monkeypatch):
    """Settings may stand in a model's spec alone; its weights are the same."""
    monkeypatch.chdir(tmp_path)
    network, images = CLASSIFIERS["LeNet"](1, 28, 10), torch.rand(2, 1, 28, 28)
    args = gen_attack_stats.parser().parse_args(["--datasets", "Digits"])
    folders = [attack_batches.unit_folder("t", "Digits", "X", model, Softmax(network), images, images, args)
               for model in (Softmax(network), Softmax(network), EDL(network))]
    files.unlock()
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize("options, index, columns", [
    ("--wide_format 1", [(dataset, s) for dataset in ("MNIST", "Digits") for s in STATISTICS], ["Base", "CCU"]),
    ("--vertical 1 --drop_mmc 1", list(ROWS), ["TE", "SR", "AUC"]),
    ("", ["Base", "CCU"], [(dataset, s) for dataset in ("MNIST", "Digits") for s in STATISTICS])])
def test_table_1_layouts(options, index, columns):
    args = gen_attack_stats.parser().parse_args(f"--datasets MNIST Digits {options}".split())
    table = gen_attack_stats.layout(ROWS, args)
    assert list(table.index) == index and list(table.columns) == columns


def test_certified_columns_follow_from_the_backup(attacked):
    """Seeds on the way from noise to digits, in balls that one of them is certified in by the tight bound alone."""
    noise, way = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 12)
    seeds = noise.lerp(load_in_dist("Digits", "test", "data").floats(slice(12)), way[:, None, None, None])
    files.save({"format": ATTACK, "seeds": seeds}, "seeds.pt")
    ccu = load_model("checkpoints/Digits/CCU.pt")
    paper, tight = (certified_radius(ccu, seeds, 1.1, method=method).numpy() for method in ("paper", "tight"))
    attacked(f"--fit_out 1 --load_seeds seeds.pt --radius {(paper[6] + tight[6]) / 2} --certify 1")
    table, backup = pd.read_csv("t.csv", index_col=[0, 1]).loc["Digits"], files.load("backup/t_Digits.pt")
    bound, by_paper = (confidence_bound(ccu, backup["seeds"], backup["radii"], method=method).numpy()
                       for method in ("tight", "paper"))
    inside = backup["scores_in"]["CCU"].double().exp().numpy()
    auc = roc_auc_score(np.repeat([1, 0], [len(inside), len(bound)]), np.concatenate([inside, bound]))
    expected = {"bound": 100 * bound.mean(), "share": 100 * np.mean(bound <= 0.11), "GAUC": 100 * auc,
                "R mean paper": paper.mean(), "R median paper": np.median(paper),
                "R mean tight": tight.mean(), "R median tight": np.median(tight)}
    assert table["CCU"][list(expected)].to_dict() == pytest.approx(expected, abs=1e-3)
    assert tables.notes("t")[0].endswith("(%; R in units of the metric)")
    assert by_paper.mean() > bound.mean() + 0.05 and 0 < expected["share"] < 100 and 0 < auc < 1
    assert table["Base"][list(expected)].isna().all()


def test_a_score_equal_to_the_median_is_a_success():
    scores_in = torch.tensor([-9.0, -2.0, -1.0])
    assert evaluation.success_rate(torch.tensor([-2.0, -2.0 - 1e-6, -0.5, -9.0]), scores_in) == 50
    assert math.isclose(evaluation.success_rate(scores_in, scores_in), 200 / 3)
    even = torch.tensor([-4.0, -2.0, -1.0, -3.0])       # median -2.5
    assert evaluation.success_rate(torch.tensor([-2.5, -2.6, -3.0, -1.0]), even) == 50


def test_latex_takes_names_as_they_are_and_says_which_packages(tmp_path):
    tables.write(pd.DataFrame({"my_model": [50.0, None]}, ["A & B", "C"]), tmp_path / "t", "100 % sure", ["a note"])
    lines = (tmp_path / "t.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["% 100 % sure", "% a note", r"%\usepackage{booktabs, multirow}"]
    assert any(r"my\_model" in line for line in lines) and any(r"A \& B & 50.00" in line for line in lines)
    assert tables.notes(tmp_path / "t") == ["100 % sure", "a note"]
