from __future__ import annotations

import pytest
import yaml

from backbones.training.config import parse, settings, to_dict, to_yaml
from backbones.training.errors import UsageError
from backbones.training.train_config import TrainConfig


def _parse(*argv, **arguments):
    return parse(TrainConfig, [str(word) for word in argv], program="train.py", **arguments)


def _recipe(path, **groups):
    path.write_text(yaml.safe_dump(groups))
    return path


def test_every_flag_is_unique_and_documented():
    known = settings(TrainConfig).values()
    assert len({setting.flag for setting in known}) == len(known)
    assert all(setting.help for setting in known)


def test_defaults_are_the_built_in_run():
    config = _parse().config
    assert (config.model.name, config.data.name) == ("shvit_s1", "digits")
    assert (config.optim.lr, config.schedule.epochs, config.data.batch_size) == (2e-3, 12, 64)


def test_later_layers_win(tmp_path):
    first = _recipe(tmp_path / "first.yaml", optim={"lr": 0.1, "clip": 5.0}, data={"batch_size": 8})
    second = _recipe(tmp_path / "second.yaml", optim={"lr": 0.2})
    parsed = _parse(first, "--batch-size", 16, second, base={"optim.clip": 7.0, "ema.decay": 0.5})
    assert parsed.config.optim.lr == 0.2
    assert parsed.config.optim.clip == 5.0
    assert parsed.config.data.batch_size == 16
    assert parsed.config.ema.decay == 0.5
    assert parsed.origins["optim.lr"] == "second.yaml"
    assert parsed.origins["optim.clip"] == "first.yaml"
    assert parsed.origins["data.batch_size"] == "command line"
    assert parsed.origins["ema.decay"] == "run folder"
    assert parsed.origins["optim.eps"] == "default"


def test_all_spellings_mean_the_same(tmp_path):
    recipe = _recipe(tmp_path / "r.yaml", model={"name": "shvit_s2"}, optim={"weight_decay": 0.1})
    for argv in (
        ["--model", "shvit_s2", "--weight-decay", "0.1"],
        ["--model=shvit_s2", "--weight-decay=1e-1"],
        ["model.name=shvit_s2", "optim.weight_decay=0.1"],
        ["model=shvit_s2", "weight_decay=.1"],
        [recipe],
        ["--recipe", recipe],
    ):
        config = _parse(*argv).config
        assert (config.model.name, config.optim.weight_decay) == ("shvit_s2", 0.1)


def test_values_take_the_type_of_their_setting(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("optim: {lr: 1e-3, clip: null, betas: [0.9, 0.95]}\nmodel: {pretrained: true}")
    config = _parse(path, "--mean", ".1,.2,.3", "--no-channels-last", "--accumulate", 2).config
    assert config.optim.lr == 1e-3 and isinstance(config.optim.lr, float)
    assert config.optim.clip is None and config.optim.betas == (0.9, 0.95)
    assert config.model.pretrained is True and config.runtime.channels_last is False
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert _parse("--clip", "none").config.optim.clip is None


def test_the_printed_config_is_a_recipe_with_origins(tmp_path):
    parsed = _parse("--lr", "0.5", "--auto-augment", "rand-m9")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(parsed))
    assert to_dict(_parse(path).config) == to_dict(parsed.config)
    assert "lr: 0.5" in path.read_text() and "# command line" in path.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch; did you mean --epochs"),
        (["optim.lrr=1"], "unknown setting optim.lrr; did you mean optim.lr"),
        (["--lr", "fast"], "optim.lr (--lr) takes float, not 'fast'"),
        (["--epochs", "1.5"], "takes int"),
        (["--amp", "fp8"], "must be one of auto, none, bf16, fp16, not 'fp8'"),
        (["--lr", "-1"], "--lr must be positive and finite, not -1.0"),
        (["--lr"], "expected one argument"),
        (["channels_last=maybe"], "takes bool"),
        (["--pretrained", "--finetune", "x.pth"], "use one"),
        (["nothing.yaml"], "no recipe nothing.yaml"),
        (["--smoothing", "2"], "between 0 and 1"),
        (["--batch-size", "0"], "at least 1"),
    ],
)
def test_mistakes_are_named_with_their_remedy(argv, message):
    with pytest.raises(UsageError) as error:
        _parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown setting optim.lrr in"),
        ("optim: 3", "`optim` must hold settings"),
        ("- a\n- b", "must hold groups"),
        ("optim: {lr: [", "not valid YAML"),
    ],
)
def test_mistakes_in_recipes_are_named(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        _parse(path)
    assert message in str(error.value) and "recipe.yaml" in str(error.value)


def test_long_values_are_read_back(tmp_path):
    path = tmp_path / "config.yaml"
    for name in ("a" * 60, "a b " * 60 + "c"):
        parsed = _parse("--finetune", name, "--freeze", ",".join("abcdefgh" * 9))
        path.write_text(to_yaml(parsed))
        assert _parse(path).config == parsed.config


def test_a_misspelt_recipe_is_told_its_neighbours(tmp_path):
    _recipe(tmp_path / "shvit_s1.yaml")
    with pytest.raises(UsageError, match=r"did you mean shvit_s1\.yaml"):
        _parse(tmp_path / "shvit_s1x.yaml")
