"""Training configurations: YAML and flags to TrainConfig, and what is said about wrong ones."""

import dataclasses

import pytest
import yaml

from vlmkernels.train import TrainConfig
from vlmkernels.train.config import read_config, settings, shipped_configs, write_config


def test_shipped_configurations_are_valid():
    assert {"clip-emoji", "clip-emoji-long", "align-emoji", "siglip-emoji"} <= set(shipped_configs())
    for name in shipped_configs():
        config = TrainConfig(**read_config(name))
        assert config.data.startswith(("emoji3:", "scenes:", "composites:"))
        assert read_config(name + ".yaml") == read_config(name)
    assert TrainConfig(**read_config("clip-emoji-long")).epochs == 60


def test_written_configuration_reads_back(tmp_path):
    config = TrainConfig(
        model_options={"vocab_size": 600}, augment={"crop_scale": [0.5, 1.0]}, lr=3e-4, images_per_row=2
    )
    write_config(tmp_path / "config.yaml", config.to_dict())
    assert TrainConfig(**read_config(tmp_path / "config.yaml")) == config


def test_numbers_as_yaml_reads_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nweight_decay: 0\n")  # YAML 1.1: the first is text, the second an integer
    assert isinstance(yaml.safe_load(path.read_text())["lr"], str)
    config = TrainConfig(**read_config(path))
    assert (config.lr, config.weight_decay) == (1e-3, 0.0)
    assert isinstance(config.weight_decay, float)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        (
            {"lr": "fast", "epochs": 2.5},
            ["lr must be a number, got 'fast'", "epochs must be an integer, got 2.5"],
        ),
        ({"progress": "yes"}, ["progress must be true or false, got 'yes'"]),
        ({"batch_size": True}, ["batch_size must be an integer, got True"]),
        ({"epochs": 0, "lr": -1}, ["epochs must be at least 1, got 0", "lr must be positive, got -1.0"]),
        ({"lr": float("nan"), "eps": "inf"}, ["lr must be finite, got nan", "eps must be finite, got inf"]),
        ({"lr": "1e999"}, ["lr must be finite, got inf"]),
        ({"lr": 10**400}, ["lr must be a number, got 1000"]),
        ({"min_lr": float("-inf")}, ["min_lr must be finite, got -inf"]),
        ({"grad_clip": float("inf")}, ["grad_clip must be finite, got inf"]),
        ({"weight_decay": "nan", "beta1": "nan"}, ["weight_decay must be finite", "beta1 must be finite"]),
        ({"label_smoothing": float("nan")}, ["label_smoothing must be finite, got nan"]),
        ({"seed": 2**31}, ["seed must be below 2147483648, got 2147483648"]),
        ({"optimizer": "lamb"}, ["optimizer must be one of adamw, sgd, got 'lamb'"]),
        ({"precision": "half"}, ["precision must be one of fp32, bf16, fp16, got 'half'"]),
        ({"ema_decay": 1.0}, ["ema_decay must be in [0, 1), got 1.0"]),
        ({"model_options": [1]}, ["model_options must be a mapping such as {name: value}, got [1]"]),
        ({"max_steps": 0}, ["max_steps must be at least 1, got 0"]),
        ({"vision": 3, "epochs": "x"}, ["vision must be text, got 3", "epochs must be an integer"]),
        ({"images_per_row": 0, "lr": 0}, ["images_per_row must be at least 1, got 0", "lr must be positive"]),
    ],
)
def test_bad_values_are_one_error_that_names_them_all(values, messages):
    with pytest.raises(ValueError) as error:
        TrainConfig(**values)
    for message in messages:
        assert message in str(error.value)


def test_unknown_keys_and_bad_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("batchsize: 3\nlearning_rate: 1\n")
    with pytest.raises(
        ValueError, match=r"unknown keys batchsize, learning_rate; known keys are .*batch_size"
    ):
        read_config(path)
    recursive = b"model_options: &a {x: *a}\n"
    for content in (b"lr: [1\n", b"lr: \xff\n", b"[" * 20_000, b"epochs: " + b"9" * 5000, recursive):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^config: .*c\.yaml is not YAML"):
            read_config(path)
    path.write_text("- lr\n")
    with pytest.raises(ValueError, match="must be a mapping of keys to values, got list"):
        read_config(path)
    path.write_text("")
    assert read_config(path) == {}
    with pytest.raises(FileNotFoundError, match=r"no file nothing\.yaml; .*clip-emoji"):
        read_config("nothing.yaml")


def test_every_setting_has_help():
    assert all(setting.help for setting in settings().values())


def test_options_of_the_kinds_are_given_as_all_settings():
    """They are kept apart, by their own rules, and survive a copy."""
    config = TrainConfig(vision="tower", images_per_row=3, tokenizer=None)
    assert config.options == {"vision": "tower", "images_per_row": 3}
    assert config.to_dict()["images_per_row"] == 3
    assert dataclasses.replace(config, epochs=2) == TrainConfig(epochs=2, vision="tower", images_per_row=3)
    with pytest.raises(TypeError, match="TrainConfig has no settings depth, width"):
        TrainConfig(width=3, depth=2)
