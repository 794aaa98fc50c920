"Settings 'auto': what a machine does best, the same for all of a study, wherever it goes on"

import json

import pytest
import torch
from torch import nn

from protloc.classify import backbone
from protloc.classify.backbone import Classifier, load_pretrained, weights_at_hand
from protloc.core import InputError
from protloc.diffusion.denoiser import GroupNorm32, UNetConfig, build_denoiser
from protloc.files import read_yaml, write_yaml
from protloc.study import runner
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import claim_folder, settle
from protloc.training import LoopConfig, accelerator_for, autocast_for, native_precision


def precisions(config):
    return [
        config.generator.loop.mixed_precision,
        config.classifier.loop.mixed_precision,
        config.generate.mixed_precision,
    ]


def begun(folder, precision, monkeypatch, **overrides):
    "A study that a machine with this precision has begun"
    monkeypatch.setattr(runner, 'native_precision', lambda: precision)
    config = study_config('demo', overrides=[f'{name}={value}' for name, value in overrides.items()])
    run = claim_folder(folder, settle(config, RunFolder(folder)))
    run.real.mkdir()
    return run


@pytest.mark.parametrize('first, second', [('bf16', 'no'), ('no', 'bf16')])
def test_a_study_goes_on_as_it_began(first, second, tmp_path, monkeypatch):
    run = begun(tmp_path / 'run', first, monkeypatch)
    monkeypatch.setattr(runner, 'native_precision', lambda: second)
    again = settle(study_config('demo'), run)
    assert precisions(again) == [first] * 3
    claim_folder(run.path, again)  # the same study
    asked = settle(study_config('demo', overrides=[f'classifier.loop.mixed_precision={second}']), run)
    with pytest.raises(InputError, match='mixed_precision'):
        claim_folder(run.path, asked)


def test_a_study_of_before_goes_on_in_full_precision(tmp_path, monkeypatch):
    run = begun(tmp_path / 'run', 'no', monkeypatch)
    settings = read_yaml(run.config)
    del settings['generate']['mixed_precision'], settings['generator']['autoencoder']
    write_yaml(run.config, settings)
    monkeypatch.setattr(runner, 'native_precision', lambda: 'bf16')
    again = settle(study_config('demo'), run)
    assert precisions(again) == ['no'] * 3
    claim_folder(run.path, again)


def test_autoencoders_are_settled_too(tmp_path, monkeypatch):
    loop = json.dumps({'loop': {'mixed_precision': 'auto'}})
    run = begun(tmp_path / 'run', 'bf16', monkeypatch, **{'generator.autoencoder': loop})
    assert read_yaml(run.config)['generator']['autoencoder']['loop']['mixed_precision'] == 'bf16'


def test_weights_are_those_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    names = ('resnet18', 'resnet10', 'timm/resnet18', 'nothing')
    assert [weights_at_hand(name) for name in names] == ['none'] * 4
    model = Classifier('resnet18', 4, 3, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_pretrained(model, 'auto')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    file = backbone._imagenet_file('resnet18')
    file.parent.mkdir()
    file.write_bytes(b'no weights')
    assert weights_at_hand('resnet18') == 'imagenet'
    with pytest.raises(InputError, match='ImageNet weights'):
        load_pretrained(model, 'auto')
    config = study_config('demo', overrides=['classifier.weights=auto', 'classifier.backbone=resnet18'])
    assert settle(config, RunFolder(tmp_path / 'run')).classifier.weights == 'imagenet'


def test_what_the_processor_multiplies():
    able = torch.cpu.get_capabilities()
    if torch.accelerator.is_available():
        pytest.skip('this is about processors')
    assert native_precision() == ('bf16' if able.get('avx512_bf16') or able.get('amx_bf16') else 'no')
    assert accelerator_for('auto').mixed_precision == native_precision()
    for precision, inside in (('bf16', torch.bfloat16), ('no', torch.float32), ('fp16', torch.float32)):
        with autocast_for(precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == inside
    assert LoopConfig(mixed_precision=False).mixed_precision == 'no'  # as YAML reads no


def test_norms_in_float32_are_the_same_and_rounded_once():
    plain, ours = nn.GroupNorm(8, 16), GroupNorm32(8, 16)
    with torch.no_grad():
        plain.weight.uniform_(), plain.bias.normal_()
    ours.load_state_dict(plain.state_dict())
    x = 3 * torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last) + 1
    assert torch.equal(plain(x), ours(x))
    half = x.bfloat16()
    assert ours(half).dtype == torch.bfloat16
    assert torch.equal(ours(half), plain(half.float()).bfloat16())
    denoiser = build_denoiser(4, 3, 32, UNetConfig(widths=(16, 32)))
    assert {type(m) for m in denoiser.modules() if isinstance(m, nn.GroupNorm)} == {GroupNorm32}
    assert not any('GroupNorm32' in name for name in denoiser.state_dict())
