"""What the figures show, against the data; and the data that only figures need."""

import os

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

import model_paths
from models import CCU, GMM, PCAMetric, Softmax
from utils import backups, files, plotting, two_moons
from utils.errors import UserError
from utils.walk import walk


def drawn(fig):
    fig.canvas.draw()
    return fig.axes


def attack_backup(n=5, labels=("Base", "MCD"), dataset="Digits"):
    g = torch.Generator().manual_seed(0)
    models = {label: {"samples": torch.rand(n, 1, 4, 4, generator=g), "score": -torch.rand(n, generator=g),
                      "seed_score": -1 - torch.rand(n, generator=g), "prediction": torch.arange(n)}
              for label in labels}
    return {"format": backups.ATTACK, "dataset": dataset, "seeds": torch.rand(n, 1, 4, 4, generator=g),
            "radii": torch.rand(n, generator=g, dtype=torch.float64), "models": models,
            "meta": {label: {"train_type": "MCD" if label == "MCD" else "plain", "epochs": 7,
                             "score_is_confidence": label != "MCD"} for label in labels},
            "scores_in": {label: -torch.rand(20, generator=g) for label in labels}, "labels_in": torch.arange(20) % 10,
            "classes": 10,
            "record": {"command": "python gen_attack_stats.py"}}


def test_save_writes_both_files_or_none(tmp_path, monkeypatch):
    panel = {"Digits": torch.rand(30)}
    written = plotting.save(plotting.radii(panel), tmp_path / "a/one")
    assert [path.name for path in written] == ["one.png", "one.pdf"]
    again = plotting.save(plotting.radii(panel), tmp_path / "a/two")
    assert [a.read_bytes() for a in written] == [b.read_bytes() for b in again]

    def full(self, file, **_):
        file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(plotting.Figure, "savefig", full)
    with pytest.raises(UserError, match="No space left"):
        plotting.save(plotting.radii(panel), tmp_path / "b/three")
    assert not list((tmp_path / "b").iterdir())


def test_histograms_count_every_seed():
    panels = {"Digits": torch.cat((torch.zeros(7), torch.rand(33) + 1)), "MNIST": torch.full((12,), 3.0)}
    for ax, (title, radii) in zip(drawn(plotting.radii(panels)), panels.items(), strict=True):
        assert ax.get_title() == title and "units of the metric" in ax.get_xlabel()
        assert sum(bar.get_height() for bar in ax.patches) == len(radii)
        assert ax.lines[0].get_xdata()[0] == np.median(radii.double())


def test_confidences_are_counted_from_uniform_to_certain():
    g = torch.Generator().manual_seed(0)
    sets = {"test": torch.cat((torch.ones(60), torch.rand(40, generator=g) * 0.9 + 0.1)),
            "Uniform": torch.full((50,), 0.1), "adversarial noise": torch.tensor([0.1 - 1e-8, 1.0, 1.0])}
    ax, = drawn(plotting.confidences({"Base": sets}, classes=10, bins=9))
    for stairs, (base, values) in zip(ax.patches, zip((2, 1, 0), sets.values(), strict=True), strict=True):
        heights, edges, baseline = stairs.get_data()
        expected, _ = np.histogram(values.clamp(0.1, 1).double(), np.linspace(0.1, 1, 10))
        assert expected.sum() == len(values) and baseline == base
        np.testing.assert_allclose((heights - base) / 0.8, expected / expected.max(), atol=1e-6)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(sets)
    means = [text.get_text() for text in ax.texts if text.get_text() != "mean"]
    assert means == [f"{100 * values.mean():.1f}" for values in sets.values()]
    many = drawn(plotting.confidences({str(i): sets for i in range(13)}, classes=10))
    assert [ax.get_title() for ax in many[:13]] == [str(i) for i in range(13)]


def test_worst_cases_show_the_samples_and_what_is_said_of_them():
    backup = attack_backup()
    axes = np.array(drawn(plotting.worst_cases(backup, [3, 1]))).reshape(2, 3)
    for row, i in zip(axes, (3, 1), strict=True):
        shown = [ax.images[0].get_array() for ax in row]
        expected = [backup["seeds"][i], *(attacked["samples"][i] for attacked in backup["models"].values())]
        assert all((a == b[0].numpy()).all() for a, b in zip(shown, expected, strict=True))
        base, mcd = backup["models"]["Base"], backup["models"]["MCD"]
        assert row[0].get_xlabel() == f"$R$ = {backup['radii'][i]:.3g}"
        assert row[1].get_xlabel() == (f"class {i}\n{100 * base['seed_score'][i].exp():.1f} → "
                                       f"{100 * base['score'][i].exp():.1f} %")
        assert row[2].get_xlabel() == f"class {i}\nscore {mcd['seed_score'][i]:.3g}\n→ {mcd['score'][i]:.3g}"
    base["score"][3] = torch.tensor(0.1).log()
    ax = drawn(plotting.worst_cases(backup, [3]))[1]
    assert ax.get_xlabel() == f"no class\n{100 * base['seed_score'][3].exp():.1f} → 10.0 %"
    ax = drawn(plotting.worst_cases(backup | {"classes": 12}, [3]))[1]
    assert ax.get_xlabel().startswith("class 3\n")
    with pytest.raises(UserError, match="no seed 5: this attack has the seeds 0 to 4"):
        plotting.worst_cases(backup, [0, 5])
    labels = [f"a method of seed {i}" for i in range(13)]
    many = attack_backup(3, labels)
    axes = np.array(drawn(plotting.worst_cases(many, [2, 0]))).reshape(2, 2, 8)     # block, seed, image
    titles = [ax.get_title().replace("\n", " ") for ax in axes[:, 0, 1:].flat]
    assert titles == [*labels, ""] and not any(ax.get_title() for ax in axes[:, 1].flat)
    for (block, row, k), ax in np.ndenumerate(axes[:, :, 1:]):
        assert ax.axison == (block * 7 + k < 13)
        if ax.axison:
            expected = many["models"][labels[block * 7 + k]]["samples"][(2, 0)[row], 0]
            assert (ax.images[0].get_array() == expected.numpy()).all()
    colour = attack_backup(1, ("Base",)) | {"seeds": torch.rand(1, 3, 4, 4)}
    colour["models"]["Base"]["samples"] = torch.rand(1, 3, 4, 4)
    ax = drawn(plotting.worst_cases(colour, [0]))[1]
    np.testing.assert_array_equal(ax.images[0].get_array(),
                                  colour["models"]["Base"]["samples"][0].permute(1, 2, 0).numpy())


def small_ccu():
    g = torch.Generator().manual_seed(0)
    V, _ = torch.linalg.qr(torch.randn(16, 16, generator=g))
    metric = PCAMetric(V, torch.linspace(0.5, 2, 16))
    gmms = [GMM(torch.rand(3, 16, generator=g), torch.full((3,), logvar), torch.full((3,), 1 / 3).log(), metric)
            for logvar in (-4.0, -1.5)]
    linear = nn.Linear(16, 3)
    with torch.no_grad():
        linear.weight.copy_(20 * torch.randn(3, 16, generator=g))
    return CCU(nn.Sequential(nn.Flatten(), linear), *gmms, 0.0, 3).eval()


def test_the_way_from_an_image_to_noise():
    ccu = small_ccu()
    start = ccu.gmm_in.mu[0].detach().view(1, 4, 4)
    noise = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    way = walk({"Base": Softmax(ccu.base_model), "CCU": ccu}, "CCU", start, noise, 40)
    assert way.images.shape == (40, 1, 4, 4) and torch.equal(way.images[0], start)
    metric = ccu.gmm_in.metric
    step = ((way.images - start).flatten(1).double() @ metric.comp_vecs.T.double())
    expected = (step.square() / metric.singular_values).sum(1).sqrt()
    torch.testing.assert_close(way.distance, expected, atol=1e-5, rtol=1e-5)
    assert (way.distance.diff() > 0).all()
    confidence = way.confidence["CCU"]
    assert confidence[0] > 0.9 and confidence[-1] < 0.4     # the way leaves the data
    for bound in way.bound.values():
        assert (bound >= confidence - 1e-6).all()           # every point lies in the ball that reaches it
    assert (way.bound["tight"] <= way.bound["paper"]).all() and (way.radius["tight"] >= way.radius["paper"]).all()
    sure = confidence > 1.1 / 3 + 1e-6
    for i in torch.nonzero(sure).flatten():                 # no certified ball holds a point that is more confident
        between = (step[i] - step).div(metric.singular_values.sqrt()).norm(dim=1)
        assert (way.radius["tight"] <= between + 1e-6).all()
    left, right, *pictures = drawn(plotting.certificate(way, "CCU", 5))
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines) == ["Base", "CCU", "certified, paper", "certified, tight"]
    np.testing.assert_array_equal(lines["certified, tight"], way.bound["tight"].numpy())
    np.testing.assert_array_equal(right.lines[0].get_ydata(), way.radius["paper"].numpy())
    assert len(pictures) == 5 and f"CCU {100 * confidence[-1]:.1f}" in pictures[-1].get_xlabel()
    with pytest.raises(UserError, match="Base is no CCU"):
        walk({"Base": Softmax(ccu.base_model)}, "Base", start, noise)
    base = Softmax(ccu.base_model)
    four = walk({**dict.fromkeys("abcd", base), "CCU": ccu}, "CCU", start, noise, 40)
    fig = plotting.certificate(four, "CCU", 5)
    fig.draw_without_rendering()
    left = fig.axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == 7
    legend = fig.subfigs[0].legends[0].get_window_extent()
    assert fig.bbox.x0 <= legend.x0 < legend.x1 <= fig.bbox.x1
    with pytest.raises(UserError, match="at most 4"):
        plotting.certificate(walk({**dict.fromkeys("abcde", base), "CCU": ccu}, "CCU", start, noise, 40), "CCU")
    base.score_is_confidence = False
    with pytest.raises(UserError, match="score of MCD is no confidence"):
        walk({"MCD": base, "CCU": ccu}, "CCU", start, noise)


def test_two_moons():
    x, y = two_moons.points(0)
    expected, labels = make_moons(1000, noise=0.15, random_state=0)
    np.testing.assert_allclose(x.numpy() * 4 - 1.6, expected, atol=1e-5)
    assert (y.numpy() == labels).all() and x.min() >= 0 and x.max() <= 1
    models = {name: two_moons.train(name, x, y, epochs=30) for name in ("plain", "CEDA_GMM")}
    grids = {name: two_moons.on_grid(model, 21) for name, model in models.items()}
    for name, model in models.items():
        confidence, margin = grids[name]
        with torch.no_grad():
            log_p, at = model(x), model(torch.tensor([[0.25, 0.7]]))
        assert (log_p.argmax(1) == y).float().mean() > 0.85
        assert confidence[14, 5] == pytest.approx(at.amax().exp().item(), abs=1e-5)
        assert (margin[14, 5] > 0) == bool(at.argmax())
    plain, ccu = (grids[name][0] for name in ("plain", "CEDA_GMM"))
    corners = torch.tensor([0, 0, -1, -1]), torch.tensor([0, -1, 0, -1])
    assert (ccu[corners] - 0.5).abs().max() < 1e-3 and plain[corners].amax() > 0.99
    assert ccu.max() > 0.7                                  # CCU is not unsure everywhere
    assert (plain > 0.95).float().mean() > 0.5 > (ccu > 0.55).float().mean()
    *panels, bar = drawn(plotting.two_moons(grids, x, y))
    for ax, name in zip(panels, grids, strict=True):
        assert ax.get_title() == name and ax.get_xlim() == ax.get_ylim() == (0, 1)
        filled, *moons, boundary = ax.collections
        assert (filled.levels[0], filled.levels[-1]) == (0.5, 1) and list(boundary.levels) == [0]
        assert sum(len(moon.get_offsets()) for moon in moons) == len(x)
    assert bar.get_ylim() == (0.5, 1)


def test_the_newest_backup_of_the_data_set_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no scores for MNIST yet; run: python gen_eval.py --dataset MNIST$"):
        backups.load("MNIST", backups.SCORES)
    for age, (name, backup) in enumerate({
            "old_Digits": attack_backup(4), "new_Digits": attack_backup(6), "x_Digits_MNIST": attack_backup(2) | {
                "dataset": "MNIST"}, "mine": {"format": backups.SCORES, "dataset": "Digits"}}.items()):
        path = files.save(backup, model_paths.BACKUP / f"{name}.pt")
        os.utime(path, (1000 + age, 1000 + age))
    assert len(backups.load("Digits", backups.ATTACK)["radii"]) == 6
    (model_paths.BACKUP / "damaged.pt").write_bytes(b"newest of all")
    assert len(backups.load("Digits", backups.ATTACK)["radii"]) == 6 and "damaged.pt" in capsys.readouterr().err
    assert len(backups.load("Digits", backups.ATTACK, "results/backup/old_Digits.pt")["radii"]) == 4
    assert "radii" not in backups.load("Digits", backups.SCORES)
    with pytest.raises(UserError, match="is of Digits, not of MNIST"):
        backups.load("MNIST", backups.ATTACK, "results/backup/old_Digits.pt")
    with pytest.raises(UserError, match="format"):
        backups.load("Digits", backups.ATTACK, "results/backup/mine.pt")
    with pytest.raises(UserError, match="nothing.pt; make one: python gen_attack_stats.py"):
        backups.load("Digits", backups.ATTACK, "nothing.pt")


def test_confidences_of_both_backups():
    attack = attack_backup(5, ("Base", "CCU", "MCD"))
    inside = attack["scores_in"]
    scores = {"scores": {f"{label}/{name}": value for label in inside for name, value in
                         (("orig", inside[label]), ("Uniform", torch.full((3,), -2.0)))}}
    found = backups.confidences(attack, scores)
    assert list(found) == ["Base", "CCU"]       # MCD's score is no confidence
    assert list(found["CCU"]) == ["Digits (test)", "Uniform", "adversarial noise"]
    torch.testing.assert_close(found["CCU"]["adversarial noise"], attack["models"]["CCU"]["score"].double().exp())
    torch.testing.assert_close(found["Base"]["Uniform"], torch.full((3,), -2.0).double().exp())
    scores["scores"]["CCU/orig"] = inside["CCU"] - 0.5      # trained again in between
    with pytest.raises(UserError, match="different models CCU; make both again: python gen_attack_stats.py"):
        backups.confidences(attack, scores)
    for labels in (("MCD",), ("EDL",)):     # no confidence; not in the other backup
        with pytest.raises(UserError, match="no method .* is in both backups.*: python gen_attack_stats.py"):
            backups.confidences(attack_backup(5, labels), scores)


def test_the_caption_says_how_the_models_were_made():
    attack = attack_backup(5, ("Base", "CCU", "Mine"))
    attack["meta"]["CCU"] |= {"epochs": 9, "out_dataset": "Photos"}
    attack["meta"]["Mine"] = {"source": "LeNet trained elsewhere"}
    assert backups.caption(attack) == ("**Digits**. Base: 7 epochs; CCU: 9 epochs, out-distribution Photos; Mine: "
                                       "LeNet trained elsewhere. `python gen_attack_stats.py`")
