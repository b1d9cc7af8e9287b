"""Recipes: those of the package, values on top of them, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest

from moclip.errors import RunError
from moclip.pipeline.learn.fusion_model import FusionConfig
from moclip.pipeline.learn.recipes import configured, recipe_names
from moclip.pipeline.learn.tsn import TSNConfig

CONFIGS = {"tsn": TSNConfig, "fusion": FusionConfig, "probe": FusionConfig}


def test_the_papers_values() -> None:
    tsn = configured(TSNConfig, "tsn", "moclip-lite", split="1")
    assert (tsn.epochs, tsn.milestones, tsn.batch, tsn.segments) == (200, (80, 160), 80, 3)
    assert (tsn.lr, tsn.stem_rate, tsn.backbone_rate, tsn.weight_decay) == (0.01, 0.1, 0.01, 1e-4)
    assert (tsn.resize, tsn.input_size, tsn.backbone) == ((224, 256, 299), 224, "timm:efficientnet_b0")
    fusion = configured(FusionConfig, "fusion", "moclip-lite", split="1")
    assert (fusion.epochs, fusion.batch, fusion.lr, fusion.segments) == (100, 64, 1e-4, 3)
    assert tsn.val_fraction == fusion.val_fraction == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_fast_is_what_happens_without_a_recipe(kind: str) -> None:
    config = CONFIGS[kind]
    assert configured(config, kind, "fast", split="1") == config("1")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_one_of_every_kind(name: str, kind: str) -> None:
    assert configured(CONFIGS[kind], kind, name, split="1")


def test_the_last_word_counts(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[tsn]\nlr = 1\nepochs = 7\nresize = [300]\n")
    settings = ["epochs=8", "lr_drops=[0.5]", "backbone=timm:resnet18", "mirror=false"]
    config = configured(TSNConfig, "tsn", str(file), settings, split="2", seed=4)
    assert asdict(config) == asdict(TSNConfig("2", lr=1.0, epochs=8, resize=(300,), lr_drops=(0.5,), seed=4,
                                              backbone="timm:resnet18", mirror=False))  # fmt: skip
    assert configured(TSNConfig, "tsn", None, **asdict(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["hidden=3"], "tsn has no setting 'hidden'; it has: split, batch"),
        (["lr"], "no setting 'lr'; expected name=value"),
        (["split=2"], "split is set to 2, and has an option that says 1; give one of them"),
        (["weight_decay=nan"], "weight_decay is nan; it must not be negative"),
        (["lr=fast"], "lr is 'fast'; expected a number"),
        (["epochs=1.5"], "epochs is 1.5; expected a whole number"),
        (["epochs=true"], "epochs is True; expected a whole number"),
        (["resize=224"], "resize is 224; expected a list"),
        (["lr_drops=[80]"], "shares of the epochs"),
        (["lr=nan"], "lr is nan; it must be positive"),
        (["resize=[100]"], r"resize is \(100,\); crops need sides of 224"),
    ],
)
def test_what_is_no_setting(settings: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        configured(TSNConfig, "tsn", "fast", settings, split="1")


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no recipe 'slow'; there are fast, moclip-lite"):
        configured(TSNConfig, "tsn", "slow", split="1")
    (tmp_path / "a.toml").write_text("[probe]")
    with pytest.raises(RunError, match=r"says nothing of tsn; expected a table \[tsn\]"):
        configured(TSNConfig, "tsn", str(tmp_path / "a.toml"), split="1")
    (tmp_path / "a.toml").write_text("epochs = 3\n[tsn]\n[tns]\n")
    with pytest.raises(RunError, match="has epochs, tns; expected tables of the kinds of training: tsn, fusion, probe"):
        configured(TSNConfig, "tsn", str(tmp_path / "a.toml"), split="1")
    (tmp_path / "a.toml").write_text("[tsn")
    with pytest.raises(RunError, match="is not TOML"):
        configured(TSNConfig, "tsn", str(tmp_path / "a.toml"), split="1")
