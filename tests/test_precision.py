"""Lower precision and another memory layout: the same answers up to rounding, values in their own type."""

import pytest
import torch
from torch import nn

import fedftg
from fedftg import precision as precisions
from fedftg.errors import InputError
from fedftg.precision import computed


@pytest.mark.parametrize("channels", [1, 2])
def test_layers_see_the_layout_and_the_precision_and_the_answer_has_the_type_of_the_images(channels, monkeypatch):
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: True)
    seen = []
    layer = nn.Conv2d(channels, 3, 3)
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].stride(), output.dtype)))
    images = torch.randn(4, channels, 5, 5)
    plain = computed(layer, images, "float32", "contiguous")
    fast = computed(layer, images, "bfloat16", "channels_last")
    size = 25 * channels
    last = (size, 1, 5 * channels, channels)
    assert seen == [((size, 25, 5, 1), torch.float32), (last, torch.bfloat16)]
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, plain, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("section", ["local", "refiner"])
def test_a_run_is_refused_before_anything_is_written(section, monkeypatch, tmp_path):
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: False)
    with pytest.raises(InputError, match="precision 'bfloat16' needs hardware that has it"):
        fedftg.run("default", overrides=["refiner.name=leaves", f"{section}.precision=bfloat16"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bfloat16_needs_the_hardware_and_auto_does_without(monkeypatch):
    layer, images = nn.Linear(3, 2), torch.randn(4, 3)
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: False)
    assert torch.equal(computed(layer, images, "auto", "contiguous"), layer(images))
    with pytest.raises(InputError, match="'bfloat16' needs hardware that has it, got cpu; set 'float32' or 'auto'"):
        computed(layer, images, "bfloat16", "contiguous")
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: True)
    assert not torch.equal(computed(layer, images, "auto", "contiguous"), layer(images))


def test_evaluation_has_the_precision_of_local_training(monkeypatch, tmp_path):
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: True)
    loss = {}
    for name in ("float32", "bfloat16"):
        # At this rate both evaluate the initial model.
        given = ["rounds=1", "refiner.name=none", "local.steps=1", "local.lr=1e-30", f"local.precision={name}"]
        run = fedftg.run("default", overrides=given, out=tmp_path / name)
        loss[name] = fedftg.load_run(run.folder).rounds[0]["loss"]["refined"]
    assert loss["bfloat16"] != loss["float32"]
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.01)
