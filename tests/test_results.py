"""The pages' results are what the files in results/ say."""

import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script

import gen_results
import model_paths

ROOT = Path(__file__).parent.parent
AUC = {"Base": 98.0, "Base-seed1": 98.5, "Base-seed2": 97.1, "CEDA": 99.25, "MCD": 70.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pages with the marks, and small tables as the scripts write them, with three seeds of Base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for page in gen_results.PAGES:
        page.write_text(f"first\n{gen_results.BEGIN}old\n{gen_results.END}last\n")
    labels = list(AUC)
    heads = [",".join(["", *(x for x in labels for _ in "12")]), ",".join(["", *["MMC", "AUC"] * len(labels)]),
             ",".join(["orig", *["99.0", ""] * len(labels)])]
    rows = [",".join([name, *(x for a in AUC.values() for x in ("50.0", str(a - less)))])
            for name, less in (("FMNIST", 0), ("GrayCIFAR10-JPEG", 1), ("Uniform", 2))]
    Path("results/table2_MNIST.csv").write_text("\n".join([*heads, *rows, ""]))
    table1 = [",," + ",".join(labels), "MNIST,TE,0.5,0.6,0.7,0.8,0.9", "MNIST,MMC,100,99,98,,",
              "MNIST,SR,100,100,100,100,100"]
    Path("results/table1_MNIST.csv").write_text("\n".join([*table1, ""]))
    Path("results/table1_MNIST.txt").write_text("% t\n% command: python gen_attack_stats.py X\n% MNIST: seeds: noise\n")
    Path("results/table2_MNIST.txt").write_text("% t\n% command: python gen_eval.py Y\n% MNIST: MCD learnt nothing\n")
    runs = {label: {"options": {"amp": True, "members": 5}, "train_type": "plain", "epochs": 7, "seed": i % 3,
                    "arch": "LeNet", "seconds": 90.0, "threads": 1, "processor": "Abacus", "gpu": None,
                    "test_error": 0.5 + i / 10}
            for i, label in enumerate(labels)}
    runs["MCD"] = {"source": "elsewhere", "arch": "LeNet", "test_error": 0.9}
    Path("results/table2_MNIST_runs.json").write_text(json.dumps(runs))
    return tmp_path


@pytest.mark.parametrize("change", [{"epochs": 8}, {"seed": 0}, {"options": {"amp": False}}, {"arch": "ResNet18"},
                                    {"options": {"amp": True, "members": 5, "lr": 1e-4}},
                                    {"mixtures": {"metric": "pca", "n": 100, "reg_covar": 0.5}}])
def test_models_that_differ_in_more_than_their_seed_are_not_averaged(change, folder, monkeypatch, capsys):
    """Nor models of one seed under two names, whose deviation of 0 would say that the method does not depend on it."""
    monkeypatch.setattr(gen_results, "SHORT", {"MNIST": ("Base",)})
    path = Path("results/table2_MNIST_runs.json")
    runs = json.loads(path.read_text())
    runs["Base-seed1"] |= change
    path.write_text(json.dumps(runs))
    run_script("gen_results.py")
    assert "MNIST: Base-seed1, Base-seed2 and the others" in capsys.readouterr().err
    first, text = (re.sub(" +", " ", page.read_text()) for page in gen_results.PAGES)
    assert "| AUC FMNIST | 98.00 | 98.50 | 97.10 | 99.25 | 70.00 |\n" in text and "±" not in text
    assert "| AUC FMNIST | 98.00 |\n" in first


def test_seeds_become_mean_and_deviation_beside_the_authors(folder, monkeypatch):
    monkeypatch.setattr(gen_results, "SHORT", {"FMNIST": ("Base",), "MNIST": ("Base", "CCUs", "CEDA")})
    run_script("gen_results.py")
    first, written = (page.read_text() for page in gen_results.PAGES)
    text = re.sub(" +", " ", written)       # without the padding of the columns
    assert text.startswith(f"first\n{gen_results.BEGIN}### MNIST, LeNet\n")
    assert text.endswith(f"{gen_results.END}last\n")
    assert "old" not in text
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in reversed(text.splitlines())
            if line.startswith("|")}        # reversed: of two tables the first wins
    values = [AUC["Base"], AUC["Base-seed1"], AUC["Base-seed2"]]
    base = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert rows["AUC FMNIST"] == ["AUC FMNIST", base, "99.25", "70.00"]
    assert rows["test error"] == ["test error", "0.60 ± 0.10", "0.80", "0.90"]
    assert rows["adversarial noise MMC"][-1] == "–"
    # the authors' figures of May 2019 for Base: test error 0.49, FMNIST 97.07, grey CIFAR-10 99.60
    assert "| AUC FMNIST | 97.87 ± 0.71 / 97.07 (+0.80) | 99.25 / 98.69 (+0.56) |\n" in text
    assert "| AUC GrayCIFAR10-JPEG | 96.87 ± 0.71 / 99.60 (-2.73) |" in text
    assert "| test error | 0.60 ± 0.10 / 0.49 (+0.11) |" in text
    assert "| AUC Uniform | 95.87 ± 0.71 / 91.80 (+4.07) | 97.25 / 100.00 (-2.75) |\n" in text
    assert "nan" not in text and "| adversarial noise MMC | 99.00 ± 1.00 / 99.97 (-0.97) | – / 95.98 |" in text
    for said in ("Base, CEDA: 7 epochs, bf16, seed 0.", "Base-seed1: 7 epochs, bf16, seed 1.", "MCD: elsewhere.",
                 "Abacus, 1 thread", "Base 1.5", "\nAttack: seeds: noise.\nMCD learnt nothing.\n",
                 " python gen_eval.py Y\n", " python gen_attack_stats.py X\n"):
        assert said in text
    short = re.sub(" +", " ", first)
    assert short.startswith(f"first\n{gen_results.BEGIN}MNIST, LeNet, 7 epochs (`results/table[12]_MNIST.csv`):\n\n"
                            "| | Base | CEDA |\n")
    assert short.endswith(f"{gen_results.END}last\n")
    assert f"| AUC FMNIST | {base} | 99.25 |\n" in short and "old" not in short
    run_script("gen_results.py")
    assert [page.read_text() for page in gen_results.PAGES] == [first, written]


def test_a_single_model_of_another_seed_keeps_its_name(folder, capsys):
    for path in Path("results").glob("table2_MNIST*"):
        path.write_text(path.read_text().replace("CEDA", "CEDA-seed1"))
    path = Path("results/table1_MNIST.csv")
    path.write_text(path.read_text().replace("CEDA", "CEDA-seed1"))
    run_script("gen_results.py")
    text = re.sub(" +", " ", gen_results.results())
    assert "| | Base | CEDA-seed1 | MCD |\n" in text and not capsys.readouterr().err


def test_certificates_of_the_same_command_follow_the_table(folder):
    for path in list(Path("results").glob("table[12]_MNIST*")):
        path.rename(path.with_name(path.name.replace("MNIST", "MNIST-long")))
    Path("results/table2_MNIST-long_certified.csv").write_text(
        ",CCU,CCU,CCU-seed1,CCU-seed1,CCUs,CCUs\n" + ",certified,R tight" * 3 + "\n"
        "orig,0.0,,0.0,,0.0,\nFMNIST,3.0,8.0,5.0,9.0,6.125,7.0\n")
    runs = Path("results/table2_MNIST-long_runs.json")
    trained = json.loads(runs.read_text())
    twins = {"CCU": "Base", "CCU-seed1": "Base-seed1", "CCUs": "Base"}
    trained |= {label: trained[twin] for label, twin in twins.items()}
    runs.write_text(json.dumps(trained))
    note = Path("results/table2_MNIST-long_certified.txt")
    note.write_text("% t\n% command: python gen_eval.py Y\n")
    text = re.sub(" +", " ", gen_results.results())
    assert "| | CCU: certified | CCU: R tight | CCUs: certified | CCUs: R tight |\n" in text and text.count("### ") == 1
    assert "| test images | 0.00 ± 0.00 | – | 0.00 | – |\n" in text
    assert "| FMNIST | 4.00 ± 1.41 | 8.50 ± 0.71 | 6.12 | 7.00 |\n" in text
    for other in ("% t\n% command: python gen_eval.py Z\n", ""):       # an earlier one's
        note.write_text(other)
        assert "R tight" not in gen_results.results()


def test_one_epoch_is_not_compared_with_a_hundred(folder):
    runs = json.loads(Path("results/table2_MNIST_runs.json").read_text())
    runs["CEDA"]["epochs"] = 1
    Path("results/table2_MNIST_runs.json").write_text(json.dumps(runs))
    text = gen_results.results()
    assert "Too few epochs to compare" in text and "97.07" not in text


def test_another_network_is_not_compared(folder):
    path = Path("results/table2_MNIST_runs.json")
    path.write_text(path.read_text().replace("LeNet", "ResNet18"))
    text = gen_results.results()
    assert "are of another network" in text and "97.07" not in text


def test_further_tables_of_a_data_set_are_a_section_of_their_own(folder, monkeypatch):
    for path in list(Path("results").glob("table[12]_MNIST*")):
        other = path.with_name(path.name.replace("MNIST", "MNIST-long"))
        other.write_text(path.read_text().replace("99.25", "11.11"))
    Path("results/table2_MNIST_fpr95.csv").write_text("no table of its own")
    Path("results/table2_MNIST_20261124-101112.csv").write_text("nor this: it was given no name")
    text = gen_results.results()
    first, second = text.index("### MNIST, LeNet\n"), text.index("### MNIST-long, LeNet\n")
    assert "99.25" in text[first:second] and "11.11" not in text[first:second]
    assert "11.11 / 98.69 (-87.58)" in text[second:] and "`results/table2_MNIST-long_runs.json`" in text[second:]
    assert "Attack: seeds: noise." in text[second:] and text.count("### ") == 2
    path = Path("results/table2_MNIST-long_runs.json")
    runs = json.loads(path.read_text())
    runs["Base"]["epochs"] = None       # imported
    path.write_text(json.dumps(runs))
    monkeypatch.setattr(gen_results, "SHORT", {"MNIST-long": ("Base", "CEDA"), "MNIST": ("MCD",), "FMNIST": ("Base",)})
    heads = [re.sub(" +", " ", part.splitlines()[0]) for part in gen_results.short().split("\n\n")]
    assert heads == ["MNIST, LeNet, 7 epochs (`results/table[12]_MNIST-long.csv`):", "| | Base | CEDA |",
                     "MNIST, LeNet, epochs unknown (`results/table[12]_MNIST.csv`):", "| | MCD |"]


def test_an_ablation_is_shown_with_its_command(folder):
    Path("results/ablation_X.csv").write_text(",TE,R\nBase,1.0,\nK10,2.0,3.14159\n")
    Path("results/ablation_X.txt").write_text("% Ablation, X\n% command: python ablation.py\n% note\nlatex\n")
    text = re.sub(" +", " ", gen_results.results())
    assert "### Ablation, X\n\nnote.\n\n python ablation.py\n\n" in text and "| K10 | 2.00 | 3.14 |\n" in text
    assert "| Base | 1.00 | – |\n" in text


def test_a_benchmark_is_shown_with_its_targets(folder):
    figures = [{"name": "a / b", "value": 1234.5, "unit": "ms", "baseline": 1000.0, "ratio": 1.2345, "target": "<= 1.3",
                "met": True}, {"name": "c", "value": 0.5, "unit": "h", "baseline": None, "ratio": None, "target": None,
                               "met": None}]
    Path("results/benchmark_x.json").write_text(json.dumps(
        {"command": "python run.py", "commit": "abc", "time": "t", "machine": {
            "gpu": None, "processor": "Abacus", "threads": 2, "torch": "3.0"}, "figures": figures}))
    text = re.sub(" +", " ", gen_results.results())
    assert "### Speed, x\n\n`results/benchmark_x.json`: Abacus, 2 threads, PyTorch 3.0" in text
    assert " python run.py\n" in text
    assert "| a / b | 1,234 ms | 1,000 | 1.234 | <= 1.3 | yes |\n" in text and "| c | 0.5 h | | | | |\n" in text


@pytest.mark.parametrize("spoil, said", [
    (lambda: Path("README.md").write_text("no marks"), "no lines"),
    (lambda: Path("results/README.md").unlink(), "no lines"),
    (lambda: Path("results/table2_MNIST_runs.json").unlink(), "no table2_MNIST_runs.json"),
    (lambda: Path("results/table2_MNIST_runs.json").write_text("{"), "no table2_MNIST_runs.json"),
    (lambda: Path("results/table2_MNIST_runs.json").write_text('{"Base": null}'), "make tables"),
    (lambda: Path("results/table2_MNIST.csv").write_text(",Base\nFMNIST,98\n"), "make tables"),
    (lambda: Path("results/table1_MNIST.csv").write_text(",,Base\nMNIST,TE,22.5\nMNIST,SR,1\n"), "different models"),
    (lambda: Path("results/table1_MNIST.csv").write_text(",,Base\nDigits,TE,0.5\n"), "make tables"),
    (lambda: Path("results/ablation_X.csv").write_text(",TE\nBase,1.0\n"), "benchmarks/ablation.py"),
    (lambda: Path("results/benchmark_x.json").write_text('{"figures": []}'), "benchmarks/run.py"),
])
def test_what_is_missing_is_named(spoil, said, folder, capsys):
    spoil()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        run_script("gen_results.py")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and len(error.splitlines()) == 1
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_readme_shows_the_results_that_are_committed(tmp_path, monkeypatch):
    """Not those in the working tree: a user's own tables may lie there."""
    command = ["git", "-C", ROOT, "archive", "-o", tmp_path / "a.tar", "HEAD", "README.md", "results"]
    if subprocess.run(command).returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    for page, make in gen_results.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert text.split(gen_results.BEGIN)[1].split(gen_results.END)[0] == make(), "run: make results"


@pytest.mark.parametrize("label, base, options", [
    ("ODIN", "Base", "--train_type ODIN"),
    ("ODIN-seed1", "Base-seed1", "--train_type ODIN --seed 1 --label ODIN-seed1"),
    ("CCUs-seed12", "Base-seed12", f"{model_paths.LABELS['CCUs']} --seed 12 --label CCUs-seed12"),
])
def test_labels_with_a_seed(label, base, options):
    assert model_paths.base_of(label) == base
    assert model_paths.options(label) == options


@pytest.mark.parametrize("name, title", [("MNIST", "MNIST"), ("MNIST-100epochs", "MNIST"), ("Folder", "Folder"),
                                         ("Folder-CIFAR10-JPEG", "CIFAR10-JPEG")])
def test_a_folders_table_is_called_after_its_images(name, title):
    assert gen_results.title_of(name) == title
